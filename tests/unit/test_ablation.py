"""The benchmark that removes one part of the method at a time replaces parts that are there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.common import SMALL

import latentize

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import ablation

    return ablation.PARTS


def test_every_part_is_there(parts: dict[str, Any]) -> None:
    for part in parts.values():
        with part():
            pass


SIZED: dict[str, Any] = {**SMALL, "fast": False, "kv_lora_rank": 24, "qk_rope_head_dim": 8}


@pytest.mark.parametrize(
    "name",
    [
        "the converted prefix: the source's inputs",
        "errors relative to each token: to all of the stream",
        "steps by what is to be repaired: one rate",
        "Muon: Adam",
        "text from all over: one passage",
        "passages that are read twice",
    ],
)
def test_what_is_left_converts(
    parts: dict[str, Any], name: str, source: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    options = {**SIZED, "tokens": 2048, "sequence_length": 64}
    folder = source()
    whole, less = tmp_path / "whole", tmp_path / "less"
    latentize.convert(folder, whole, data=(text,), **options)
    with parts[name]():
        latentize.convert(folder, less, data=(text,), **options)
    weights = [(out / "model.safetensors").read_bytes() for out in (whole, less)]
    assert weights[0] != weights[1], "the part does nothing"
