"""Calibration text in other styles: the same words, as many sequences, nothing that is not asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.common import SMALL
from tests.models import byte_tokenizer

import latentize
from latentize.errors import OptionError
from latentize.text.restyled import STYLES, restyled

TEXT = "He left, as she'd said: at 9.30. Who (if not I) knows? "


def rows(count: int, length: int) -> torch.Tensor:
    ids = byte_tokenizer()(TEXT * 200, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: count * length]).view(count, length)


def test_styles() -> None:
    assert [style(TEXT.strip()) for style in STYLES] == [
        "he left, as she'd said: at 9.30. who (if not i) knows?",
        "He left , as she'd said : at 9 . 30 . Who ( if not I ) knows ? ",
        "He left as she'd said at 9 30 Who if not I knows ",
        "He left, as she'd said: at 9.30.\nWho (if not I) knows?",
    ]


def test_as_many_sequences_and_the_others_as_they_were() -> None:
    drawn_NT = rows(40, 64)
    made_NT = restyled(byte_tokenizer(), drawn_NT, sequences=8, seed=3)
    changed = (made_NT != drawn_NT).any(1)
    assert made_NT.shape == drawn_NT.shape and made_NT.dtype == torch.int64
    assert 5 <= int(changed.sum()) <= 8
    assert torch.equal(restyled(byte_tokenizer(), drawn_NT, sequences=8, seed=3), made_NT)
    assert not torch.equal(restyled(byte_tokenizer(), drawn_NT, sequences=8, seed=4), made_NT)
    assert torch.equal(restyled(byte_tokenizer(), drawn_NT, sequences=0), drawn_NT)


def test_all_of_it() -> None:
    made_NT = restyled(byte_tokenizer(), rows(4, 64), sequences=9)
    assert made_NT.shape == (4, 64)


def test_a_sequence_begins_as_the_tokenizer_begins_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentize.text.restyled.leading_tokens", lambda tokenizer: [7, 8])
    drawn_NT = rows(8, 64)
    made_NT = restyled(byte_tokenizer(), drawn_NT, sequences=8)
    changed = (made_NT != drawn_NT).any(1)
    assert changed.any() and made_NT[changed, :2].tolist() == [[7, 8]] * int(changed.sum())


REFINED: dict[str, Any] = {**SMALL, "fast": False, "polish": False, "kv_lora_rank": 24, "qk_rope_head_dim": 8}


@pytest.mark.parametrize(("entries", "some"), [({}, True), ({"restyled": 0}, False), ({"fast": True}, False)])
def test_a_quarter_where_layers_are_refined(
    source: Callable[..., Path], text: str, tmp_path: Path, entries: dict[str, Any], some: bool
) -> None:
    options = {**REFINED, "tokens": 2048, "sequence_length": 64, "self_generated": 0, **entries}
    report = latentize.convert(source(), tmp_path / "out", data=(text,), **options)
    assert report["restyled_tokens"] in (range(64, 512 + 1) if some else (0,))
    assert report["calibration_tokens"] == 2048
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("in other styles" in card) == some


def test_only_the_calibrated_method_takes_it(source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="calibrated method learns from text in other styles"):
        latentize.convert(source(), tmp_path / "out", data=(text,), method="transmla", restyled=0.5)
