"""From documents to token sequences."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from latentize.errors import CheckpointError, DataError, OptionError
from latentize.processes import Team
from latentize.text.documents import pieces

__all__ = [
    "Passages",
    "Placed",
    "TooShortError",
    "leading_tokens",
    "pack",
    "require_positions",
    "require_rows",
    "spread_positions",
]

# Pieces of about two sequences: few enough from one place, and few that are made of several ends.
_CHARS_PER_TOKEN = 8
# What is told to whoever has too little; few tokenizers have longer ones.
_CHARS_OF_A_TOKEN = 5


class TooShortError(DataError):
    """The text does not fill the sequences that are needed.

    Args:
        tokens: That the text has.
        length: Of a sequence.
        sequences: How many are needed.
        lead: Tokens of each that are not of the text.
        what: Is too short.
    """

    def __init__(self, tokens: int, length: int, *, sequences: int = 1, lead: int = 0, what: str = "the text") -> None:
        self.tokens = tokens
        needed, most = sequences * (length - lead), tokens // sequences + lead
        number = "one sequence" if sequences == 1 else f"{sequences} sequences, to learn from one and hold one out,"
        fix = f"pass text of {needed:,} tokens or more with --data (about {_CHARS_OF_A_TOKEN * needed:,} characters)"
        if most >= max(2, 1 + lead):
            fix += f", or --sequence-length {most}"
        super().__init__(
            f"{what} has {tokens:,} tokens, fewer than {number} of {length:,}" if tokens else f"{what} is empty",
            where="the text, or the tokenizer",
            fix=fix,
        )


class Placed:
    """Sequences of whatever each token has, in tensors ``[N, T, …]``, and where in a context the tokens are.

    Attributes:
        positions_NT: int64, rising along each sequence.
    """

    positions_NT: Tensor

    def __len__(self) -> int:
        return len(self.positions_NT)

    def __getitem__(self, rows: slice | Tensor) -> Self:
        return type(self)(**{name: t[rows] for name, t in vars(self).items()})

    def split(self, size: int) -> list[Self]:
        """Parts of ``size`` sequences."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    def part(self, team: Team) -> Self:
        """Of all of them what one of several processes has, which is nothing if there are more processes."""
        return self[slice(team.rank, None, team.size)]

    def share(self, team: Team) -> Self:
        """What one of several processes has of them: as many sequences as the others.

        Raises:
            OptionError: there are more processes than sequences.
        """
        if team.size == 1:
            return self
        if len(self) < team.size:
            raise OptionError(
                f"{len(self)} sequences of text cannot be shared by {team.size} processes",
                where="the text",
                fix=f"more text (--tokens), or at most {len(self)} processes",
            )
        whole = len(self) - len(self) % team.size
        return self[slice(team.rank, whole, team.size)]

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.positions_NT.shape[1]


@dataclass(frozen=True)
class Passages(Placed):
    """Text.

    Attributes:
        tokens_NT: Token ids, of any integer type.
        positions_NT: As in :class:`Placed`.
    """

    tokens_NT: Tensor
    positions_NT: Tensor

    @classmethod
    def contiguous(cls, tokens_NT: Tensor) -> Passages:
        """Every sequence at the start of a context."""
        return cls(tokens_NT, torch.arange(tokens_NT.shape[1]).expand_as(tokens_NT))

    @classmethod
    def spread(cls, tokens_NT: Tensor, context: int, *, seed: int) -> Passages:
        """Sequences that reach far into a context, see :func:`spread_positions`."""
        return cls(tokens_NT, spread_positions(len(tokens_NT), tokens_NT.shape[1], context, seed=seed))

    def to(self, device: torch.device | str) -> Passages:
        """The same on a device."""
        return Passages(self.tokens_NT.to(device, torch.int64), self.positions_NT.to(device))


