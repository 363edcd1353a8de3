"""The benchmark that removes one part of the method at a time replaces parts that are there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.common import SMALL

import latentize

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import ablation

    return ablation.PARTS


def test_every_part_is_there(parts: dict[str, Any]) -> None:
    for part in parts.values():
        with part():
            pass


SIZED: dict[str, Any] = {
    **SMALL,
    "fast": False,
    "polish": False,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "tokens": 2048,
    "sequence_length": 64,
}


def weights(source: Callable[..., Path], text: str, out: Path) -> bytes:
    latentize.convert(source(), out, data=(text,), **SIZED)
    return (out / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(source: Callable[..., Path], text: str, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return weights(source, text, tmp_path_factory.mktemp("whole") / "out")


@pytest.mark.slow
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
def test_a_part_does_something(
    parts: dict[str, Any], name: str, whole: bytes, source: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    with parts[name]():
        assert weights(source, text, tmp_path / "out") != whole
