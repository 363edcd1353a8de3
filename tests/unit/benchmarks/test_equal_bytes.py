"""What is compared at equal bytes, and that the documentation shows what was measured."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("equal_bytes")


def row(name: str, size: float, loss: float, cache: str | None = None) -> dict[str, Any]:
    more = {"perplexity": 12.0, "kl": loss, "top1_agreement": 0.9, "dominated_by": None}
    shown = name + (f", {cache}" if cache else "")
    return {
        "name": shown,
        "cache": cache,
        "cache_bytes_per_token": size,
        "cache_share": size / 100,
        "excess_loss": loss,
        **more,
    }


ROWS = [
    row("the source", 100, 0.0),
    row("the source", 53, 0.001, "int8"),
    row("the source, window 60", 50, 0.3),
    row("calibrated 50%", 50, 0.01),
    row("calibrated 50%", 28, 0.012, "int8"),
    row("mha2mla 25%", 25, 0.9),
    row("mha2mla 25%", 14, 0.8, "int8"),
    row("calibrated 25%", 25, 0.1),
]


def test_the_rival_is_the_best_that_is_no_larger(script: ModuleType) -> None:
    found = {
        a["name"]: (any_["name"] if any_ else None, same["name"] if same else None)
        for a, any_, same in script.duels({"rows": ROWS})
    }
    assert found == {
        "the source, int8": ("calibrated 50%", "calibrated 50%, int8"),
        "the source, window 60": ("calibrated 50%", "calibrated 50%"),
        "mha2mla 25%": ("calibrated 25%", "calibrated 25%"),
        "mha2mla 25%, int8": (None, None),
    }
    said = script.verdicts({"rows": ROWS})
    assert "no more than 2 of 3, in the same format than 2 of 3" in said
    assert "**worse**: 0.0100 (calibrated 50%, 50)" in said and "none is as small" in said


def test_a_difference_from_the_other_measurement_is_found(script: ModuleType) -> None:
    result = {"tokens": 5, "weights_sha256": {"calibrated 50%": "a", "mha2mla 25%": "b"}, "rows": ROWS}
    keys = ("perplexity", "excess_loss", "kl", "top1_agreement")
    methods = [{"weights_sha256": "a", "tokens": 5, **{k: ROWS[3][k] for k in keys}}]
    methods += [{"weights_sha256": "b", "tokens": 5, **{k: ROWS[5][k] for k in keys}, "kl": 0.91}, {"refused": "so"}]
    assert script.unlike(result, methods) == (["calibrated 50%", "mha2mla 25%"], ["mha2mla 25%"])
    assert script.unlike({**result, "tokens": 6}, methods) == ([], []), "other tokens"


def test_the_documentation_shows_what_was_measured(script: ModuleType) -> None:
    result = json.loads((RESULTS / "equal-bytes-tiny-llama-gqa.json").read_text())
    shown = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for said in (script.table(result), script.verdicts(result)):
        assert said in shown


def test_the_numbers_are_those_of_the_readme(script: ModuleType) -> None:
    result = json.loads((RESULTS / "equal-bytes-tiny-llama-gqa.json").read_text())
    methods = json.loads((RESULTS / "methods-tiny-llama-gqa.json").read_text())
    same, other = script.unlike(result, methods["rows"])
    assert {f"calibrated {keep}" for keep in ("50%", "25%", "12.5%")} <= set(same), "the default rows, at least"
    assert not other
