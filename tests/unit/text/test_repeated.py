"""Calibration text in which a passage is read twice: at the end of its sequence again, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.common import SMALL

import latentize
from latentize.conversion import latent
from latentize.conversion.texts import draw_text
from latentize.errors import OptionError
from latentize.recipe import Recipe
from latentize.text.repeated import repeated


def distinct(count: int, length: int) -> torch.Tensor:
    """No token twice, so that what is found twice was put there."""
    return torch.arange(count * length).view(count, length)


def read_twice(row_T: torch.Tensor) -> int:
    """Tokens of the passage at the end that is there twice."""
    again = [t for t in range(len(row_T)) if row_T[t] in row_T[:t]]
    assert again == list(range(len(row_T) - len(again), len(row_T))), "all at the end"
    if again:
        start = int((row_T == row_T[again[0]]).nonzero()[0])
        assert torch.equal(row_T[start : start + len(again)], row_T[again[0] :])
        assert start + len(again) <= again[0], "the two do not overlap"
    return len(again)


@pytest.mark.parametrize("lead", [0, 2])
def test_passages_of_some_sequences(lead: int) -> None:
    drawn_NT = distinct(40, 64)
    made_NT = repeated(drawn_NT, sequences=10, lead=lead, seed=3)
    changed = (made_NT != drawn_NT).any(1)
    assert int(changed.sum()) == 10 and torch.equal(drawn_NT, distinct(40, 64))
    assert torch.equal(made_NT[:, :lead], drawn_NT[:, :lead])
    lengths = [read_twice(row_T) for row_T in made_NT]
    assert [bool(length) for length in lengths] == changed.tolist()
    assert all(7 <= length <= 24 for length in lengths if length) and len(set(lengths)) > 5
    assert lead == 0 or not any(int(token) in row_T[lead:] for row_T in made_NT for token in row_T[:lead])


def test_the_seed_draws() -> None:
    drawn_NT = distinct(40, 64)
    made_NT = repeated(drawn_NT, sequences=10, seed=3)
    assert torch.equal(repeated(drawn_NT, sequences=10, seed=3), made_NT)
    assert not torch.equal(repeated(drawn_NT, sequences=10, seed=4), made_NT)


@pytest.mark.parametrize(("length", "sequences"), [(64, 0), (4, 3)])
def test_nothing_where_nothing_is_asked_for_or_nothing_fits(length: int, sequences: int) -> None:
    assert torch.equal(repeated(distinct(3, length), sequences=sequences), distinct(3, length))


def test_all_of_them() -> None:
    assert all(read_twice(row_T) for row_T in repeated(distinct(5, 64), sequences=9))


REFINED: dict[str, Any] = {**SMALL, "fast": False, "polish": False, "kv_lora_rank": 24, "qk_rope_head_dim": 8}


@pytest.mark.parametrize(
    ("entries", "tokens"), [({}, 768), ({"repeated": "25%"}, 512), ({"repeated": 0}, 0), ({"fast": True}, 0)]
)
def test_three_eighths_where_layers_are_refined(
    source: Callable[..., Path], text: str, tmp_path: Path, entries: dict[str, Any], tokens: int
) -> None:
    options = {**REFINED, "tokens": 2048, "sequence_length": 64, "self_generated": 0, "restyled": 0, **entries}
    report = latentize.convert(source(), tmp_path / "out", data=(text,), **options)
    assert report["repeated_tokens"] == tokens and report["calibration_tokens"] == 2048
    card = (tmp_path / "out" / "README.md").read_text()
    assert (f"{tokens:,} of them where a passage is read twice" in card) == bool(tokens)


def test_other_styles_and_passages_are_drawn_apart(source: Callable[..., Path], text: str) -> None:
    def tokens(**shares: float) -> torch.Tensor:
        entries = {**REFINED, "data": (text,), "tokens": 2048, "sequence_length": 64, "restyled": 0, "repeated": 0}
        return draw_text(source(), Recipe.build(**{**entries, **shares}), 512).calibration.tokens_NT

    plain_NT = tokens()
    styled, twice = ((tokens(**shares) != plain_NT).any(1) for shares in ({"restyled": 0.5}, {"repeated": 0.5}))
    assert len({(bool(a), bool(b)) for a, b in zip(styled, twice, strict=True)}) == 4


def test_only_the_calibrated_method_takes_it(source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="calibrated method learns from text that is read twice"):
        latentize.convert(source(), tmp_path / "out", data=(text,), method="care", repeated=0.5)


def test_sizes_are_chosen_by_plain_text_and_a_polish_is_not(
    source: Callable[..., Path], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, torch.Tensor] = {}
    for name, at in (("choose_by_layers", 3), ("convert_latent", 4)):
        original = getattr(latent, name)

        def spy(*args: Any, name: str = name, at: int = at, original: Any = original) -> Any:
            seen[name] = args[at].tokens_NT
            return original(*args)

        monkeypatch.setattr(latent, name, spy)
    options = {**REFINED, "keep": 0.5, "kv_lora_rank": None, "qk_rope_head_dim": None, "repeated": 1, "restyled": 0}
    entries = {**options, "tokens": 2048, "sequence_length": 64, "self_generated": 0, "data": (text,)}
    latentize.convert(source(), tmp_path / "out", **entries)
    drawn = draw_text(source(), Recipe.build(**entries), 512)
    assert torch.equal(seen["choose_by_layers"], drawn.selection.tokens_NT)
    assert torch.equal(seen["convert_latent"], drawn.polishing.tokens_NT)
    assert (drawn.selection.tokens_NT != drawn.polishing.tokens_NT).any(1).all()


def test_a_share_is_of_the_text_that_there_is(source: Callable[..., Path], tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("".join(f"Line {n} is not line {n * n}.\n" for n in range(120)))
    entries = {**REFINED, "data": (str(short),), "tokens": 1 << 17, "sequence_length": 64, "selection_tokens": 64}
    drawn = draw_text(source(), Recipe.build(**entries), 512)
    count = len(drawn.calibration)
    assert count < 500 and drawn.repeated == round(0.375 * count) * 64
