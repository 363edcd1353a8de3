"""Ranks that move between layers: the total stays, and no other division of it is better."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentize.conversion.allocate import exchange, price, where_exact

FREE = (0, 1000)


def falling(scale: float, rate: float) -> Callable[[int], float]:
    return lambda rank: scale * math.exp(-rate * rank)


def test_a_price_goes_through_what_was_measured() -> None:
    at = price({8: 0.4, 16: 0.1, 24: 0.05})
    assert [at(r) for r in (8, 16, 24)] == pytest.approx([0.4, 0.1, 0.05])
    assert at(12) == pytest.approx(0.2), "straight in the logarithm"
    assert at(32) == pytest.approx(0.025), "and beyond"
    assert at(4) == pytest.approx(0.8)


def test_a_price_never_rises() -> None:
    """A larger rank that measured worse is noise, not a reason to give it up."""
    at = price({8: 0.1, 16: 0.2, 24: 0.05})
    assert at(16) == pytest.approx(0.1)
    prices = [at(r) for r in range(1, 40)]
    assert all(a >= b * (1 - 1e-12) for a, b in itertools.pairwise(prices))


def test_one_measurement_is_the_price_everywhere() -> None:
    assert price({8: 0.3})(100) == pytest.approx(0.3)


def test_a_price_has_a_floor() -> None:
    """Nothing is gained by values beyond those that lose nothing."""
    at = price({15: 0.4, 16: 0.0})
    assert at(16) == pytest.approx(1e-12)
    assert at(40) == at(16)


@pytest.mark.parametrize("needed", [7, 8, 14, 15, 27, 28, 42])
def test_where_a_layer_becomes_exact_is_found(needed: int) -> None:
    """What bfloat16 rounds of text has no price, and is as large at one rank as at another."""
    asked = []

    def measure(rank: int) -> float:
        asked.append(rank)
        return 0.0 if rank >= needed else 1e-3 + (needed - rank) * 1e-2

    error = where_exact({rank: measure(rank) + 2e-5 for rank in (14, 28, 42)}, measure, least=7)
    assert next(rank for rank, wrong in error.items() if wrong == 0.0) == needed
    assert list(error) == sorted(error)
    if needed > 7:
        assert error[needed - 1] == pytest.approx(0.011, rel=0.01)
        at = price(error)
        assert at(needed) < at(needed - 1) / 1e6
    assert len(asked) <= 3 + 1 + 6, "by halves"


def test_a_layer_that_always_loses_is_not_measured_again() -> None:
    def measure(rank: int) -> float:
        raise AssertionError(rank)

    for tried in ({14: 0.1, 28: 0.01, 42: 2e-3}, {14: 1.0, 28: math.inf}, {14: 1.0, 28: math.nan}):
        assert where_exact(tried, measure, least=7) is tried


def test_a_small_error_is_an_error() -> None:
    tried = {14: 1e-3, 28: 1e-4, 42: 2e-5}
    assert where_exact(tried, lambda rank: tried[rank], least=7) is tried


def test_equal_layers_keep_equal_ranks() -> None:
    assert exchange([16] * 4, [falling(1, 0.1)] * 4, [FREE] * 4) == [16] * 4


def test_values_go_where_they_are_missed() -> None:
    ranks = exchange([16, 16], [falling(1, 0.1), falling(0.01, 0.1)], [FREE] * 2)
    assert sum(ranks) == 32
    # Marginal prices are equal where they differ by ln 100 / 0.1 / 2 = 23 values from each other's middle.
    assert ranks == [32, 0]
    assert exchange([16, 16], [falling(1, 0.1), falling(0.01, 0.1)], [(12, 20)] * 2) == [20, 12]


@given(
    st.lists(st.tuples(st.floats(0.01, 10), st.floats(0.05, 1)), min_size=2, max_size=3),
    st.integers(2, 6),
)
def test_no_other_division_is_better(layers: list[tuple[float, float]], share: int) -> None:
    prices, bounds = [falling(*layer) for layer in layers], (1, 2 * share)

    def total(ranks: tuple[int, ...] | list[int]) -> float:
        return sum(at(rank) for at, rank in zip(prices, ranks, strict=True))

    found = exchange([share] * len(layers), prices, [bounds] * len(layers))
    assert sum(found) == share * len(layers)
    every = itertools.product(range(bounds[0], bounds[1] + 1), repeat=len(layers))
    best = min(total(ranks) for ranks in every if sum(ranks) == sum(found))
    assert total(found) <= best + 1e-8


def test_wide_ranks_move_in_steps_that_kernels_like() -> None:
    ranks = exchange([448, 448], [falling(1, 0.002), falling(0.5, 0.002)], [(112, 512)] * 2)
    assert ranks != [448, 448]
    assert all(rank % 32 == 0 for rank in ranks)
