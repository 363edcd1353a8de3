"""What a conversion is predicted to compute follows the shapes and what is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from latentize.attention.spec import LatentSpec
from latentize.checkpoint import open_checkpoint
from latentize.conversion.footprint import _Shapes
from latentize.conversion.work import Rates, Work, _Counter
from latentize.methods.registry import settings
from latentize.modeling.attention import LatentAttention
from latentize.modeling.precision import Precision
from latentize.planning.devices import DEVICES
from latentize.planning.forecast import forecast, published_rates
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


def test_processes_share_what_can_be_shared() -> None:
    """Candidates, text, steps and Muon's products are; closed forms and the measurement in the end are not."""

    def of(processes: int, **entries: Any) -> dict[str, float]:
        recipe = Recipe.build(**entries)
        return forecast(read_spec(MODEL), recipe, RATES, faster=True, processes=processes).stages  # type: ignore[arg-type]

    for entries in ({}, {"fast": True}, {"format": "native"}, {"polish": True}):
        times = [of(n, **entries) for n in (1, 2, 8, 64)]
        for fewer, more in pairwise(times):
            assert fewer.keys() == more.keys()
            assert all(more[stage] <= fewer[stage] for stage in fewer)
        assert times[0] == seconds(**entries)
        assert sum(times[1].values()) > 0.5 * sum(times[0].values())
    alone, two = of(1, polish=True)["polishing"], of(2, polish=True)["polishing"]
    assert two < 0.75 * alone
    machine = DEVICES["h100"]
    assert published_rates(machine, 8) == published_rates(machine)
    assert published_rates(machine, 9).sent < published_rates(machine, 8).sent / 8, "between nodes"
    assert forecast(read_spec(MODEL), Recipe.build(), replace(RATES, sent=1e9), faster=True, processes=2).seconds > sum(  # type: ignore[arg-type]
        of(2).values()
    )


def test_plan_says_what_converting_takes() -> None:
    fast, default = plan(MODEL, context=4096, device="h100", keep="50%")["conversion"]
    assert fast["fast"] and not default["fast"]
    assert 0 < fast["seconds"] < default["seconds"] and fast["flop"] < default["flop"]
    assert sum(default["stages"].values()) == pytest.approx(default["seconds"])
    assert "conversion" not in plan(MODEL, context=4096)
    assert plan(MODEL, device="h100", keep="0.1%")["conversion"] == []


@pytest.mark.parametrize("family", ["llama", "olmo2", "qwen3", "qwen3_5_text"])
def test_a_converted_layer_has_as_many_parameters_as_are_counted(source: Callable[..., Path], family: str) -> None:
    spec = read_spec(str(source(family, 2)))
    a, recipe = spec.attention, Recipe.build(keep="50%", format="native")
    setting = next(s for s in settings(recipe, a) if s.stride is None)
    norms = setting.key_scales
    made = LatentAttention(
        LatentSpec(
            hidden_size=a.hidden_size,
            num_heads=a.num_heads,
            kv_lora_rank=setting.kv_lora_rank,
            qk_rope_head_dim=setting.qk_rope_head_dim,
            qk_nope_head_dim=a.head_dim,
            v_head_dim=a.head_dim,
            rope_heads=1,
            up_heads=a.num_heads,
            softmax_scale=1.0,
            key_scales=norms,
        ),
        qk_norm=norms > 0,
        qk_norm_across=a.qk_norm_across,
        head_dim=a.head_dim,
        key_dim=a.num_kv_heads * a.head_dim // max(1, norms),
        gated=a.gated,
    )
    assert norms == {"llama": 0, "olmo2": 1}.get(family, 2)
    stored = sum(p.numel() for p in made.parameters() if p.ndim == 2)
    assert sum(map(math.prod, _Counter(spec, recipe, Precision()).latent(setting))) == stored
    shapes = _Shapes(spec, open_checkpoint(source(family, 2)), recipe, 4, Precision())
    assert shapes.latent(setting, 1, expanded=True) == stored
