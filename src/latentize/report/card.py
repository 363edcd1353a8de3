"""The model card of an output."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from latentize.checkpoint.gguf import gguf_licence, is_gguf
from latentize.families import LatentModel, ModelSpec
from latentize.formats.portable import PORTABLE
from latentize.paths import expanded
from latentize.recipe import Recipe
from latentize.report.measurements import cached_rows, calibration_text

__all__ = ["licence", "render"]

_FRONT = re.compile(r"\A---\n(.*?)^---\s*$", re.DOTALL | re.MULTILINE)
# YAML's words for nothing.
_NOTHING = ("", "~", "null", "Null", "NULL")
# What a card of the hub may say of a licence.
_KEYS = ("license", "license_name", "license_link")
# Licences that are known by how they begin.
_BEGINNINGS = {"apache license": "apache-2.0", "mit license": "mit"}
_LOAD = {
    "deepseek_v3": (
        "It is a dense DeepSeek-V3 checkpoint: stock transformers loads it, without any code of latentize's.",
        "",
    ),
    "deepseek_v2": (
        "It is a DeepSeek-V2 checkpoint with experts that are chosen by softmax, for vLLM and llama.cpp. transformers "
        "stops where weights of the chosen ones sum to one, which its DeepSeek-V2's do not; latentize loads it.",
        "",
    ),
    "native": (
        "It is in latentize's own format, which transformers knows once latentize is imported.",
        "import latentize\n",
    ),
}
_AS_BEFORE = ("It has the architecture of its source, with fewer kv heads, and loads wherever that does.", "")
_LOWERED = ("It has the architecture of its source, with a smaller `kv_lora_rank`, and loads wherever that does.", "")


def licence(source: Path) -> dict[str, str]:
    """What the source says of its licence, as entries of a card: from its card, else from a licence file.

    Args:
        source: Its folder; or a GGUF file, which says it itself.

    Returns:
        ``license`` and, where it needs them, ``license_name`` and ``license_link``; ``unknown`` where nothing is said.
    """
    if is_gguf(source):
        return gguf_licence(source)
    front = _front(source / "README.md")
    said = {key: front[key] for key in _KEYS if key in front}
    if "license" in said:
        return said
    files = (path for pattern in ("LICENSE*", "LICENCE*") for path in sorted(source.glob(pattern)) if path.is_file())
    for path in files:
        head = _beginning(path)
        known = next((name for words, name in _BEGINNINGS.items() if words in head), None)
        return (
            {"license": known}
            if known
            else {"license": "other", "license_name": "that-of-the-source", "license_link": path.name}
        )
    return {"license": "unknown"}


def _beginning(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as stream:
            return stream.read(400).lower()
    except OSError:
        return ""


def _front(card: Path) -> dict[str, Any]:
    """Entries before a card's text that are words or lists of words; none where they cannot be read.

    Nothing is taken for a number, a date or a truth: a licence may be called 4.0.
    """
    try:
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
        found = _FRONT.match(text.replace("\r\n", "\n"))
        # It makes nothing but words, lists and mappings.
        entries = yaml.load(found.group(1), yaml.BaseLoader) if found else None
    except (OSError, yaml.YAMLError, RecursionError):
        return {}
    if not isinstance(entries, dict):
        return {}
    words = {key: _words(value) for key, value in entries.items() if isinstance(key, str)}
    return {key: value for key, value in words.items() if value}


def _words(value: Any) -> str | list[str]:
    """What a card says, where it is said in words; of a list those of its entries that are."""
    if isinstance(value, list):
        return [word for entry in value if isinstance(entry, str) and (word := _word(entry))]
    return _word(value) if isinstance(value, str) else ""


def _word(value: str) -> str:
    return "" if value in _NOTHING else " ".join(value.split())


def render(
    model: str,
    path: Path,
    spec: ModelSpec | LatentModel,
    recipe: Recipe,
    report: dict[str, Any],
    notes: list[str],
) -> str:
    """Markdown that says what was done, what it cost, how to load it, and whose licence it has.

    Args:
        model: The source, as it was named.
        path: Where it lies.
        spec, recipe: What it is, and what was done.
        report: What was measured.
        notes: Approximations and limits.
    """
    latent = recipe.to == "mla"
    what = "multi-head latent attention" if latent else f"{report['num_key_value_heads']} kv head(s)"
    loading = _LOWERED if isinstance(spec, LatentModel) else _LOAD.get(report["format"], _AS_BEFORE)
    if isinstance(spec, LatentModel):
        what = f"a latent of {report['kv_lora_rank']} instead of {spec.attention.kv_lora_rank} values"
    said = licence(path)
    entries: dict[str, Any] = {**said, "library_name": "transformers", "pipeline_tag": "text-generation"}
    entries["tags"] = ["mla", "latentize"] if latent else ["latentize"]
    # A folder is no name that anybody else could look up.
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not expanded(model).exists():
        entries["base_model"] = model
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in _facts(model, spec, recipe, report).items())
    limits = "\n".join(f"- {note}" for note in _limits(recipe, report, notes))
    silent = "the file does not say it" if is_gguf(path) else "neither a card nor a licence file lay beside it"
    terms = f"unknown: {silent}" if said["license"] == "unknown" else f"`{said['license']}`"
    return (
        f"---\n{yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)}---\n"
        f"# {model.rstrip('/').rsplit('/', 1)[-1]} with {what}\n\n{_loading(*loading)}\n\n"
        f"## What was done, and what it cost\n\n| | |\n|---|---|\n{table}\n\n"
        f"Measured on {report['evaluation_tokens']:,} held-out tokens that nothing was learnt or chosen from.\n\n"
        f"## Approximations and limits\n\n{limits}\n\n"
        f"## Licence\n\nThat of the source: {terms}.\n\n"
        f"`latentize.json` holds the recipe, hashes, versions and errors of every layer; "
        f"`latentize verify` checks the files against it.\n"
    )


def _cell(value: str) -> str:
    """A bar would begin another cell."""
    return value.replace("|", "\\|")


def _loading(sentence: str, before: str) -> str:
    return (
        f"{sentence}\n\n```python\n{before}from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n```'
    )


def _source(spec: ModelSpec | LatentModel) -> str:
    if isinstance(spec, LatentModel):
        a = spec.attention
        return f"{spec.model_type}, MLA: {a.num_heads} heads, latents of {a.kv_lora_rank}"
    a = spec.attention
    return f"{spec.table.model_type}, {a.kind}: {a.num_heads} query and {a.num_kv_heads} kv heads"


def _facts(model: str, spec: ModelSpec | LatentModel, recipe: Recipe, report: dict[str, Any]) -> dict[str, str]:
    before, after = spec.cache_values, report["cache_values_per_token_layer"]
    rows = {
        "source": f"`{model}` ({_source(spec)})",
        "method": report["method"],
        "format": report["format"],
        "cached values per token and layer": f"{after:g} instead of {before} ({1 - after / before:.1%} fewer)",
        **cached_rows(report),
    }
    if report["kv_lora_rank"] is not None:
        sizes = [report["kv_lora_rank"], report["qk_rope_head_dim"]]
        mean = "" if all(float(size).is_integer() for size in sizes) else ", mean over layers"
        rows["kv_lora_rank + qk_rope_head_dim"] = " + ".join(f"{size:.4g}" for size in sizes) + mean
    if report["calibration_tokens"]:
        rows["calibrated on"] = f"{calibration_text(report)}, in sequences of {recipe.sequence_length:,}"
    if report["reading_error"] is not None:
        rows["read as transformers reads it"] = f"every layer, to a relative error of {report['reading_error']:.0e}"
    return {
        **rows,
        "loss above the source": f"{report['excess_loss']:.4f} nats per token",
        "perplexity": f"{report['perplexity']:.4f}, the source has {report['source_perplexity']:.4f}",
        "KL from the source": f"{report['kl']:.4f} nats per token",
        "same most likely token": f"{report['top1_agreement']:.2%}",
    }


def _limits(recipe: Recipe, report: dict[str, Any], notes: list[str]) -> list[str]:
    found = [*notes, f"Measured in sequences of {recipe.sequence_length:,} tokens; longer contexts were not."]
    if not recipe.data:
        found.append(
            f"The text is {report['calibration_text']}, a narrow diet: for a general model calibrate on text like your "
            f"own (`--data`)."
        )
    if report["format"] in PORTABLE and recipe.to == "mla" and recipe.dtype != "float16":
        found.append(
            "Runs in bfloat16 and float32, with a cache in one of these: roped keys are too small for float16, and for "
            "fp8 without scales. For those convert with `--dtype float16`."
        )
    if recipe.to != "mla":
        found.append("Heads were averaged, nothing was trained afterwards: expect to train it before it is of use.")
    return found
