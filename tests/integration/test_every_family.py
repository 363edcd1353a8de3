"""``convert --keep 25%`` from end to end for every family: small random models, written, read again, generating.

``LATENTIZE_FAMILY_RESULTS=FILE`` keeps what became of each, for the support matrix (``benchmarks/family_table.py``).
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.common import FP32, SMALL, logits, printable_bytes, random_tokens, relative_error
from tests.models import FAMILIES, ONLY_MHA

import latentize
from latentize.errors import FormatError
from latentize.modeling.load import load_model
from latentize.runtime.cache import LatentCache

# What the portable format holds exactly, up to compression, or after a linear fit; the rest stays in its own form.
EXACT = ("ernie4_5", "granite", "llama", "mistral", "phi3", "smollm3")
# What DeepSeek-V2's layout holds: experts that a softmax over all of them chooses.
SOFTMAX = ("granitemoe", "mixtral", "olmoe", "qwen3_moe")
FITTED = ("glm", "glm4_moe", "hunyuan_v1_dense", "qwen2", "qwen3", "seed_oss")


@pytest.fixture(scope="module")
def results() -> Iterator[dict[str, dict[str, Any]]]:
    """What became of each family; written where the environment says."""
    found: dict[str, dict[str, Any]] = {}
    yield found
    if path := os.environ.get("LATENTIZE_FAMILY_RESULTS"):
        made = {"date": datetime.date.today().isoformat(), "families": found}
        Path(path).write_text(json.dumps(made, indent=1) + "\n")


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_compressed(
    source: Callable[..., Path], text: str, tmp_path: Path, family: str, results: dict[str, dict[str, Any]]
) -> None:
    """At full rank the native format is the source."""
    model, out = source(family, 4 if family in ONLY_MHA else 2), tmp_path / "out"
    options: dict[str, Any] = {"method": "mha2mla", "keep": "100%"}
    if family == "gemma4_text":
        # Keys are values, too, and MHA2MLA has no place for their norms.
        options["method"] = "calibrated"
    if family == "hunyuan_v1_dense":
        # It has none for norms after RoPE, either. All values, and all keys in one that rotates.
        options = {"method": "calibrated", "kv_lora_rank": 32, "qk_rope_head_dim": 32}
        text = str(tmp_path / "printable.txt")
        Path(text).write_text(printable_bytes())
    latentize.convert(model, out, format="native", data=(text,), **options, **SMALL)
    tokens = random_tokens()
    error = relative_error(logits(out, tokens), logits(model, tokens))
    results.setdefault(family, {})["native_error"] = error
    assert error <= FP32


@pytest.mark.parametrize("family", FAMILIES)
def test_a_quarter(
    source: Callable[..., Path], text: str, tmp_path: Path, family: str, results: dict[str, dict[str, Any]]
) -> None:
    """The format that fits, what it reports, and the same tokens with every cache."""
    kv_heads = 4 if family in ONLY_MHA else 2
    model, out = source(family, kv_heads), tmp_path / "out"
    report = latentize.convert(model, out, keep="25%", data=(text,), **SMALL)
    assert report["format"] == ("deepseek_v3" if family in (*EXACT, *FITTED) else "native")
    assert (report["linear_fit_excess_loss"] is not None) == (
        (report["setting"].get("linear", False) and report["format"] == "deepseek_v3") or _normalised(report)
    )
    assert 0.2 < report["keep"] <= 0.25
    verdict = latentize.verify(out)
    assert verdict["ok"], verdict["problems"]
    measured = latentize.evaluate(out, model, tokens=1024, sequence_length=64, data=(text,), split="heldout")
    assert report["kl"] > 1e-4, "there is something to measure"
    assert measured["kl"] == pytest.approx(report["kl"], rel=1e-2), "the files are what the converter ran"
    _generates_the_same(out)
    kinds = [layer["kept"] for layer in report["layers"] if "kept" in layer]
    results.setdefault(family, {}).update(format=report["format"], notes=report["notes"], kept=kinds)


def _normalised(report: dict[str, Any]) -> bool:
    return any("best linear fit" in note for note in report["notes"])


def _generates_the_same(out: Path) -> None:
    model, prompt = load_model(out), random_tokens(1, 40)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        expected = model.generate(prompt, **options)
        latent = model.generate(prompt, past_key_values=LatentCache(model.config), **options)
        assert latent.equal(expected)
        if any(entry is not None and entry.get("softcap") for entry in getattr(model.config, "latent_layers", [])):
            return
        fast = latentize.accelerate(model).generate(prompt, **options)
    assert fast.equal(expected)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in (*EXACT, *FITTED)])
def test_what_the_portable_format_cannot_hold(
    source: Callable[..., Path], text: str, tmp_path: Path, family: str, results: dict[str, dict[str, Any]]
) -> None:
    model = source(family, 4 if family in ONLY_MHA else 2)
    with pytest.raises(FormatError, match="cannot hold"):
        latentize.convert(model, tmp_path / "out", keep="25%", format="deepseek_v3", data=(text,), **SMALL)
    assert not list(tmp_path.iterdir())
    if family in SOFTMAX:
        # There the layers without experts are the first ones.
        model = source(family, 2, **{"mlp_only_layers": [0]} if family == "qwen3_moe" else {})
        report = latentize.convert(model, tmp_path / "out", keep="25%", format="deepseek_v2", data=(text,), **SMALL)
        results.setdefault(family, {})["deepseek_v2"] = report["notes"]
        return
    with pytest.raises(FormatError, match="cannot hold"):
        latentize.convert(model, tmp_path / "out", keep="25%", format="deepseek_v2", data=(text,), **SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["gemma2", "hunyuan_v1_dense", "lfm2", "mixtral", "olmo2"])
def test_refinement_gains(source: Callable[..., Path], text: str, tmp_path: Path, family: str) -> None:
    """Through norms after the attention, past layers that stay, and through experts."""
    # What random weights write is noise, there is nothing to learn from it.
    sizes = {"kv_lora_rank": 12, "qk_rope_head_dim": 4, "tokens": 4096, "self_generated": 0}
    options = {**SMALL, **sizes, "format": "native", "fast": False, "polish": False, "data": (text,)}
    report = latentize.convert(source(family, 2), tmp_path / "out", **options)
    converted = [layer for layer in report["layers"] if "kept" not in layer]
    assert len(report["layers"]) - len(converted) == (family in ("gemma2", "lfm2"))
    assert all(layer["error_after_refine"] < 0.9 * layer["error_before_refine"] for layer in converted)


def test_half_of_a_head_that_rotates(source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    """Phi-4-mini: one ladder over what rotates, in the portable format."""
    model, out = source("phi3", 2, partial_rotary_factor=0.5), tmp_path / "out"
    report = latentize.convert(model, out, keep="50%", data=(text,), **SMALL)
    assert report["format"] == "deepseek_v3"
    measured = latentize.evaluate(out, model, tokens=1024, sequence_length=64, data=(text,), split="heldout")
    assert measured["kl"] == pytest.approx(report["kl"], rel=1e-2)


def test_layers_that_stay_are_the_sources_own(source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    model, out = source("gemma3_text", 2), tmp_path / "out"
    latentize.convert(model, out, keep="25%", data=(text,), **SMALL)
    mine, theirs = load_model(out), load_model(model)
    of_mine, of_theirs = mine.source.model.layers[0].state_dict(), theirs.model.layers[0].state_dict()
    assert of_mine.keys() == of_theirs.keys()
    assert all(of_mine[name].equal(of_theirs[name]) for name in of_theirs)


def test_long_contexts_of_a_sliding_layer(source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    """Full rank, contexts longer than the window: masks of layers that stay are the source's."""
    model, out = source("gemma3_text", 2), tmp_path / "out"
    latentize.convert(model, out, method="mha2mla", keep="100%", format="native", data=(text,), **SMALL)
    tokens = random_tokens(1, 120)
    assert relative_error(logits(out, tokens), logits(model, tokens)) <= FP32
