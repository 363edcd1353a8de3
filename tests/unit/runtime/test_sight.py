"""Which rows of a layer's cache the newest tokens see: against what each token sees, written out."""

from __future__ import annotations

import pytest
import torch

from latentize.runtime.sight import Sight

CPU = torch.device("cpu")


def expected(sight: Sight) -> set[int]:
    """Numbers of all rows that some of the new tokens see."""
    found: set[int] = set()
    for now in range(sight.seen - sight.new, sight.seen):
        window = now + 1 if sight.window is None else sight.window
        found |= {at for at in range(now + 1) if at < sight.sinks or now - at < window}
    return found


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("seen", [3, 5, 8, 20])
@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (4, 0), (4, 2), (16, 2)])
def test_rows_that_are_seen(window: int | None, sinks: int, seen: int, new: int) -> None:
    # Nothing that a token may see was let go of.
    for kept in range(min(seen, sinks + (window or seen) + new - 1), seen + 1):
        sight = Sight(new, seen, kept, kept, window, sinks)
        numbers = sight.positions(CPU).tolist()
        assert set(numbers) >= expected(sight) and numbers == sorted(numbers)
        rows = [row for start, stop in sight.spans for row in range(start, stop)]
        assert [sight.number(row, sight.gone if row >= sinks else 0) for row in rows] == numbers
        assert len(rows) == len(numbers)


def test_a_mask_says_what_each_token_sees() -> None:
    sight = Sight(3, 10, 9, 9, window=4, sinks=2)
    allowed = sight.allowed(None, CPU)
    assert allowed is not None
    numbers = sight.positions(CPU)
    for now, row in zip(range(7, 10), allowed[0, 0], strict=True):
        assert numbers[row].tolist() == [at for at in range(now + 1) if at < 2 or now - at < 4]
    assert Sight(3, 10, 10, 10).allowed(None, CPU) is None, "causal is what there is without a window"


def test_sinks_seem_as_near_as_the_window_ends() -> None:
    sight = Sight(1, 100, 20, 20, window=8, sinks=2)
    (_, sinks), (first, _) = sight.spans
    # The row before the window's first is as far away as the last sink seems.
    assert sight.number(sinks - 1, sight.shift) == sight.number(first, 0) - 1


def test_each_token_sees_one_version_of_a_row() -> None:
    """All but the newest two are stored, and the last four are there as they are."""
    sight = Sight(3, 10, 10, 8, band=4, newest=2)
    assert sight.positions(CPU).tolist() == [*range(8), 6, 7, 8, 9]
    assert sight.spans_beside_band == [(0, 8)]
    allowed = sight.allowed(None, CPU)
    assert allowed is not None
    for now, row in zip(range(7, 10), allowed[0, 0], strict=True):
        assert sight.positions(CPU)[row].tolist() == list(range(now + 1))
