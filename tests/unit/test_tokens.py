"""Packing is deterministic, and says when there is too little text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.common import byte_tokenizer

from latentize.calibrate.tokens import pack
from latentize.errors import DataError

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


def test_a_seed_decides_the_draw(tokenizer: Any) -> None:
    one, same, other = (pack(tokenizer, TEXTS, tokens=640, sequence_length=64, seed=s) for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one.sort(0).values, other.sort(0).values), "other sequences, not only another order"


def test_drawn_sequences_are_distinct_stretches_of_the_text(tokenizer: Any) -> None:
    """Documents follow each other with a separator between them, and no sequence is drawn twice."""
    stream: list[int] = []
    for text in TEXTS:
        stream += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    stretches = [stream[i : i + 64] for i in range(0, len(stream) - 63, 64)]
    places = [stretches.index(row) for row in pack(tokenizer, TEXTS, tokens=1280, sequence_length=64).tolist()]
    assert len(set(places)) == 20
    assert max(places) >= 100, "from all of the text, not its beginning"


def test_reading_stops_when_there_is_enough(tokenizer: Any) -> None:
    read = []

    def texts() -> Iterator[str]:
        for text in TEXTS:
            read.append(text)
            yield text

    pack(tokenizer, texts(), tokens=128, sequence_length=64, pool=600)
    assert len(read) == 6, "the pool, where it is larger"
    read.clear()
    pack(tokenizer, texts(), tokens=1280, sequence_length=64, pool=600)
    assert len(read) == 13, "what is wanted, where that is"


def test_too_little_text(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"6 tokens.*64") as caught:
        pack(tokenizer, ["short"], tokens=128, sequence_length=64)
    assert caught.value.code == "LZ302"
    with pytest.raises(DataError):
        pack(tokenizer, [], tokens=128, sequence_length=64)
