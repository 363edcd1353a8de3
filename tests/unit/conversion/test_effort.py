"""Training is as much as its work allows, and steps of a whole model as large as its size does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from latentize.conversion.effort import effort_of
from latentize.conversion.pipeline import Effort
from latentize.families import ModelSpec
from latentize.planning.reading import read_spec
from latentize.recipe import Recipe
from latentize.training.polish import Polish

BUNDLED = str(Path(__file__).parents[3] / "models" / "tiny-llama-gqa")


def effort(model: str, *, large: bool = False, **entries: Any) -> Effort:
    spec = read_spec(model)
    assert isinstance(spec, ModelSpec)
    return effort_of(Recipe.build(**{"keep": "50%", **entries}), spec, large=large)


def polish(model: str, **entries: Any) -> Polish | None:
    return effort(model, polish=True, **entries).polish


def test_the_more_parameters_the_smaller_and_fewer_the_steps_of_a_polish() -> None:
    small, large, larger = (polish(model) for model in (BUNDLED, "llama-2-7b", "llama-3-8b"))
    assert small is not None and large is not None and larger is not None
    assert small.rate == Polish().rate, "of the bundled model's size it was chosen for"
    # 6.74 and 8.03 billion parameters.
    assert large.rate / larger.rate == pytest.approx(8.03 / 6.74, rel=0.002)
    assert larger.rate == pytest.approx(0.014 * 7e6 / 8.03e9, rel=0.002)
    assert small.steps == Polish().steps > large.steps


def test_a_step_of_longer_sequences_is_larger() -> None:
    short, long = polish("llama-3-8b"), polish("llama-3-8b", sequence_length=2048)
    assert short is not None and long is not None
    assert long.tokens == 2 * short.tokens and long.rate == pytest.approx(2**0.5 * short.rate)


def test_what_is_not_refined_is_not_polished_nor_what_is_large() -> None:
    assert effort(BUNDLED, fast=True) == Effort()
    assert effort("llama-3-8b", large=True).polish is None
    assert effort("llama-3-8b", large=True, polish=True).polish is not None
