"""What a decode kernel reads: tensors of a cache as they lie, without a copy.

B sequences, S rows of a storage, n values of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentize.runtime.codecs import FLOATS, Coded, codec

__all__ = ["KINDS", "Part", "Stored", "encoded_part", "plain_part"]

# Formats as kernels know them.
KINDS = ("float", "fp8", "int8", "int4", "coded")


@dataclass(frozen=True)
class Stored:
    """One half of the rows: latents, or roped keys.

    Attributes:
        tensors: What a codec's ``encode`` returns: floating-point values, or codes and one scale a token.
            ``[B, S, …]``; the last axis is contiguous.
        format: Of ``codecs.FORMATS``, or ``coded``.
        size: Values of a row, ``n``.
        coded: What made the codes, where the format is ``coded``.
    """

    tensors: tuple[Tensor, ...]
    format: str
    size: int
    coded: Coded | None = None

    @property
    def kind(self) -> str:
        """The format as kernels know it, one of ``KINDS`` where they do."""
        return "float" if self.format in FLOATS.values() else self.format

    @property
    def codes(self) -> Tensor:
        codes = self.tensors[0]
        return codes.view(torch.uint8) if self.format == "fp8" else codes

    @property
    def scale(self) -> Tensor:
        """``[…, 1]``; where there is none, a tensor that nobody reads."""
        return self.tensors[-1]

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """``[B, S, n]``."""
        own = self.coded or codec(self.format, self.size)
        return own.decode((self.codes, *self.tensors[1:]), dtype)


@dataclass(frozen=True)
class Part:
    """Some rows of every sequence, consecutive ones but where they have numbers.

    Attributes:
        latent, rope: Where they lie.
        count: How many there are, at most; what lies beyond is not read.
        first: The number of the first of them in its sequence.
        numbers_BE: The number of each in its sequence, in any order; -1 where there is none. Integers.
        apart_BA: Numbers of rows that lie in another part, too, and are not to be read here. Integers.
        full: Whether it is known that every sequence has all of them.
        factors_BSK: On their logits, each for as many queries; where norms of keys are kept beside a compressed key.
    """

    latent: Stored
    rope: Stored
    count: int
    first: int = 0
    numbers_BE: Tensor | None = None
    apart_BA: Tensor | None = None
    full: bool = False
    factors_BSK: Tensor | None = None

    @property
    def stored(self) -> int:
        """Rows that there is room for: what lies beyond ``count`` may be read, but says nothing."""
        return min(half.codes.shape[1] for half in (self.latent, self.rope))

    def rows(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Latents ``[B, count, r]`` and roped keys ``[B, count, R]``, gathered and restored."""
        latent, rope = (half.decoded(dtype)[:, : self.count] for half in (self.latent, self.rope))
        return latent, rope


def encoded_part(
    latent: tuple[Tensor, ...],
    rope: tuple[Tensor, ...],
    formats: tuple[str, str],
    sizes: tuple[int, int],
    count: int,
    key_scales: int = 0,
) -> Part:
    """Rows whose halves are stored in formats of their own.

    Args:
        latent, rope: What their codecs return.
        formats, sizes: Of either.
        count: As of :class:`Part`.
        key_scales: Factors, which lie beside what roped keys are stored in, or behind these.
    """
    factors_BSK = None
    if key_scales:
        *own, last = rope
        found = (*own, last) if own else last.tensor_split([sizes[1]], dim=-1)
        rope, factors_BSK = tuple(found[:-1]), found[-1]
    halves = (Stored(latent, formats[0], sizes[0]), Stored(rope, formats[1], sizes[1]))
    return Part(*halves, count, factors_BSK=factors_BSK)


def plain_part(rows_BEd: Tensor, rank: int, count: int, *, key_scales: int = 0, **where: Any) -> Part:
    """Rows as they are: latents of ``rank`` values, roped keys, and factors; the rest as in :class:`Part`."""
    *halves, factors_BEK = rows_BEd.tensor_split([rank, rows_BEd.shape[-1] - key_scales], dim=-1)
    latent, rope = (Stored((half,), FLOATS[half.dtype], half.shape[-1]) for half in halves)
    return Part(latent, rope, count, **where, factors_BSK=factors_BEK if key_scales else None)
