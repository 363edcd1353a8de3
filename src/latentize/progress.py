"""How a long step tells how far it is, and how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

__all__ = ["Progress", "Timed", "said_time", "silent"]

# A part that takes less than this share of what was predicted was not done but read from what was kept.
_DONE_BEFORE = 0.05
# Share of all work that the prediction is worth against what the clock has shown.
_TRUST = 0.01


class Progress(Protocol):
    """Told how far a long step is."""

    def __call__(self, what: str, done: int, total: int, detail: str = "") -> None: ...


def silent(what: str, done: int, total: int, detail: str = "") -> None:
    """A progress that says nothing."""


class Timed:
    """A progress that adds to what it is told how long everything else will take.

    What is left is what was predicted, times what the clock has shown so far of what was predicted for it.

    Args:
        inner: Who is told.
        seconds: What was predicted for each stage, in their order.
        clock: Seconds.

    Attributes:
        left: Seconds until all stages are done.
    """

    def __init__(
        self, inner: Progress, seconds: Mapping[str, float], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._inner, self._seconds, self._clock = inner, dict(seconds), clock
        self._total = sum(self._seconds.values())
        self._at, self._when = 0.0, clock()
        self._spent = self._due = _TRUST * self._total
        self.left = self._total

    def __call__(self, what: str, done: int, total: int, detail: str = "") -> None:
        if what not in self._seconds:
            self._inner(what, done, total, detail)
            return
        names = list(self._seconds)
        at = sum(self._seconds[name] for name in names[: names.index(what)])
        at += self._seconds[what] * done / max(total, 1)
        due, now = at - self._at, self._clock()
        took = now - self._when
        self._at, self._when = at, now
        if due > 0 and took > _DONE_BEFORE * due:
            self._spent, self._due = self._spent + took, self._due + due
        self.left = max(0.0, self._total - at) * self._spent / max(self._due, 1e-9)
        left = f"{said_time(self.left)} left" if self.left >= 1 else ""
        self._inner(what, done, total, ", ".join(filter(None, (detail, left))))


def said_time(seconds: float) -> str:
    """A time, for people."""
    if seconds < 200:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
