"""Every method, in every format that can hold it, for every family: what is saved computes and caches what it says."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from tests.common import FP32, SMALL, STREAM, leftovers, logits, random_tokens
from tests.models import LLAMA3_SCALING

import latentize
from latentize.conversion import effort
from latentize.errors import CheckpointError, DataError, FormatError, LatentizeError, OptionError, OutputError
from latentize.errors import UnsupportedModelError as Unsupported
from latentize.modeling.load import load_model
from latentize.recipe import Selection
from latentize.text.documents import documents
from latentize.text.tokenizer import load_tokenizer
from latentize.text.tokens import pack
from latentize.training.polish import Polish
from latentize.training.refine import Refinement

MHA2MLA = [
    {"method": "mha2mla", "svd": svd, "selection": selection}
    for svd in ("joint", "split")
    for selection in get_args(Selection)
]
METHODS: list[dict[str, Any]] = [{"method": "calibrated"}, {"method": "transmla"}, {"method": "care"}, *MHA2MLA]


def cases() -> Iterator[tuple[str, int, dict[str, Any], str, str]]:
    """Family, kv heads, recipe, asked format, expected format."""
    for family in ("llama", "mistral", "qwen2"):
        for recipe in METHODS:
            # Only the calibrated method fits biases into projections without any.
            portable = recipe["method"] == "calibrated" or (recipe["method"] != "mha2mla" and family != "qwen2")
            yield family, 2, recipe, "auto", "deepseek_v3" if portable else "native"
    for recipe in METHODS:
        yield "llama", 4, recipe, "auto", "native" if recipe["method"] == "mha2mla" else "deepseek_v3"
    # With one kv head mha2mla makes one roped key, on a ladder if it takes every n-th frequency.
    for recipe in METHODS:
        ladder = recipe.get("selection", "uniform") == "uniform"
        yield "llama", 1, recipe, "auto", "deepseek_v3" if ladder else "native"
    for kv_heads in (1, 2, 4):
        yield "qwen3", kv_heads, {"method": "calibrated"}, "auto", "deepseek_v3"
    for family, kv_heads in (("qwen3", 1), ("qwen3", 2), ("olmo2", 4)):
        yield family, kv_heads, {"method": "calibrated"}, "native", "native"
    for method in ("calibrated", "transmla", "care"):
        yield "llama", 2, {"method": method}, "native", "native"
        yield "qwen2", 4, {"method": method}, "native", "native"
        yield "mistral", 1, {"method": method}, "deepseek_v3", "deepseek_v3"


def case_id(case: tuple[str, int, dict[str, Any], str, str]) -> str:
    family, kv_heads, recipe, asked, _ = case
    return f"{family}{kv_heads}-{'-'.join(recipe.values())}-{asked}"


LABOUR: dict[str, Any] = {**SMALL, "fast": False, "tokens": 4096}


@pytest.mark.parametrize(
    ("family", "form"), [("llama", "deepseek_v3"), ("llama", "native"), ("qwen2", "deepseek_v3"), ("qwen3", "native")]
)
def test_refinement_and_polish_lose_less(
    source: Callable[..., Path], text: str, tmp_path: Path, family: str, form: str
) -> None:
    """The default effort against the closed form, measured on the files; and what is reported is what they are."""
    model, kl = source(family, 2), {}
    for fast in (True, False):
        out = tmp_path / str(fast)
        # On half of the text what fits it alone costs about what it repairs.
        how = {**LABOUR, "fast": fast, "tokens": 8192}
        report = latentize.convert(model, out, keep="25%", format=form, data=(text,), **how)
        measured = quality_of_files(out, model, text)
        for name, value in measured.items():
            assert report[name] == pytest.approx(value, rel=STREAM), name
        kl[fast] = measured["kl"]
        assert latentize.verify(out)["ok"]
    assert kl[False] < 0.8 * kl[True]
    assert report["closed_form_excess_loss"] is not None
    last = report["layers"][-1]
    assert last["error_after_refine"] < last["error_before_refine"]
    assert report["notes"] == [] or "approximate" in report["notes"][0]


@pytest.mark.parametrize(
    ("options", "reach"),
    [({"method": "transmla"}, 64), ({"fast": True, "context": 100}, 100), ({"fast": True}, None)],
    ids=["published", "bounded", "default"],
)
def test_a_conversion_says_how_far_it_has_looked(
    options: dict, reach: int | None, source: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    report = latentize.convert(source(), tmp_path / "out", **{**SMALL, "fast": False, **options}, data=(text,))
    said = [note for note in report["notes"] if "distances" in note]
    assert len(said) == (reach is not None)
    assert reach is None or f"up to {reach} tokens, the model is made for 256" in said[0]


def test_the_same_seed_gives_the_same_bytes_after_refinement(
    source: Callable[..., Path], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A few steps show it as well as many.
    monkeypatch.setattr(effort, "Refinement", functools.partial(Refinement, steps=24))
    monkeypatch.setattr(effort, "Polish", functools.partial(Polish, steps=24))
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        latentize.convert(source("llama", 2), tmp_path / name, keep="50%", seed=seed, data=(text,), **LABOUR)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


@torch.no_grad()
def cached_values(folder: Path, new: int = 5) -> list[int]:
    """Values per token of each layer, counted in the tensors of the cache after ``generate``."""
    model, prompt = load_model(folder), random_tokens(1, 7)
    out = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
    )
    assert out.sequences.shape == (1, 7 + new)
    for layer in out.past_key_values.layers:
        assert layer.keys.shape[2] == layer.values.shape[2] == 7 + new - 1
    return [sum(t.numel() // t.shape[2] for t in (layer.keys, layer.values)) for layer in out.past_key_values.layers]


@torch.no_grad()
def quality_of_files(out: Path, model: Path, text: str) -> dict[str, float]:
    """Loss and KL of the two models as transformers runs them, on the held-out text, written out in float64."""
    rows = pack(load_tokenizer(model), documents((text,), "heldout"), tokens=1024, sequence_length=64)
    log_p, log_r = (logits(f, rows)[:, :-1].double().log_softmax(-1) for f in (out, model))
    target = rows[:, 1:, None]
    return {
        "perplexity": float((-log_p.gather(-1, target)).mean().exp()),
        "source_perplexity": float((-log_r.gather(-1, target)).mean().exp()),
        "kl": float((log_r.exp() * (log_r - log_p)).sum(-1).mean()),
    }


@pytest.mark.parametrize("case", list(cases()), ids=case_id)
def test_what_is_saved_computes_and_caches_what_it_says(
    source: Callable[..., Path], text: str, tmp_path: Path, case: tuple[str, int, dict[str, Any], str, str]
) -> None:
    family, kv_heads, recipe, asked, expected = case
    model, out = source(family, kv_heads, rms_norm_eps=1e-2), tmp_path / "out"
    report = latentize.convert(model, out, keep="50%", format=asked, data=(text,), **recipe, **SMALL)
    assert report["format"] == expected
    heads = report["setting"]["rope_heads"]
    factors = report["setting"].get("key_scales", 0)
    caches = [layer["kv_lora_rank"] + heads * layer["qk_rope_head_dim"] + factors for layer in report["layers"]]
    assert cached_values(out) == caches
    cache = sum(caches) / len(caches)
    assert report["cache_values_per_token_layer"] == cache <= kv_heads * 16
    assert report["kv_lora_rank"] + heads * report["qk_rope_head_dim"] + factors == cache
    # One norm of the keys of all heads, or one a head.
    norms = {"qwen3": kv_heads, "olmo2": 1}.get(family, 0)
    assert factors == (norms if expected == "native" else 0)
    assert len(set(caches)) == 1 or expected == "native", "a portable checkpoint has one size for all layers"
    verdict = latentize.verify(out)
    assert verdict["absorbed_error"] <= FP32
    assert verdict["decode_error"] <= FP32
    assert verdict["cache_values_per_token_layer"] == cache
    # What was measured in streams, layer by layer, is what the files compute.
    for name, value in quality_of_files(out, model, text).items():
        assert report[name] == pytest.approx(value, rel=STREAM), name
    fits = expected == "deepseek_v3" and family in ("qwen2", "qwen3")
    assert (report["linear_fit_excess_loss"] is not None) == fits, "what was replaced is measured by itself"
    assert any("linear fit alone" in note for note in report["notes"]) == fits
    assert report["kl"] > 1e-3, "the conversion loses something that can be compared"


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("llama", {"method": "transmla", "keep": "50%"}),
        ("qwen2", {"method": "mha2mla", "keep": "50%"}),
        ("mistral", {"method": "care", "keep": "25%"}),
        ("qwen3", {"to": "mqa"}),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(v.values()),
)
def test_quality_measured_in_streams_includes_bf16(
    source: Callable[..., Path], text: str, tmp_path: Path, family: str, recipe: dict[str, Any]
) -> None:
    """The default precision: new weights are rounded before they are measured."""
    model, out = source(family, 2, stored=torch.bfloat16), tmp_path / "out"
    report = latentize.convert(model, out, data=(text,), **{**SMALL, "dtype": "bfloat16", **recipe})
    for name, value in quality_of_files(out, model, text).items():
        assert report[name] == pytest.approx(value, rel=STREAM), name


def test_large_models_multiply_in_bf16(
    source: Callable[..., Path], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From some size on layers run in bf16: the numbers are near those of float32, the weights nearly the same. Where
    that is slower they do not."""
    from latentize.modeling import source as module

    model, recipe = source("llama", 2), {"method": "transmla", "keep": "50%", "freqfold": 4}
    reports = []
    for limit, faster in ((module._LARGE, False), (0, False), (0, True)):
        monkeypatch.setattr(module, "_LARGE", limit)
        monkeypatch.setattr(module, "multiplies_bfloat16", lambda _, faster=faster: faster)
        out = tmp_path / f"{limit} {faster}"
        reports.append(latentize.convert(model, out, data=(text,), **recipe, **SMALL))
        assert latentize.verify(out)["ok"]
    exact, emulated, rough = reports
    assert emulated["kl"] == exact["kl"] != rough["kl"]
    assert rough["kl"] == pytest.approx(exact["kl"], rel=0.1)
    assert rough["source_perplexity"] == pytest.approx(exact["source_perplexity"], rel=0.02)