def spread_positions(count: int, length: int, context: int, *, seed: int = 0) -> Tensor:
    """Positions that show a model the distances of a long context in short sequences (PoSE, arXiv 2309.10400).

    Three sequences of four jump once, and what follows stands further on: two of them by any distance alike, up to
    the end of the context, one by any octave of distance alike, for contexts much longer than a sequence.

    Args:
        count: Sequences ``N``.
        length: Tokens of each ``T``.
        context: Positions that there may be.
        seed: Draws the jumps.

    Returns:
        ``[N, T]`` int64, below ``context``.
    """
    positions_NT = torch.arange(length).repeat(count, 1)
    if context <= length or length < 4:
        return positions_NT
    order = random.Random(seed)
    longest = context - length
    for number, row in enumerate(positions_NT):
        if number % 4 == 0:
            continue
        at = order.randint(length // 8 + 1, length - length // 8 - 1)
        octave = math.exp(order.uniform(0.0, math.log(longest + 1)))
        row[at:] += round(octave) - 1 if number % 4 == 1 else order.randint(0, longest)
    return positions_NT


def pack(
    tokenizer: Any,
    documents: Iterable[str],
    *,
    tokens: int,
    sequence_length: int,
    seed: int = 0,
    pool: int = 1 << 24,
    least: int = 1,
) -> Tensor:
    """Draw sequences from all over the documents.

    Documents are cut at line ends into pieces, and only pieces that are drawn are tokenised. A sequence is a
    contiguous stretch of a piece; what is left of pieces is joined, with the end-of-text token between. Each begins
    with what the tokenizer puts before a text, a BOS token where the model was trained with one.

    Args:
        tokenizer: A transformers tokenizer.
        documents: Text, in a fixed order.
        tokens: Upper bound on the tokens returned; rounded down to whole sequences (at least one).
        sequence_length: Tokens per sequence ``T``.
        seed: Which pieces are drawn.
        pool: Characters to read and draw from at a time; reading stops when there are enough tokens.
        least: Sequences that are needed.

    Returns:
        ``[N, T]`` int64 with ``N = max(least, tokens // T)``, fewer if the text ends before.

    Raises:
        TooShortError: the text does not fill ``least`` sequences.
    """
    wanted, lead = max(least, tokens // sequence_length), leading_tokens(tokenizer)
    # Of the text there is that much less in a sequence.
    whole_sequence, sequence_length = sequence_length, max(1, sequence_length - len(lead))
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows: list[list[int]] = []
    ends: list[int] = []
    for piece in _drawn(documents, _CHARS_PER_TOKEN * sequence_length, pool, random.Random(seed)):
        ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        whole = len(ids) // sequence_length * sequence_length
        ends += ids[whole:] + separator
        rows += _cut(ids[:whole], sequence_length)
        if len(ends) >= sequence_length:
            rows.append(ends[:sequence_length])
            del ends[:sequence_length]
        if len(rows) >= wanted:
            break
    rows += _cut(ends, sequence_length)
    if len(rows) < least:
        has = len(rows) * sequence_length + len(ends) % sequence_length
        raise TooShortError(has, whole_sequence, sequences=least, lead=len(lead))
    return torch.tensor([lead + row for row in rows[:wanted]], dtype=torch.int64)


def require_positions(positions: Tensor, learnt: int, where: str | Path) -> None:
    """That every position has a row where rows are learnt, as GPT-2's are.

    Args:
        positions: Of any shape.
        learnt: Rows.
        where: The model.

    Raises:
        OptionError: one has none.
    """
    if positions.numel() and (last := int(positions.max())) >= learnt:
        raise OptionError(
            f"a text of {last + 1:,} tokens, and the model has learnt {learnt:,} positions",
            where=str(where),
            fix=f"texts of {learnt:,} tokens or fewer (--sequence-length, --max-new-tokens)",
        )


def require_rows(tokens: Tensor, rows: int, where: str | Path) -> None:
    """That every token has a row in the embedding.

    Args:
        tokens: Ids, of any shape.
        rows: Of the embedding.
        where: The model.

    Raises:
        CheckpointError: one has none.
    """
    if tokens.numel() and (largest := int(tokens.max())) >= rows:
        raise CheckpointError(
            f"the tokenizer makes token {largest}, the embedding has {rows} rows",
            code="LZ117",
            where=str(where),
            fix="is this the model's own tokenizer?",
        )


def leading_tokens(tokenizer: Any) -> list[int]:
    """What a tokenizer puts before a text: a BOS token, or nothing."""
    bare, whole = (tokenizer("a", add_special_tokens=add, verbose=False)["input_ids"] for add in (False, True))
    if not bare or bare[0] not in whole:
        return []
    return list(whole[: whole.index(bare[0])])


def _cut(ids: list[int], length: int) -> list[list[int]]:
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]


def _drawn(documents: Iterable[str], size: int, pool: int, order: random.Random) -> Iterator[str]:
    """Pieces of about ``size`` characters, shuffled a pool at a time."""
    found: list[str] = []
    read = 0
    for text in documents:
        found += pieces(text, size)
        read += len(text)
        if read >= pool:
            order.shuffle(found)
            yield from found
            found, read = [], 0
    order.shuffle(found)
    yield from found
