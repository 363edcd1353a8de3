"""However little text there is, what is learnt from and what is held out are there, and apart."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import byte_tokenizer
from torch import Tensor

from latentize.errors import DataError
from latentize.text.documents import TextWarning, documents
from latentize.text.drawing import Part, draw, draw_all
from latentize.text.tokens import TooShortError, pack

LENGTH = 64


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def words(size: int, *, lines: bool = True) -> str:
    """Text of ``size`` characters, no part of which is in it twice."""
    numbered = "".join(f"{n:07d}" + ("\n" if lines and n % 8 == 0 else " ") for n in range(size // 8 + 1))
    return numbered[:size]


def txt(path: Path, size: int) -> Path:
    path.with_suffix(".txt").write_text(words(size))
    return path.with_suffix(".txt")


def line(path: Path, size: int) -> Path:
    path.with_suffix(".txt").write_text(words(size, lines=False))
    return path.with_suffix(".txt")


def record(path: Path, size: int) -> Path:
    path.with_suffix(".jsonl").write_text(json.dumps({"text": words(size)}) + "\n")
    return path.with_suffix(".jsonl")


def chat(path: Path, size: int) -> Path:
    entry = {"messages": [{"role": "user", "content": words(size)}]}
    path.with_suffix(".jsonl").write_text(json.dumps(entry) + "\n")
    return path.with_suffix(".jsonl")


def twice(path: Path, size: int) -> Path:
    path.with_suffix(".jsonl").write_text((json.dumps({"text": words(size)}) + "\n") * 2)
    return path.with_suffix(".jsonl")


KINDS = [txt, line, record, chat, twice]


def numbers(rows_NT: Tensor, tokenizer: Any) -> set[str]:
    """What of :func:`words` is whole in sequences."""
    return {n for row in rows_NT.tolist() for n in re.findall(r"\b\d{7}\b", tokenizer.decode(row))}


@pytest.mark.parametrize("size", [200, 700, 2_000, 13_000, 53_000, 180_000, 295_000, 733_000])
@pytest.mark.parametrize("make", KINDS)
@pytest.mark.filterwarnings("ignore::latentize.text.documents.TextWarning")
def test_every_text_has_both_parts(tmp_path: Path, tokenizer: Any, make: Callable[..., Path], size: int) -> None:
    path = make(tmp_path / "text", size)
    parts = [Part("calibration", 1 << 14, 5), Part("heldout", 1 << 12)]
    calibration, heldout = draw(tokenizer, path, parts, sequence_length=LENGTH)
    assert 1 <= len(heldout) <= 64 and 1 <= len(calibration) <= 256
    whole = set(map(tuple, calibration.tolist())) & set(map(tuple, heldout.tolist()))
    assert not whole
    assert not numbers(calibration, tokenizer) & numbers(heldout, tokenizer)
    if size >= 53_000:
        assert len(calibration) == 256, "as much as was asked for"
    for again in (parts[1:], [Part("heldout", 1 << 12, 0)]):
        assert torch.equal(draw(tokenizer, path, again, sequence_length=LENGTH)[0], heldout)
    assert torch.equal(draw(tokenizer, path, parts[:1], sequence_length=LENGTH)[0], calibration)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.filterwarnings("ignore::latentize.text.documents.TextWarning")
def test_no_seed_and_no_number_moves_a_sequence_to_the_other_part(tmp_path: Path, tokenizer: Any, seed: int) -> None:
    path = txt(tmp_path / "text", 3_000)
    order = random.Random(seed)
    sizes = [order.randrange(64, 4096) for _ in range(4)]
    learnt = [draw(tokenizer, path, [Part("calibration", n, seed)], sequence_length=LENGTH)[0] for n in sizes]
    held = [draw(tokenizer, path, [Part("heldout", n, seed)], sequence_length=LENGTH)[0] for n in sizes]
    learnt += [draw(tokenizer, path, [Part("training", n, seed)], sequence_length=LENGTH)[0] for n in sizes]
    seen = numbers(torch.cat(learnt), tokenizer)
    assert seen and not seen & numbers(torch.cat(held), tokenizer)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_what_documents_suffice_for_is_drawn_from_documents(tmp_path: Path, tokenizer: Any, suffix: str) -> None:
    """Nothing is told, and what is drawn is what whole documents give."""
    path = tmp_path / f"text{suffix}"
    texts = [f"{n}: {words(2000)[n : n + 1500]}\n" for n in range(300)]
    path.write_text("".join(texts) if suffix == ".txt" else "".join(json.dumps({"text": t}) + "\n" for t in texts))
    notes: list[str] = []
    parts = [Part("calibration", 6400, 3), Part("heldout", 1280)]
    found = draw(tokenizer, str(path), parts, sequence_length=LENGTH, notes=notes)
    for part, rows_NT in zip(parts, found, strict=True):
        options = {"tokens": part.tokens, "sequence_length": LENGTH, "seed": part.seed}
        assert torch.equal(rows_NT, pack(tokenizer, documents([path], part.split), **options))
    assert not notes


def test_less_than_asked_for_is_told(tmp_path: Path, tokenizer: Any) -> None:
    path, notes = txt(tmp_path / "text", 1000), []
    with pytest.warns(TextWarning) as caught:
        draw(tokenizer, path, [Part("calibration", 6400), Part("heldout", 6400)], sequence_length=LENGTH, notes=notes)
    assert [str(warning.message) for warning in caught] == notes
    sequences, learnt, held = notes
    assert "sequences of the same documents" in sequences
    assert learnt == "there are 832 tokens of text to calibrate on, 6,400 were asked for"
    assert held == "there are 128 tokens of text to hold out, 6,400 were asked for"
    with pytest.warns(TextWarning, match="960 tokens of text to measure on, 6,400 were asked for"):
        assert draw_all(tokenizer, path, tokens=6400, sequence_length=LENGTH).numel() == 960


@pytest.mark.parametrize("size", [2, 20, 100, 116])
@pytest.mark.parametrize("make", KINDS)
@pytest.mark.filterwarnings("ignore::latentize.text.documents.TextWarning")
def test_too_little_is_said_with_what_would_do(
    tmp_path: Path, tokenizer: Any, make: Callable[..., Path], size: int
) -> None:
    path = make(tmp_path / "text", size)
    parts = [Part("calibration", 640), Part("heldout", 640)]
    with pytest.raises(TooShortError, match="2 sequences, to learn from one and hold one out, of 64") as caught:
        draw(tokenizer, path, parts, sequence_length=64)
    assert caught.value.code == "LZ302"
    assert "128 tokens or more" in caught.value.fix
    length = re.search(r"--sequence-length (\d+)", caught.value.fix)
    if length is None:
        assert caught.value.tokens < 4
    else:
        assert [len(rows) for rows in draw(tokenizer, path, parts, sequence_length=int(length[1]))] == [1, 1]
    enough = make(tmp_path / "more", 128)
    assert all(len(rows) for rows in draw(tokenizer, enough, parts, sequence_length=64))


@pytest.mark.parametrize("content", ["", "\n", " \t\n" * 100])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".md"])
def test_an_empty_text_is_called_so(tmp_path: Path, tokenizer: Any, content: str, suffix: str) -> None:
    path = tmp_path / f"text{suffix}"
    path.write_text(content)
    for split in ("calibration", "heldout"):
        with pytest.raises(DataError, match="the text is empty"):
            draw(tokenizer, path, [Part(split, 640)], sequence_length=LENGTH)
    with pytest.raises(DataError, match="the text is empty"):
        draw_all(tokenizer, path, tokens=640, sequence_length=LENGTH)