def test_evaluate_measures_the_same(source: Callable[..., Path], tmp_path: Path) -> None:
    """``latentize eval`` on the held-out part of the default text gives the numbers that ``convert`` reported."""
    model, out = source("llama", 2), tmp_path / "out"
    report = latentize.convert(model, out, keep="50%", method="transmla", freqfold=8, **SMALL)
    measured = latentize.evaluate(out, model, tokens=1024, sequence_length=64)
    assert measured["tokens"] == report["evaluation_tokens"] == 16 * 63
    assert measured["perplexity"] == pytest.approx(report["perplexity"], rel=STREAM)
    assert measured["reference_perplexity"] == pytest.approx(report["source_perplexity"], rel=STREAM)
    assert measured["kl"] == pytest.approx(report["kl"], rel=STREAM)
    assert measured["top1_agreement"] == pytest.approx(report["top1_agreement"], abs=2 / 1008)


REFUSED: list[tuple[str, str, int, dict[str, Any], dict[str, Any], type[LatentizeError]]] = [
    ("qwen2 portable", "qwen2", 2, {}, {"format": "deepseek_v3", "method": "transmla"}, FormatError),
    (
        "llama3 portable",
        "llama",
        2,
        {"rope_parameters": LLAMA3_SCALING},
        {"format": "deepseek_v3", "method": "care"},
        FormatError,
    ),
    ("mha2mla portable", "llama", 2, {}, {"format": "deepseek_v3", "method": "mha2mla"}, FormatError),
    ("qwen3 compressed", "qwen3", 2, {}, {"method": "transmla"}, Unsupported),
    ("qwen3 compressed per head", "qwen3", 2, {}, {"method": "mha2mla", "keep": "50%"}, Unsupported),
    ("norms after RoPE, whole keys", "hunyuan_v1_dense", 2, {}, {"method": "mha2mla", "keep": "100%"}, Unsupported),
    ("norms after RoPE in codes", "hunyuan_v1_dense", 2, {}, {"bytes": "25%"}, OptionError),
    ("norms after RoPE, pooled", "hunyuan_v1_dense", 2, {}, {"to": "mqa"}, FormatError),
    ("too little budget", "llama", 2, {}, {"keep": "2%"}, OptionError),
    ("too large a latent", "llama", 2, {}, {"kv_lora_rank": 64, "qk_rope_head_dim": 16}, OptionError),
    ("nothing to pool", "llama", 1, {}, {"to": "mqa"}, OptionError),
    ("an unknown entry", "llama", 2, {}, {"kv_rank": 3}, OptionError),
    ("too little text", "llama", 2, {}, {"sequence_length": 1_000_000}, DataError),
    ("no text", "llama", 2, {}, {"data": ("nowhere.txt",)}, DataError),
    ("an embedding too small", "llama", 2, {"vocab_size": 100}, {}, CheckpointError),
]


