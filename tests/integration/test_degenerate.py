"""Attention that has nothing to say: zero, pruned and duplicated heads, inputs that are zero or always the same.

Their conversion is cheap, and exact where the budget allows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.common import SMALL, call_cli
from tests.models import byte_tokenizer, pico_model

import latentize
from latentize.evaluation.verify import verify

HEAD = slice(0, 16)
Damage = Callable[[Any], None]


def zeros(*projections: str, rows: slice = slice(None)) -> Damage:
    """Rows of a layer's projections; of the output projection, columns."""

    def damage(layer: Any) -> None:
        for name in projections:
            weight = getattr(layer.self_attn, f"{name}_proj").weight.data
            (weight.T if name == "o" else weight)[rows] = 0

    return damage


def duplicated(layer: Any) -> None:
    for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
        projection.weight.data[16:32] = projection.weight.data[:16]


def pruned(layer: Any) -> None:
    """A kv head with its two query heads; what is left of it is not zero, but nothing reads it."""
    zeros("o", rows=slice(0, 32))(layer)


def no_input(layer: Any) -> None:
    layer.input_layernorm.weight.data.zero_()


WAYS: dict[str, dict[str, Any]] = {
    "native": {"format": "native"},
    "deepseek_v3": {"format": "deepseek_v3"},
    "transmla": {"method": "transmla"},
    "mha2mla": {"method": "mha2mla"},
    "care": {"method": "care"},
    "gqa": {"to": "gqa"},
}
ALL = tuple(WAYS)
# Of every layer: the damage, and the ways in which half of the cache is enough to compute the same.
EXACT: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "no values": (zeros("v"), ALL),
    "no keys, no values": (zeros("k", "v"), ALL),
    "no output": (zeros("o"), ("native", "transmla", "gqa")),
    "no input": (no_input, ALL),
    "no keys": (zeros("k"), ("native",)),
    "no queries": (zeros("q"), ("native",)),
    "a pruned head": (pruned, ("native", "gqa")),
    "a head without keys and values": (zeros("k", "v", rows=HEAD), ("native", "gqa")),
    "equal heads": (duplicated, ("native", "deepseek_v3", "transmla", "care", "gqa")),
}


def saved(folder: Path, damage: Damage, layers: slice = slice(None), family: str = "llama") -> Path:
    model = pico_model(family)
    for layer in model.model.layers[layers]:
        damage(layer)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def converted(source: Path, out: Path, text: str, **options: Any) -> dict[str, Any]:
    few = {"tokens": 1024, "evaluation_tokens": 512, "keep": 0.5}
    report = latentize.convert(source, out, **{**SMALL, **few, "data": (text,), **options})
    assert verify(out).problems == []
    return report


@pytest.fixture(scope="module")
def loss_of_whole_layers(tmp_path_factory: pytest.TempPathFactory, text: str) -> Callable[[str], float]:
    """KL of a conversion of a model that has nothing odd."""
    folder = tmp_path_factory.mktemp("whole")
    source = saved(folder / "source", lambda layer: None)
    return functools.cache(lambda way: converted(source, folder / way, text, **WAYS[way])["kl"])


@pytest.mark.parametrize("kind", EXACT)
def test_what_fits_is_exact(kind: str, tmp_path: Path, text: str) -> None:
    damage, exact = EXACT[kind]
    source = saved(tmp_path / "source", damage)
    for way in exact:
        report = converted(source, tmp_path / way, text, **WAYS[way])
        assert abs(report["kl"]) < 1e-7, way
        assert report["keep"] <= 0.5


