"""Several models beside their source: bytes by hand, losses as eval finds them, and who dominates whom."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.common import SMALL, random_tokens, relative_error

from latentize.api import compare, convert, evaluate
from latentize.errors import DataError, OptionError
from latentize.evaluation import quantized as module
from latentize.evaluation.compare import Compared, marked, names_of
from latentize.evaluation.quantized import Quantized, quantized
from latentize.modeling.load import load_model
from latentize.report.pareto import pareto_chart

MEASURED: dict[str, Any] = {"tokens": 512, "sequence_length": 64}


@pytest.fixture(scope="module")
def models(source: Callable[..., Path], text: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, model = tmp_path_factory.mktemp("compare"), source("llama", 2)
    options: dict[str, Any] = {**SMALL, "data": (text,)}
    convert(model, folder / "half", kv_lora_rank=24, qk_rope_head_dim=8, **options)
    convert(model, folder / "native", keep="50%", method="mha2mla", **options)
    convert(model, folder / "mqa", to="mqa", **options)
    return {"source": model, **{name: folder / name for name in ("half", "native", "mqa")}}


def row(name: str, size: float, loss: float) -> Compared:
    return Compared(name, name, None, None, size, excess_loss=loss)


def test_who_dominates_whom() -> None:
    rows = [
        row("source", 10, 0.0),
        row("a", 5, 0.1),
        row("b", 5, 0.2),
        row("c", 6, 0.1),
        row("d", 2, 0.3),
        row("e", 2, 0.3),
    ]
    assert [r.dominated_by for r in marked(rows)] == [None, None, "a", "a", None, None]
    assert marked([*rows, row("better", 2, -0.01)])[0].dominated_by == "better", "the source can be beaten, too"


def test_names_that_tell_apart() -> None:
    assert names_of(["out/a", "out/b/"]) == ["a", "b"]
    assert names_of(["x/out", "y/out", "z"]) == ["x/out", "y/out", "z"]


def test_bytes_by_hand_and_losses_as_eval_finds_them(models: dict[str, Path], text: str) -> None:
    chosen = [str(models[name]) for name in ("half", "mqa")]
    result = compare(
        models["source"], chosen, cache=("int8", "int4"), window=20, source_windows=(10,), data=(text,), **MEASURED
    )
    rows = {r["name"]: r for r in result["rows"]}
    # Two layers. GQA of two heads of 16; a latent of 24 and a roped key of 8; a scale of two bytes for either.
    kept = {"half": 2 * 32 * 2, "half, int8": 2 * (24 + 2 + 8 + 2), "half, int4": 2 * (12 + 2 + 8 + 2)}
    # Keys and values alike, a scale for all heads of either.
    kept |= {"mqa": 2 * 32 * 2, "mqa, int8": 2 * 2 * (16 + 2), "mqa, int4": 2 * 2 * (8 + 2)}
    kept |= {"the source": 2 * 64 * 2, "the source, int8": 2 * 2 * (32 + 2), "the source, int4": 2 * 2 * (16 + 2)}
    expected = {**kept, "the source, window 10": 2 * 64 * 2 * 14 / 64}
    # 20 tokens and the first four, of 64.
    expected |= {f"{name}, window 20": size * 24 / 64 for name, size in kept.items()}
    assert {name: r["cache_bytes_per_token"] for name, r in rows.items()} == pytest.approx(expected)
    assert rows["half, int8"]["cache_share"] == pytest.approx(72 / 256)
    assert (rows["the source"]["excess_loss"], rows["the source"]["kl"]) == (0, 0)
    assert result["tokens"] == 8 * 63
    for name, options in (
        ("half", {}),
        ("half, int4", {"cache": "int4"}),
        ("half, int8, window 20", {"cache": "int8", "window": 20}),
    ):
        alone = evaluate(models["half"], models["source"], data=(text,), **MEASURED, **options)
        for key in ("perplexity", "excess_loss", "kl", "top1_agreement"):
            assert rows[name][key] == pytest.approx(alone[key], rel=1e-4, abs=1e-6), (name, key)
    assert rows["half, window 20"]["kl"] > rows["half"]["kl"]
    assert rows["mqa, int8"]["kl"] == pytest.approx(rows["mqa"]["kl"], rel=0.05), "eight bits are nearly exact"
    assert 0 < rows["the source, int8"]["kl"] < rows["the source, int4"]["kl"] < rows["mqa"]["kl"]
    assert 0 < rows["the source, window 20"]["kl"] < rows["the source, window 10"]["kl"]


def test_a_roped_key_for_each_head_is_counted(models: dict[str, Path], text: str) -> None:
    result = compare(models["source"], [str(models["native"])], cache=("int8",), data=(text,), **MEASURED)
    config = load_model(models["native"]).config
    sizes = [(e["kv_lora_rank"], e["rope_heads"] * e["qk_rope_head_dim"]) for e in config.latent_layers]
    rows = {r["name"]: r for r in result["rows"]}
    assert rows["native"]["cache_bytes_per_token"] == sum(2 * (r + k) for r, k in sizes)
    assert rows["native, int8"]["cache_bytes_per_token"] == sum(r + 2 + k + 2 for r, k in sizes)


def test_the_source_with_transformers_own_cache(models: dict[str, Path], text: str) -> None:
    """fp8 needs nothing more; what is not installed is left out, and said."""
    model = load_model(models["source"])
    found = quantized(model, "fp8", 32)
    assert isinstance(found, Quantized)
    tokens = random_tokens(2, 80)
    exact = model(input_ids=tokens, use_cache=False).logits
    near = found.predict(tokens, 0)
    assert 1e-5 < relative_error(near, exact) < 0.2
    assert relative_error(near[:, :32], exact[:, :32]) < 1e-5, "the first chunk sees itself as it was"
    assert torch.equal(found.predict(tokens, 3), near[:, -3:])
    result = compare(models["source"], [str(models["half"])], cache=("fp8",), data=(text,), **MEASURED)
    (row,) = (r for r in result["rows"] if r["name"] == "the source, transformers fp8")
    assert row["cache_bytes_per_token"] == 2 * 64
    assert row["kl"] > 0


@pytest.mark.parametrize("latent", ["int8", "int4"])
def test_a_backend_that_is_not_installed(
    models: dict[str, Path], text: str, monkeypatch: pytest.MonkeyPatch, latent: str
) -> None:
    monkeypatch.setattr(module, "is_hqq_available", lambda: False)
    monkeypatch.setattr(module, "is_optimum_quanto_available", lambda: False)
    result = compare(models["source"], [str(models["half"])], cache=(latent,), data=(text,), **MEASURED)
    names = [r["name"] for r in result["rows"]]
    assert names == ["the source", f"the source, {latent}", "half", f"half, {latent}"]
    assert len(result["notes"]) == 1 and "hqq, not installed" in result["notes"][0]


@pytest.mark.parametrize(("package", "latent", "bits"), [("optimum.quanto", "int4", 4.5), ("hqq", "int8", 8.5)])
def test_a_backend_that_is_installed(models: dict[str, Path], package: str, latent: str, bits: float) -> None:
    pytest.importorskip(package)
    model = load_model(models["source"])
    found = quantized(model, latent, 64)
    assert isinstance(found, Quantized) and found.bits == bits
    tokens = random_tokens(1, 96)
    exact = model(input_ids=tokens, use_cache=False).logits
    assert 1e-5 < relative_error(found.predict(tokens, 0), exact) < 0.5


def test_a_model_of_another_vocabulary(models: dict[str, Path], source: Callable[..., Path], text: str) -> None:
    other = source("llama", 2, vocab_size=300)
    with pytest.raises(DataError, match="different vocabularies"):
        compare(models["source"], [str(other)], data=(text,), **MEASURED)


def test_an_unknown_format_is_refused_before_anything_is_loaded(models: dict[str, Path]) -> None:
    with pytest.raises(OptionError, match="int3"):
        compare(models["source"], [str(models["half"])], cache=("int3",))


def test_the_chart_has_a_point_for_each_and_a_line_for_the_best() -> None:
    rows = marked([row("source", 1536, 0.0), row("a<b", 768, 0.01), row("c", 800, 0.1), row("d", 400, 0.5)])
    drawn = pareto_chart([vars(r) for r in rows])
    assert drawn.startswith("<svg") and "a&lt;b" in drawn
    assert len(re.findall("<circle", drawn)) == 2 * 4
    (path,) = re.findall(r'points="([^"]+)"', drawn)
    assert len(path.split()) == 3, "one is dominated"
    assert drawn.count('fill="none" stroke="#') == 2
    places = [tuple(map(float, p.split(","))) for p in path.split()]
    assert places == sorted(places) and [y for _, y in places] == sorted(y for _, y in places)


def test_points_in_one_place_share_a_label() -> None:
    drawn = pareto_chart([vars(r) for r in [row("a", 100, 0.1), row("b", 100.1, 0.1), row("c", 1000, 0.1)]])
    assert ">1 2<" in drawn and ">3<" in drawn