@pytest.mark.parametrize(
    ("family", "kv_heads", "config", "recipe", "error"), [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED]
)
def test_what_cannot_be_done_is_refused_and_leaves_nothing(
    source: Callable[..., Path],
    text: str,
    tmp_path: Path,
    family: str,
    kv_heads: int,
    config: dict[str, Any],
    recipe: dict[str, Any],
    error: type[LatentizeError],
) -> None:
    model, out = source(family, kv_heads, **config), tmp_path / "out"
    with pytest.raises(error) as caught:
        latentize.convert(model, out, **{**SMALL, "data": (text,), **recipe})
    assert caught.value.code in str(caught.value)
    assert leftovers(tmp_path, out) == []


def test_one_roped_key_off_the_ladder_is_refused_by_the_portable_format(
    source: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    """With one kv head the first candidate ropes the whole head, which is a ladder; the others are not."""
    model, out = source("llama", 1), tmp_path / "out"
    with pytest.raises(FormatError, match="ladder"):
        latentize.convert(model, out, method="mha2mla", keep="75%", format="deepseek_v3", data=(text,), **SMALL)
    assert leftovers(tmp_path, out) == []


def test_damage_that_shows_half_way_leaves_nothing(source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    """Weights are read layer by layer, so the last layer's NaN is found after the first layer was converted."""
    import shutil

    from safetensors.torch import load_file, save_file

    model, out = Path(shutil.copytree(source("llama", 2), tmp_path / "model")), tmp_path / "out"
    tensors = load_file(str(model / "model.safetensors"))
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, str(model / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        latentize.convert(model, out, data=(text,), **SMALL)
    assert leftovers(tmp_path, out) == []


def test_the_source_and_what_exists_are_not_written_to(source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    model = source("llama", 2)
    before = {p.name: p.read_bytes() for p in model.iterdir()}
    with pytest.raises(OutputError):
        latentize.convert(model, model, data=(text,), **SMALL)
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError):
        latentize.convert(model, tmp_path / "out", data=(text,), **SMALL)
    assert list((tmp_path / "out").iterdir()) == []
    assert {p.name: p.read_bytes() for p in model.iterdir()} == before


def test_no_tokenizer_is_said(source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    import shutil

    model = Path(shutil.copytree(source("llama", 2), tmp_path / "model"))
    for path in model.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        latentize.convert(model, tmp_path / "out", data=(text,), **SMALL)
    assert leftovers(tmp_path, tmp_path / "out") == []


@pytest.mark.parametrize("damage", ["flip", "missing", "manifest"])
def test_verify_finds_damage(source: Callable[..., Path], text: str, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "out"
    latentize.convert(source("llama", 2), out, method="transmla", freqfold=8, data=(text,), **SMALL)
    weights = out / "model.safetensors"
    if damage == "flip":
        raw = bytearray(weights.read_bytes())
        raw[-100] ^= 1
        weights.write_bytes(raw)
    elif damage == "missing":
        (out / "tokenizer.json").unlink()
    else:
        manifest = json.loads((out / "latentize.json").read_text())
        manifest["measurements"]["cache_values_per_token_layer"] += 1
        (out / "latentize.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError) as caught:
        latentize.verify(out)
    word = {"flip": "model.safetensors", "missing": "tokenizer.json", "manifest": "values per token"}[damage]
    assert word in str(caught.value)


def test_layers_get_what_they_need(source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    """No value would be worth more in another layer; the sum is that of equal shares. Explicit sizes are for all."""
    from latentize.conversion.allocate import price

    model, options = source("llama", 2), {"format": "native", "data": (text,), **SMALL}
    report = latentize.convert(model, tmp_path / "out", keep="50%", **options)
    prices = [price(found["selection_kl_by_rank"]) for found in report["candidates"]]
    ranks = [layer["kv_lora_rank"] for layer in report["layers"]]
    assert sum(layer["kv_lora_rank"] + layer["qk_rope_head_dim"] for layer in report["layers"]) == 2 * 32
    kept = sum(at(rank) for at, rank in zip(prices, ranks, strict=True))
    for step in (1, -1):
        moved = [ranks[0] + step, ranks[1] - step]
        assert kept <= sum(at(rank) for at, rank in zip(prices, moved, strict=True)) + 1e-6
    fixed = latentize.convert(model, tmp_path / "fixed", kv_lora_rank=20, qk_rope_head_dim=4, **options)
    assert [layer["kv_lora_rank"] for layer in fixed["layers"]] == [20, 20]
    assert fixed["kv_lora_rank"] == 20
