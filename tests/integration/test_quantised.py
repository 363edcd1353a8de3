"""The bundled model, converted and quantised: what ``benchmarks/quantised_checkpoint.py`` has in its table."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import latentize
from latentize.text.documents import documents
from latentize.text.tokenizer import load_tokenizer
from latentize.text.tokens import pack

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "tiny-llama-gqa"
KINDS = (
    *("fp8 by tensor", "fp8 by 128 x 128", "fp8 by channel"),
    *("int8 by tensor", "int8 by channel", "nf4", "q8_0", "q4_K"),
)
# What conversion costs above the source may grow by so much when both are quantised.
GROWS = 1.2
# Times what the source's own predictions move, as KL: keys and values come of two matrices, the source's of one.
MOVES = 2.5


@pytest.fixture(scope="module")
def bench() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import quantised_checkpoint

        return quantised_checkpoint


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "out"
    latentize.convert(MODEL, out, keep="50%", format="deepseek_v3", fast=True, tokens=16_384)
    return out


@pytest.fixture(scope="module")
def found(bench: Any, portable: Path) -> Callable[[str, str], dict[str, dict[str, float]]]:
    tokens_NT = pack(load_tokenizer(MODEL), documents((), "heldout"), tokens=4096, sequence_length=512).long()

    @cache
    def model(name: str, exported: bool) -> Any:
        made = bench.stock(MODEL if name == "source" else portable)
        return bench.as_exported(made) if exported else made

    @cache
    def exact(name: str, exported: bool) -> Tensor:
        return bench.log_probabilities(model(name, exported), tokens_NT)

    @cache
    def rows(name: str, kind: str) -> dict[str, dict[str, float]]:
        exported = kind in bench.OF_GGUF
        return bench.rows(model(name, exported), tokens_NT, (kind,), exact(name, exported))

    return rows


def test_every_kind_is_tried(bench: Any) -> None:
    assert tuple(bench.QUANTISATIONS) == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_quantising_costs_little_more_than_it_costs_the_source(
    found: Callable[[str, str], dict[str, dict[str, float]]], kind: str
) -> None:
    source, portable = found("source", kind), found("portable", kind)
    excess = portable["none"]["loss"] - source["none"]["loss"]
    assert 0.05 < excess < 0.5, "the conversion itself"
    assert portable[kind]["loss"] - source[kind]["loss"] <= GROWS * excess
    assert portable[kind]["kl"] <= MOVES * source[kind]["kl"]


def test_a_shared_scale_tells_a_checkpoint_that_is_not_balanced(bench: Any, portable: Path) -> None:
    """The same weights with the factors taken out: what makes them fit to be quantised is the factors alone."""
    tokens_NT = pack(load_tokenizer(MODEL), documents((), "heldout"), tokens=512, sequence_length=256).long()
    rows = bench.rows(bench.as_exported(bench.stock(portable)), tokens_NT, ("fp8 by tensor", "int8 by tensor"))
    assert all(rows[kind]["loss"] > rows["none"]["loss"] + 3 for kind in ("fp8 by tensor", "int8 by tensor"))


@pytest.mark.parametrize("kind", KINDS)
def test_quantisers_round_to_few_values(bench: Any, kind: str) -> None:
    """And near to what was there: relative to each block, no more than half a step."""
    w = torch.randn(96, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 96)[:, None]
    got = bench.QUANTISATIONS[kind](w)
    error = float((got - w).norm() / w.norm())
    low, high = {"fp8": (0.01, 0.05), "int8": (1e-3, 0.05), "nf4": (0.05, 0.12), "q8_0": (1e-3, 0.01)}.get(
        kind.split(" by ")[0], (0.04, 0.12)
    )
    assert low < error < high
    assert torch.isfinite(got).all() and got.shape == w.shape