@pytest.fixture(params=[False, True], ids=["float32", "bfloat16"])
def narrow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Text is followed in bfloat16, as where the machine multiplies that faster, or it is not."""
    monkeypatch.setattr("latentize.modeling.source.multiplies_bfloat16", lambda kind: request.param)
    return request.param


@pytest.mark.usefixtures("narrow")
def test_a_layer_keeps_the_values_that_make_it_exact(tmp_path: Path, text: str) -> None:
    """The second needs all of its values, the first those that the few tokens of the text span."""
    source = saved(tmp_path / "source", zeros("k"))
    report = converted(source, tmp_path / "out", text, format="native")
    ranks = [layer["kv_lora_rank"] for layer in report["layers"]]
    assert ranks[0] >= 16
    assert ranks[1] >= 32
    assert abs(report["kl"]) < 1e-7


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("way", ["native", "deepseek_v3"])
def test_refinement_leaves_what_is_exact(way: str, tmp_path: Path, text: str) -> None:
    """What bfloat16 rounds is no error that steps could repair."""
    source = saved(tmp_path / "source", duplicated)
    options = {**WAYS[way], "fast": False, "keep": None, "kv_lora_rank": 16, "qk_rope_head_dim": 16}
    report = converted(source, tmp_path / "out", text, **options)
    assert abs(report["kl"]) < 1e-7


@pytest.mark.parametrize("way", ALL)
@pytest.mark.parametrize("projection", ["k", "v"])
def test_a_layer_of_nothing_beside_one_that_is_whole(
    projection: str, way: str, tmp_path: Path, text: str, loss_of_whole_layers: Callable[[str], float]
) -> None:
    """No worse than the same conversion of a model whose layers are both whole."""
    hurt = converted(saved(tmp_path / "hurt", zeros(projection), slice(1)), tmp_path / "a", text, **WAYS[way])
    assert 0 < hurt["kl"] < loss_of_whole_layers(way)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "olmo2", "granite"])
@pytest.mark.parametrize("kind", ["no values", "no output"])
def test_biases_and_norms_beside_zeros(family: str, kind: str, tmp_path: Path, text: str) -> None:
    source = saved(tmp_path / "source", EXACT[kind][0], family=family)
    report = converted(source, tmp_path / "out", text, format="native")
    # Qwen 2 has biases on its values, and adds a constant.
    assert abs(report["kl"]) < 1e-6


def test_refinement_and_polish_of_nothing(tmp_path: Path, text: str) -> None:
    source = saved(tmp_path / "source", zeros("k", "v"), slice(1))
    report = converted(source, tmp_path / "out", text, fast=False, polish=False, format="deepseek_v3")
    assert 0 <= report["layers"][0]["error_after_refine"] < 1e-6
    assert report["kl"] < 0.5


def test_live_layers_get_what_dead_ones_do_not_need(tmp_path: Path, text: str) -> None:
    """Half of a layer fits into fewer values than an equal share: the price of less is known, not rounding."""
    source = saved(tmp_path / "source", pruned, slice(1))
    report = converted(source, tmp_path / "out", text, format="native")
    ranks = [layer["kv_lora_rank"] for layer in report["layers"]]
    assert ranks[0] < ranks[1]
    assert report["layers"][0]["error_after_refine"] < 0.01


@pytest.mark.parametrize(
    ("options", "advised", "not_advised"),
    [
        ((), "--fast, or another --method", "--to"),
        (("--fast",), "another --method", "--fast"),
        (("--to", "gqa", "--keep", "50%"), "--to mla", "--method"),
    ],
)
def test_advice_is_not_what_was_given(
    options: tuple[str, ...],
    advised: str,
    not_advised: str,
    tmp_path: Path,
    text: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def overflow(*_: Any, **__: Any) -> None:
        raise OverflowError("too large")

    for job in ("conversion.latent.LatentJob", "conversion.pooled.PooledJob"):
        monkeypatch.setattr(f"latentize.{job}.convert", overflow)
    source = saved(tmp_path / "source", lambda layer: None)
    few = ("--tokens", 1024, "--sequence-length", 64, "--data", text, *options)
    outcome = call_cli(capsys, "convert", source, tmp_path / "out", *few)
    assert outcome.returncode == 2
    assert "LZ601" in outcome.stderr
    assert advised in outcome.stderr
    assert not_advised not in outcome.stderr
