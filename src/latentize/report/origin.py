"""The end of the report: what it does not say, and where all of it came from."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from latentize.checkpoint import MANIFEST_NAME, Manifest
from latentize.report.html import table
from latentize.report.measurements import calibration_text

__all__ = ["limits", "origin"]


def limits(manifest: Manifest) -> str:
    """What was approximated, and what was not measured."""
    m, recipe = manifest.measurements, manifest.recipe
    notes = [
        *manifest.notes,
        f"The conversion was measured in sequences of {recipe['sequence_length']:,} tokens; longer contexts were not "
        f"(latentize eval --sequence-length).",
        "Measured on text of one kind. Calibrate and evaluate on text like your own (--data).",
    ]
    if m["format"] == "native":
        notes.append("Native format: it loads after `import latentize`; other engines do not know it.")
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f"<h2>Approximations and limits</h2><ul>{items}</ul>"


def _proof(error: float | None) -> dict[str, str]:
    """How far the source as it was read is from transformers' own model; outputs of old do not say."""
    return (
        {} if error is None else {"read as transformers reads it": f"every layer, to a relative error of {error:.0e}"}
    )


def _quantization(found: Mapping[str, Any] | None) -> dict[str, str]:
    if found is None:
        return {}
    tensors = ", ".join(f"{count} × {kind}" for kind, count in found["tensors"].items())
    kind = f"GGUF, {found['file_type']}" if found["format"] == "gguf" else found["file_type"]
    said = f"{kind} ({tensors}), dequantised by {found['dequantised_by']}"
    return {"weights of the source": said}


def origin(manifest: Manifest) -> str:
    """How it was made: source, method, recipe, files."""
    m, source = manifest.measurements, manifest.source
    heads = source["num_attention_heads"]
    if source["attention"] == "MLA":
        heads = f"{heads} heads, latents of {source['kv_lora_rank']}"
    else:
        heads = f"{heads} query and {source['num_key_value_heads']} kv heads of {source['head_dim']}"
    done = {
        "source": f"{source['model']} ({source['model_type']})",
        "attention": f"{source['attention']}: {heads}, {source['layers']} layers",
        **_quantization(source.get("quantization")),
        "method, format": f"{m['method']}, {m['format']}",
        "calibration": calibration_text(m),
        **_proof(m.get("reading_error")),
        **{f"version of {name}": version for name, version in manifest.versions.items()},
    }
    if m["to"] == "mla":
        done["latent + roped key"] = (
            f"{m['kv_lora_rank']:g} + {m['qk_rope_head_dim']:g}, rope_theta {m['rope_theta']:g}"
        )
    hashes = table([(name, digest) for name, digest in manifest.files.items()], head=("file", "SHA-256"))
    recipe = table([(name, value) for name, value in manifest.recipe.items() if value not in (None, [], ())])
    return (
        f"<h2>How it was made</h2>{table(done.items())}"
        f"<details><summary>Recipe</summary>{recipe}</details>"
        f"<details><summary>Files</summary>{hashes}</details>"
        f"<p class=dim>All of this is in <code>{MANIFEST_NAME}</code>; <code>latentize verify</code> holds the files "
        f"against it, <code>latentize convert MODEL OUT --recipe {MANIFEST_NAME}</code> does it again.</p>"
    )
