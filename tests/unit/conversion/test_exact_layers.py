"""Where every value is kept the closed form is exact whatever its statistics are, so little text goes through it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.common import SMALL

import latentize
from latentize.conversion import effort, pipeline
from latentize.conversion.draft import Observed, observe
from latentize.modeling.layer import SourceLayer, Stream


@pytest.mark.parametrize(
    ("options", "whole"),
    [
        ({"bytes": "30%", "fast": True}, False),
        ({"bytes": "30%", "fast": False}, True),
        ({"bytes": "30%", "keep": "50%", "fast": True}, True),
        ({"keep": "50%", "fast": True}, True),
    ],
    ids=["bits alone", "bits, polished: all text is learnt from", "bits and rank", "rank"],
)
def test_text_that_layers_read(
    monkeypatch: pytest.MonkeyPatch,
    source: Callable[..., Path],
    text: str,
    tmp_path: Path,
    options: dict[str, Any],
    whole: bool,
) -> None:
    read: list[tuple[int, bool]] = []

    def observed(layer: SourceLayer, own: Stream, *args: Any, exact: bool, **kwargs: Any) -> Observed:
        read.append((own.positions_NT.numel(), exact))
        return observe(layer, own, *args, exact=exact, **kwargs)

    # A polish of a few steps.
    monkeypatch.setattr(effort, "_FLOP", 1.0)
    monkeypatch.setattr(pipeline, "RMS_TOKENS", 512)
    monkeypatch.setattr(pipeline, "observe", observed)
    entries = {**SMALL, "bytes_context": 256, "self_generated": 0, **options}
    report = latentize.convert(source(), tmp_path / "out", data=(text,), **entries)
    calibration = report["calibration_tokens"]
    assert calibration > 512
    assert {tokens for tokens, _ in read} == {calibration if whole else 512}
    assert {exact for _, exact in read} == {"keep" not in options}
