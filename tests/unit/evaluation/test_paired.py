"""Intervals of scores and of differences, against formulas and draws written out."""

from __future__ import annotations

import math
import statistics
from random import Random

import pytest

from latentize.evaluation.paired import around, of_difference, of_score
from latentize.evaluation.tasks import rows_of

RIGHT = [1, 1, 1, 0, 1, 0, 1, 1, 0, 1]
LESS = [1, 1, 0, 0, 1, 0, 1, 1, 0, 0]


def mean(values: list[float]) -> float:
    return statistics.fmean(values)


def total_ratio(pairs: list[tuple[float, float]]) -> float:
    return sum(a for a, _ in pairs) / sum(b for _, b in pairs)


def test_from_a_standard_error() -> None:
    found = around(0.5, 0.1)
    assert found is not None and found.how == "stderr"
    assert (found.low, found.high) == pytest.approx((0.5 - 0.1959964, 0.5 + 0.1959964))
    assert around(0.5, None) is None and around(0.5, math.nan) is None


def test_a_difference_of_means_by_hand() -> None:
    """Two of ten differ, by one each: mean 0.2, variance 16/90, standard error sqrt(16/900)."""
    found = of_difference(RIGHT, LESS, mean, mean=True)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((0.2 - 1.9599640 * 4 / 30, 0.2 + 1.9599640 * 4 / 30))
    one = of_difference(RIGHT, RIGHT, mean, mean=True)
    assert one is not None and one.low == one.high == 0
    spread = math.sqrt(statistics.variance(RIGHT) / 10 + statistics.variance(LESS) / 10)
    assert found.high - found.low < 2 * 1.96 * spread, "narrower than if the two were asked different questions"


def test_draws_find_what_the_formula_does() -> None:
    draw = Random(1)
    ours = [draw.gauss(0, 1) for _ in range(200)]
    theirs = [value + draw.gauss(0.3, 0.5) for value in ours]
    by_formula, by_draws = (of_difference(ours, theirs, mean, mean=way) for way in (True, False))
    assert by_formula is not None and by_draws is not None and by_draws.how == "bootstrap"
    width = by_formula.high - by_formula.low
    assert abs(by_draws.low - by_formula.low) < 0.15 * width and abs(by_draws.high - by_formula.high) < 0.15 * width


def test_examples_of_several_numbers() -> None:
    pairs = [(float(n), 10.0 + n) for n in range(20)]
    found = of_score(pairs, total_ratio)
    assert found is not None and found.low < total_ratio(pairs) < found.high
    assert of_score(pairs, total_ratio) == found, "draws are the same every time"
    double = [(2 * a, b) for a, b in pairs]
    difference = of_difference(double, pairs, total_ratio, mean=False)
    assert difference is not None
    assert (difference.low, difference.high) == pytest.approx((found.low, found.high)), "the same draws for both"


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [([1], [0]), ([1, 0], [1, 0, 1]), (["a", "b"], ["a", "c"]), ([("a", "b")] * 3, [("a", "b")] * 3)],
)
def test_no_interval_of_one_example_or_of_text(ours: list, theirs: list) -> None:
    assert of_difference(ours, theirs, mean, mean=True) is None
    assert of_difference(ours, theirs, mean, mean=False) is None


def lm_eval_result(values: list[int]) -> dict:
    score = statistics.fmean(values)
    return {
        "results": {
            "all": {"alias": "all", "acc,none": score, "acc_stderr,none": 0.1},
            "one": {"alias": " - one", "acc,none": score, "acc_stderr,none": 0.1, "name": "one"},
        },
        "groups": {"all": {}},
        "group_subtasks": {"all": ["one"]},
        "versions": {"all": 2, "one": 1.0},
        "n-samples": {"one": {"original": 30, "effective": len(values)}},
        "higher_is_better": {"all": {"acc": True}, "one": {"acc": True}},
        # Out of order, as several processes may leave them.
        "samples": {"one": [{"doc_id": n, "filter": "none", "acc": values[n]} for n in reversed(range(len(values)))]},
    }


def test_rows_of_a_group_and_its_task() -> None:
    group, one = rows_of(lm_eval_result(RIGHT), lm_eval_result(LESS), {"one": {"acc": mean}})
    assert (group.task, group.version, group.examples) == ("all", "2", 10)
    assert group.difference == pytest.approx(0.2) and group.difference_low is None
    assert (one.task, one.value, one.reference_value) == ("one", 0.7, 0.5)
    paired = of_difference(RIGHT, LESS, mean, mean=True)
    assert paired is not None and (one.difference_low, one.difference_high) == (paired.low, paired.high)
    assert one.low == pytest.approx(0.7 - 0.196, abs=1e-4)
    (_, alone) = rows_of(lm_eval_result(RIGHT), None, {"one": {"acc": mean}})
    assert alone.reference_value is None and alone.difference is None
