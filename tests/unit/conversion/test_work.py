"""What a conversion is predicted to compute follows the shapes and what is asked for."""

from __future__ import annotations

from typing import Any

import pytest

from latentize.conversion.work import Rates, Work
from latentize.planning.forecast import forecast
from latentize.planning.inspection import plan
from latentize.planning.reading import read_spec
from latentize.recipe import Recipe

RATES = Rates(narrow=2e11, wide=1e11, double=5e10, scores=4e10, moved=1e10)
MODEL = "llama-3-8b"


def seconds(**entries: Any) -> dict[str, float]:
    return forecast(read_spec(MODEL), Recipe.build(**entries), RATES, faster=True).stages  # type: ignore[arg-type]


def test_seconds_are_of_each_precision() -> None:
    work = Work(narrow=2e11, wide=2e11, double=1e11, scores=4e10, moved=3e10)
    assert work.seconds(RATES) == 1 + 2 + 2 + 1 + 3
    assert (2 * work + work).flop == 3 * work.flop == pytest.approx(1.62e12)


def test_more_text_takes_longer_and_closed_forms_less() -> None:
    # Beyond the default's text steps are as many as there are at most.
    less, default, more, fast = seconds(tokens=65_536), seconds(), seconds(tokens=262_144), seconds(fast=True)
    assert sum(default.values()) > 1.2 * sum(less.values())
    assert more["converting layers"] > 1.2 * default["converting layers"]
    assert 1.2 * sum(default.values()) > 2.4 * sum(fast.values())
    assert set(fast) < {*default, "polishing"}


def test_text_of_the_models_own_goes_through_all_layers_too() -> None:
    without, beside = (seconds(self_generated=share, polish=True)["refining layers"] for share in (0, 0.5))
    assert without < beside < 1.5 * without, "the steps stay as many"


def test_stages_are_those_of_the_recipe() -> None:
    sized = {"kv_lora_rank": 448, "qk_rope_head_dim": 64}
    assert "comparing the best settings" in seconds() and "sizing layers" in seconds(format="native")
    assert next(iter(seconds(**sized, self_generated=0.1, polish=True))) == "writing text"
    assert list(seconds(**sized, self_generated=0.1, polish=True))[-3:] == [
        "refining layers",
        "polishing",
        "converting layers",
    ]


def test_plan_says_what_converting_takes() -> None:
    fast, default = plan(MODEL, context=4096, device="h100", keep="50%")["conversion"]
    assert fast["fast"] and not default["fast"]
    assert 0 < fast["seconds"] < default["seconds"] and fast["flop"] < default["flop"]
    assert sum(default["stages"].values()) == pytest.approx(default["seconds"])
    assert "conversion" not in plan(MODEL, context=4096)
    assert plan(MODEL, device="h100", keep="0.1%")["conversion"] == []
