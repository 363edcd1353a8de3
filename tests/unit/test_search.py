"""Which ladders are compared, and that the comparison takes the one that is nearest to the source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from latentize.api import open_source
from latentize.convert.progress import silent
from latentize.convert.search import best_strides, choose
from latentize.convert.settings import Setting, settings
from latentize.convert.source import SourceModel
from latentize.jobs import draw_text
from latentize.recipe import Recipe

RECIPE = {"keep": "50%", "tokens": 2048, "sequence_length": 64, "selection_tokens": 256, "evaluation_tokens": 256}


@pytest.fixture
def model(source: Callable[..., Path], text: str):
    checkpoint, spec = open_source(source("llama", 2))
    recipe = Recipe.build(**RECIPE, data=(text,))
    ladders = [s for s in settings(recipe, spec.attention) if s.stride is not None]
    return SourceModel(checkpoint, spec), ladders, draw_text(checkpoint.path, recipe, spec.max_positions)


@pytest.mark.parametrize("refines", [False, True])
def test_each_size_has_its_cheapest_ladder_and_with_refinement_the_widest(model, refines: bool) -> None:
    source, ladders, text = model
    found = best_strides(source, ladders, text.calibration, refines, silent)
    sizes = {(s.kv_lora_rank, s.qk_rope_head_dim) for s in ladders}
    for rank, rope in sizes:
        mine = [s.stride for s in found if (s.kv_lora_rank, s.qk_rope_head_dim) == (rank, rope)]
        assert 1 <= len(mine) == len(set(mine)) <= (2 if refines else 1)
        assert not refines or max(1.0, 16 / rope) in mine


def test_the_best_of_those_compared_is_taken(model) -> None:
    source, ladders, text = model
    best, scores = choose(source, ladders, text.calibration, text.selection)
    assert len(scores) >= 2
    assert best == min(scores, key=lambda pair: pair[1])[0]
    assert all(kl > 0 for _, kl in scores)


def test_one_candidate_needs_no_comparison(model) -> None:
    source, _, text = model
    only = Setting("transmla", 20, 8, freqfold=2)
    assert choose(source, [only], text.calibration, text.selection) == (only, [])
