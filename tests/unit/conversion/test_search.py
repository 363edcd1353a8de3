"""Which ladders are compared, and that the comparison takes the one that is nearest to the source."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from latentize.conversion import allocate as allocating
from latentize.conversion.search import (
    choose,
    choose_by_layers,
    likely_ladders,
    most_promising,
    sampled_layers,
    short_refinement,
)
from latentize.conversion.texts import draw_text
from latentize.families.opening import open_source
from latentize.methods.registry import settings
from latentize.methods.setting import Setting
from latentize.modeling.source import SourceModel
from latentize.recipe import Recipe

RECIPE = {"keep": "50%", "tokens": 2048, "sequence_length": 64, "selection_tokens": 256, "evaluation_tokens": 256}


@pytest.fixture
def model(source: Callable[..., Path], text: str):
    checkpoint, spec = open_source(source("llama", 2))
    recipe = Recipe.build(**RECIPE, data=(text,))
    ladders = [s for s in settings(recipe, spec.attention) if s.stride is not None]
    return SourceModel(checkpoint, spec), ladders, draw_text(checkpoint.path, recipe, spec.max_positions)


def test_each_size_has_its_cheapest_ladders_the_fastest_frequencies_and_the_widest(model) -> None:
    source, ladders, text = model
    found = likely_ladders(source, ladders, text.calibration)
    sizes = {(s.kv_lora_rank, s.qk_rope_head_dim) for s in ladders}
    for rank, rope in sizes:
        mine = [s.stride for s in found if (s.kv_lora_rank, s.qk_rope_head_dim) == (rank, rope)]
        assert 1 <= len(mine) == len(set(mine)) <= 4
        assert {1.0, max(1.0, 16 / rope)} <= set(mine)


@pytest.mark.parametrize("refines", [False, True])
def test_of_those_that_cost_layers_least_one_of_the_best_predictors_is_taken(model, refines: bool) -> None:
    source, ladders, text = model
    best, scores = choose_by_layers(source, ladders, text.calibration, text.selection, refines)
    sizes = {setting.kv_lora_rank for setting, _ in scores}
    assert len(sizes) <= 3 <= len(scores) <= 6
    assert (len(scores) > len(sizes)) == refines, "the widest ladders, too, which refinement makes most of"
    assert best == most_promising(scores, share=0.05 if refines else 0.0)
    assert all(0 < kl < 1 for _, kl in scores)


def test_of_settings_that_are_as_good_the_largest_latent_is_taken() -> None:
    def compared(*rows: tuple[int, float, float]) -> list[tuple[Setting, float]]:
        return [(Setting("calibrated", rank, 192 - rank, stride=stride), kl) for rank, stride, kl in rows]

    def sizes(share: float, *rows: tuple[int, float, float]) -> tuple[int, float | None]:
        taken = most_promising(compared(*rows), share=share)
        return taken.kv_lora_rank, taken.stride

    rows = (136, 1.0, 0.0351), (136, 1.14, 0.0559), (128, 1.0, 0.0393), (144, 1.0, 0.0353), (144, 1.33, 0.0362)
    assert sizes(0.0, *rows) == (136, 1.0)
    assert sizes(0.05, *rows) == (144, 1.0), "as good, and of its ladders the better"
    assert sizes(0.001, *rows) == (136, 1.0), "not as good"
    assert sizes(0.05, (136, 1.0, -1e-9), (144, 1.0, 0.1)) == (136, 1.0), "rounding may leave less than nothing"
    assert sizes(0.05, (136, 1.0, math.inf), (144, 1.0, math.inf)) == (144, 1.0)


def test_what_costs_layers_least_is_nearest_to_the_source(model) -> None:
    """The cheap comparison agrees with the dear one: its choice is among the better half of all."""
    source, ladders, text = model
    likely = likely_ladders(source, ladders, text.calibration)
    best, _ = choose_by_layers(source, ladders, text.calibration, text.selection, refines=False)
    _, scores = choose(source, likely, text.calibration, text.selection)
    better = sorted(scores, key=lambda pair: pair[1])[: len(scores) // 2]
    assert best in [setting for setting, _ in better]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([3], [3]),
        (range(6), [0, 1, 2, 3, 4, 5]),
        (range(30), [0, 4, 8, 12, 17, 21, 25, 29]),
        ([5, 11, 17], [5, 11, 17]),
    ],
)
def test_choices_are_made_on_layers_from_all_over(layers, expected: list[int]) -> None:
    assert sampled_layers(list(layers)) == expected


def test_the_best_of_those_compared_is_taken(model) -> None:
    source, _, text = model
    folded = [Setting("transmla", 20, 8, freqfold=2), Setting("transmla", 24, 4, freqfold=4)]
    best, scores = choose(source, folded, text.calibration, text.selection)
    assert [setting for setting, _ in scores] == folded
    assert best == min(scores, key=lambda pair: pair[1])[0]
    assert all(kl > 0 for _, kl in scores)


def test_one_candidate_needs_no_comparison(model) -> None:
    source, _, text = model
    only = Setting("transmla", 20, 8, freqfold=2)
    assert choose(source, [only], text.calibration, text.selection) == (only, [])
    assert choose_by_layers(source, [only], text.calibration, text.selection, refines=True) == (only, [])


@pytest.mark.parametrize("adds_up", [True, False])
def test_sizes_of_layers_are_compared_where_prices_do_not_add_up(
    model, monkeypatch: pytest.MonkeyPatch, adds_up: bool
) -> None:
    """Values have moved as far as prices say; where errors are large fewer moves may predict better."""
    source, ladders, text = model
    size = (ladders[0].kv_lora_rank, ladders[0].qk_rope_head_dim)
    free = [next(replace(s, stride=None) for s in ladders if (s.kv_lora_rank, s.qk_rope_head_dim) == size)]
    monkeypatch.setattr(allocating, "_ADDS_UP", math.inf if adds_up else -1.0)
    seen: list[list[tuple[Setting, ...]]] = []

    def spy(source: SourceModel, sized: list[tuple[Setting, ...]], *more: Any) -> tuple[Setting, ...]:
        seen.append(sized)
        return sized[-1]

    monkeypatch.setattr(allocating, "predicting_best", spy)
    found, _ = allocating.allocate(source, free, text.calibration, text.selection)
    total = sum(s.kv_lora_rank for s in found)
    assert total == 2 * size[0]
    if adds_up:
        assert not seen
        return
    ((*moved, equal),) = seen
    assert found == list(equal) == [replace(free[0], kv_lora_rank=size[0])] * 2
    assert all(sum(s.kv_lora_rank for s in one) == total for one in moved)


def test_the_sizes_that_predict_best_are_taken(model) -> None:
    """Whatever the order: a layer with next to nothing predicts worse than two that share."""
    source, ladders, text = model
    setting = replace(ladders[0], stride=None)
    rank, none = setting.kv_lora_rank, short_refinement(text.calibration.length)
    even = (setting, setting)
    uneven = (replace(setting, kv_lora_rank=1), replace(setting, kv_lora_rank=2 * rank - 1))
    for sized in ([even, uneven], [uneven, even]):
        texts = (text.calibration, text.selection)
        assert allocating.predicting_best(source, sized, *texts, replace(none, steps=0)) == even
