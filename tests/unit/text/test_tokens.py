"""Drawing sequences is deterministic, goes all over the text, and says when there is too little of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.models import byte_tokenizer

from latentize.errors import DataError
from latentize.text.documents import pieces
from latentize.text.tokens import Passages, leading_tokens, pack, spread_positions

# 200 texts of 100 bytes and one separator each; no two stretches are alike.
TEXTS = ["".join(f"{10 * n + i:09d}." for i in range(10)) for n in range(200)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.mark.parametrize(("tokens", "rows"), [(1024, 16), (1000, 15), (10, 1), (64, 1), (10**9, 200 * 101 // 64)])
def test_whole_sequences_at_least_one_at_most_what_there_is(tokenizer: Any, tokens: int, rows: int) -> None:
    packed = pack(tokenizer, TEXTS, tokens=tokens, sequence_length=64)
    assert packed.shape == (rows, 64)
    assert packed.dtype == torch.int64


class WithLead:
    """A tokenizer that puts a token before each text, and one after it, where special tokens are asked for."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.eos_token_id = inner, inner.eos_token_id

    def __call__(self, text: str, *, add_special_tokens: bool = True, **options: Any) -> dict[str, list[int]]:
        ids = self.inner(text, add_special_tokens=False, **options)["input_ids"]
        return {"input_ids": [300, *ids, 301] if add_special_tokens else ids}


def test_every_sequence_begins_as_the_tokenizer_begins_a_text(tokenizer: Any) -> None:
    rows = pack(WithLead(tokenizer), TEXTS, tokens=1280, sequence_length=64)
    assert rows.shape == (20, 64)
    assert set(rows[:, 0].tolist()) == {300}
    assert not {300, 301} & set(rows[:, 1:].flatten().tolist())
    assert torch.equal(rows[:, 1:], pack(tokenizer, TEXTS, tokens=20 * 63, sequence_length=63))
    assert leading_tokens(tokenizer) == []


def test_a_seed_decides_the_draw(tokenizer: Any) -> None:
    one, same, other = (pack(tokenizer, TEXTS, tokens=640, sequence_length=64, seed=s) for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one.sort(0).values, other.sort(0).values), "other sequences, not only another order"


def test_sequences_are_stretches_of_documents_from_all_over(tokenizer: Any) -> None:
    rows = pack(tokenizer, TEXTS, tokens=1280, sequence_length=64)
    texts = [tokenizer.decode(row[:64]) for row in rows.tolist()]
    whole = [text for text in texts if any(text in document for document in TEXTS)]
    assert len(whole) >= 12, "the rest is joined from what was left over"
    assert len(set(texts)) == 20
    numbers = [int(text[:9]) for text in whole]
    assert min(numbers) < 500 and max(numbers) > 1500


def test_no_part_of_the_text_is_drawn_twice_or_lost(tokenizer: Any) -> None:
    drawn = pack(tokenizer, TEXTS, tokens=10**9, sequence_length=4).flatten().tolist()
    kept = [token for token in drawn if token != tokenizer.eos_token_id]
    everything = [t for text in TEXTS for t in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert len(everything) - 4 < len(kept) <= len(everything)
    left = torch.bincount(torch.tensor(everything)) - torch.bincount(torch.tensor(kept))
    assert int(left.min()) >= 0 and int(left.sum()) < 4


@pytest.mark.parametrize("line", [7, 50, 128, 129, 1000])
def test_long_documents_are_cut_at_line_ends_where_there_are_any(line: int) -> None:
    text = ("x" * (line - 1) + "\n") * 20
    found = list(pieces(text, 128))
    assert "".join(found) == text
    assert max(map(len, found)) <= 128
    if line <= 128:
        assert all(piece.endswith("\n") for piece in found)


def test_reading_stops_when_there_is_enough(tokenizer: Any) -> None:
    read = []

    def texts() -> Iterator[str]:
        for text in TEXTS:
            read.append(text)
            yield text

    pack(tokenizer, texts(), tokens=128, sequence_length=64, pool=600)
    assert len(read) == 6, "one pool"
    read.clear()
    pack(tokenizer, texts(), tokens=1280, sequence_length=64, pool=600)
    assert len(read) == 18, "as many pools as it takes"


def test_too_little_text(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"6 tokens.*64") as caught:
        pack(tokenizer, ["short"], tokens=128, sequence_length=64)
    assert caught.value.code == "LZ302"
    with pytest.raises(DataError):
        pack(tokenizer, [], tokens=128, sequence_length=64)


def test_most_sequences_reach_far_into_the_context() -> None:
    positions = spread_positions(200, 64, 1000, seed=3)
    steps = positions.diff(dim=1)
    assert torch.equal(positions[::4], torch.arange(64).expand(50, 64))
    assert (steps >= 1).all()
    assert int(positions.max()) < 1000
    assert ((steps > 1).sum(1) <= 1).all(), "one jump"
    evenly, by_octave = torch.cat([positions[2::4], positions[3::4]])[:, -1], positions[1::4, -1]
    assert 35 <= int((evenly > 500).sum()) <= 65, "any distance alike"
    assert 1 <= int((by_octave > 500).sum()) <= 12, "any octave alike"
    assert 15 <= int((by_octave < 94).sum()) <= 35
    assert torch.equal(positions, spread_positions(200, 64, 1000, seed=3))
    assert not torch.equal(positions, spread_positions(200, 64, 1000, seed=4))


@pytest.mark.parametrize(("length", "context"), [(64, 64), (64, 10), (3, 100)])
def test_nothing_to_spread(length: int, context: int) -> None:
    assert torch.equal(spread_positions(2, length, context), torch.arange(length).expand(2, length))


def test_passages_are_cut_by_sequences() -> None:
    text = Passages(torch.arange(12).view(4, 3), spread_positions(4, 3, 50))
    assert len(text) == 4
    assert text.length == 3
    part = text[1:3]
    assert torch.equal(part.tokens_NT, text.tokens_NT[1:3])
    assert torch.equal(part.positions_NT, text.positions_NT[1:3])
    assert torch.equal(Passages.contiguous(text.tokens_NT).positions_NT[2], torch.arange(3))
