"""The model card of an output."""

from __future__ import annotations

from typing import Any

from latentize.families import ModelSpec
from latentize.recipe import Recipe

__all__ = ["render"]

_LOAD = {
    "deepseek_v3": "It is a dense DeepSeek-V3 checkpoint: it loads with stock transformers, no code of latentize's.",
    "native": "It loads with `AutoModelForCausalLM` after `import latentize`.",
}


def render(model: str, spec: ModelSpec, recipe: Recipe, report: dict[str, Any], notes: list[str]) -> str:
    """Markdown that says what was done, what it cost, and how to load it."""
    a, before, after = spec.attention, spec.cache_values, report["cache_values_per_token_layer"]
    what = "multi-head latent attention" if recipe.to == "mla" else f"{report['num_key_value_heads']} kv head(s)"
    rows = {
        "source": f"`{model}` ({spec.table.model_type}, {a.kind}: {a.num_heads} query and {a.num_kv_heads} kv heads)",
        "method": report["method"],
        "format": report["format"],
        "cached values per token and layer": f"{after} instead of {before} ({1 - after / before:.1%} fewer)",
        "kv_lora_rank + qk_rope_head_dim": f"{report['kv_lora_rank']} + {report['qk_rope_head_dim']}",
        "calibrated on": f"{report['calibration_tokens']:,} tokens of {report['calibration_text']}, "
        f"in sequences of {recipe.sequence_length}",
        "perplexity": f"{report['perplexity']:.4f}, the source has {report['source_perplexity']:.4f}",
        "KL from the source": f"{report['kl']:.4f} nats per token",
        "same most likely token": f"{report['top1_agreement']:.2%}",
    }
    if report["kv_lora_rank"] is None:
        del rows["kv_lora_rank + qk_rope_head_dim"]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    limits = "\n".join(f"- {note}" for note in notes) or "- none that the format imposes"
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [mla, latentize]\n---\n"
        f"# {model.rstrip('/').rsplit('/', 1)[-1]} with {what}\n\n"
        f"{_LOAD.get(report['format'], 'It loads as its source does.')}\n\n| | |\n|---|---|\n{table}\n\n"
        f"Quality was measured on {report['evaluation_tokens']:,} held-out tokens that nothing was chosen on, in "
        f"sequences of {recipe.sequence_length}; longer contexts were not measured. "
        f"Python source is a narrow diet: for a general model calibrate on text like your own (`--data`).\n\n"
        f"Approximations and limits:\n{limits}\n\n"
        f"`latentize.json` holds the recipe, hashes, versions and errors of every layer; "
        f"`latentize verify` checks the files against it.\n"
    )
