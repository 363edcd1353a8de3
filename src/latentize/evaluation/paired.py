"""How sure a score is, and the difference of two models' on the same examples.

What is easy or hard about an example is so for both models, and cancels where they are compared example by example:
the interval of a difference is narrower than those of the two scores suggest.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

__all__ = ["DRAWS", "Z95", "Interval", "around", "of_difference", "of_score"]

Z95 = statistics.NormalDist().inv_cdf(0.975)
# Draws of examples, with replacement, where there is no formula.
DRAWS = 1000

Aggregate = Callable[[Sequence[Any]], float]


@dataclass(frozen=True)
class Interval:
    """Where a number lies, 95 %.

    Attributes:
        low, high: Its ends.
        how: ``stderr``, 1.96 standard errors to either side, or ``bootstrap``, between percentiles of draws.
    """

    low: float
    high: float
    how: str


def around(value: float, error: float | None) -> Interval | None:
    """From a standard error, if there is one."""
    if error is None or math.isnan(error):
        return None
    return Interval(value - Z95 * error, value + Z95 * error, "stderr")


def of_score(samples: Sequence[Any], aggregate: Aggregate) -> Interval | None:
    """Of a score that is an aggregate of what each example gave, by the bootstrap; ``None`` where that is no number.

    Args:
        samples: For each example a number, or several that are summed or averaged over examples.
        aggregate: From such to the score.
    """
    if len(samples) < 2 or not all(map(_countable, samples)):
        return None
    return _percentiles([aggregate([samples[n] for n in draw]) for draw in _draws(len(samples))])


def of_difference(ours: Sequence[Any], theirs: Sequence[Any], aggregate: Aggregate, *, mean: bool) -> Interval | None:
    """Of the difference of two scores on the same examples, ours minus theirs; ``None`` where there is none.

    Args:
        ours, theirs: As for :func:`of_score`, in the same order.
        aggregate: From such to the score.
        mean: Whether that is the mean: then by the standard error of the mean of the differences, else by the
            bootstrap, which draws the same examples for both.
    """
    if len(ours) != len(theirs) or len(ours) < 2 or not all(map(_countable, (*ours, *theirs))):
        return None
    if mean:
        differences = [float(a) - float(b) for a, b in zip(ours, theirs, strict=True)]
        return around(statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences)))
    draws = _draws(len(ours))
    return _percentiles([aggregate([ours[n] for n in d]) - aggregate([theirs[n] for n in d]) for d in draws])


def _countable(sample: Any) -> bool:
    parts = sample if isinstance(sample, tuple | list) else (sample,)
    # numpy's numbers have it, too; text has not.
    return all(hasattr(part, "__float__") for part in parts)


def _draws(count: int) -> list[list[int]]:
    draw = Random(0)
    return [draw.choices(range(count), k=count) for _ in range(DRAWS)]


def _percentiles(values: Sequence[float]) -> Interval:
    # Forty parts: the first and the last hold 2.5 % each.
    cuts = statistics.quantiles(values, n=40, method="inclusive")
    return Interval(cuts[0], cuts[-1], "bootstrap")
