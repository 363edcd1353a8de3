"""Training is as much as its work allows, and steps of a whole model as large as its size does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from latentize.convert.polish import Polish
from latentize.inspection import read_spec
from latentize.jobs.effort import effort_of
from latentize.recipe import Recipe

BUNDLED = Path(__file__).parents[2] / "models" / "tiny-llama-gqa"


def polish(model: str | Path, **entries: Any) -> Polish | None:
    recipe = Recipe.build(**{"keep": "50%", "polish": True, **entries})
    return effort_of(recipe, read_spec(model), large=False).polish  # type: ignore[arg-type]


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


def test_what_is_not_refined_is_not_polished() -> None:
    assert polish(BUNDLED, fast=True, polish=False) is None
    assert effort_of(Recipe.build(keep="50%", fast=True), read_spec(BUNDLED), large=False).refinement is None
    assert effort_of(Recipe.build(keep="50%"), read_spec("llama-3-8b"), large=True).polish is None
