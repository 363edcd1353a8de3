"""What a decode kernel reads: tensors of a cache as they lie, without a copy.

B sequences, S rows of a storage, n values of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latentize.runtime.codecs import FLOATS, codec

__all__ = ["KINDS", "Part", "Stored"]

# Formats as kernels know them.
KINDS = ("float", "fp8", "int8", "int4")


@dataclass(frozen=True)
class Stored:
    """One half of the rows: latents, or roped keys.

    Attributes:
        tensors: What a codec's ``encode`` returns: floating-point values, or codes and one scale a token.
            ``[B, S, …]``; the last axis is contiguous.
        format: Of ``codecs.FORMATS``.
        size: Values of a row, ``n``.
    """

    tensors: tuple[Tensor, ...]
    format: str
    size: int

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
        return codec(self.format, self.size).decode((self.codes, *self.tensors[1:]), dtype)


@dataclass(frozen=True)
class Part:
    """Some consecutive rows of every sequence.

    Attributes:
        latent, rope: Where they lie.
        count: How many there are, at most; what lies beyond is not read.
        first: The number of the first of them in its sequence.
    """

    latent: Stored
    rope: Stored
    count: int
    first: int = 0

    def rows(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Latents ``[B, count, r]`` and roped keys ``[B, count, R]``, gathered and restored."""
        latent, rope = (half.decoded(dtype)[:, : self.count] for half in (self.latent, self.rope))
        return latent, rope
