"""How much time is left: what was predicted, as far as the clock bears it out."""

from __future__ import annotations

import pytest

from latentize.progress import Timed, said_time

STAGES = {"reading": 10.0, "learning": 90.0}


class Clock:
    """Told what time it is."""

    def __init__(self) -> None:
        self.now, self.said = 0.0, ""

    def __call__(self) -> float:
        return self.now

    def told(self, what: str, done: int, total: int, detail: str = "") -> None:
        self.said = detail


@pytest.mark.parametrize("slower", [0.3, 1.0, 4.0])
def test_left_is_right_from_the_first_tenth_on(slower: float) -> None:
    """Whatever the machine, as long as it is as much slower in every stage."""
    clock = Clock()
    progress = Timed(clock.told, STAGES, clock)
    assert progress.left == 100
    for done in range(1, 11):
        clock.now += slower * 1.0
        progress("reading", done, 10)
    assert clock.now == pytest.approx(10 * slower)
    for done in range(1, 46):
        assert progress.left == pytest.approx(100 * slower - clock.now, rel=1 / 3)
        clock.now += slower * 2.0
        progress("learning", done, 45, "error 0.1")
    assert progress.left == 0 and clock.said == "error 0.1"


def test_what_was_kept_from_before_says_nothing_of_speed() -> None:
    clock = Clock()
    progress = Timed(clock.told, STAGES, clock)
    progress("reading", 10, 10)
    for done in range(1, 31):
        clock.now += 0.001
        progress("learning", done, 45)
    assert progress.left == pytest.approx(30)
    for done in range(31, 40):
        clock.now += 4.0
        progress("learning", done, 45)
    assert progress.left == pytest.approx(24, rel=1 / 3)
    assert clock.said == f"{said_time(progress.left)} left"


def test_other_stages_pass() -> None:
    clock = Clock()
    progress = Timed(clock.told, STAGES, clock)
    progress("waiting", 1, 2, "for a lock")
    assert clock.said == "for a lock" and progress.left == 100


@pytest.mark.parametrize(("seconds", "said"), [(4.2, "4 s"), (240, "4 min"), (3 * 3600, "3.0 h")])
def test_said(seconds: float, said: str) -> None:
    assert said_time(seconds) == said
