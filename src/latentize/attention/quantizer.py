"""Values to codes: a gain for all of a token's values together, and an index into a codebook for some neighbours.

A row has one or more halves (a latent, roped keys), and each a gain of its own. One token asks for as many operations
as thousands, so all halves and widths are looked up together, as far as their indices stand for equally many values.

B batch, s tokens, h halves, n values of a half, f indices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from latentize.attention.codebooks import VALUES_AT_ONCE, codebook, finder

__all__ = [
    "GROUP",
    "MOST_BITS",
    "WIDTHS",
    "Quantizer",
    "Segments",
    "coded",
    "gain_codes",
    "gain_values",
    "quantizer",
    "row_bytes",
]

# ``(bits, values)`` along an axis, the widest first. What gets no bits comes last.
Segments = tuple[tuple[int, int], ...]

# Seven bits are left out: they would be looked up one by one, as eight are.
WIDTHS, MOST_BITS = (0, 1, 2, 3, 4, 5, 6, 8), 8
# Values that fill whole bytes and whole indices in every width.
GROUP = 8
# Codes of a gain for a factor of two, and the least and the largest of them.
_OCTAVE, _LEAST, _LARGEST = 8, -128, 127
# Below it a token's squares are nothing.
_TINY = 1e-30


def row_bytes(latent: Segments, rope: Segments) -> int:
    """Bytes of a token: a gain for each half, and eight values of a width in as many bytes as it has bits."""
    return 2 + sum(bits * -(-count // GROUP) for part in (latent, rope) for bits, count in part)


def gain_codes(x_Bsn: Tensor, segments: Segments, spread: float) -> Tensor:
    """What is stored of each token's gain, ``[B, s, 1]`` int16.

    Args:
        x_Bsn: Values, in units of their spread.
        segments: Their widths.
        spread: Factor on the root mean square of all values that have bits.
    """
    count = sum(values for bits, values in segments if bits)
    square_Bs1 = x_Bsn[..., :count].float().square().sum(-1, keepdim=True)
    level = _OCTAVE * (math.log2(spread) - 0.5 * math.log2(max(1, count)))
    wanted_Bs1 = square_Bs1.clamp_min_(_TINY).log2_().mul_(0.5 * _OCTAVE).add_(level)
    return wanted_Bs1.round_().clamp_(_LEAST, _LARGEST).to(torch.int16)


def gain_values(codes: Tensor) -> Tensor:
    """Gains of their codes, float32."""
    return torch.exp2(codes.float() / _OCTAVE)


class Quantizer:
    """Finds the codes of rows.

    Args:
        segments: Widths of each half's values.
        spreads: Factor on the gains of each half.
        device: Of the rows.

    Attributes:
        widths: Bits of each index's values, in order: half by half, the widest first.
    """

    def __init__(self, segments: tuple[Segments, ...], spreads: tuple[float, ...], device: torch.device) -> None:
        self._segments, self._spreads = segments, spreads
        self.widths: list[int] = []
        vectors: list[list[int]] = []
        # Values that fill up an index are zeros, one column beyond those that there are.
        at, beyond = 0, sum(count for half in segments for _, count in half)
        self._fills = False
        for bits, count in (segment for half in segments for segment in half):
            if bits:
                filled, values = -(-count // GROUP) * GROUP, VALUES_AT_ONCE[bits]
                columns = [at + n if n < count else beyond for n in range(filled)]
                vectors += [columns[n : n + values] for n in range(0, filled, values)]
                self.widths += [bits] * (filled // values)
                self._fills |= filled > count
            at += count
        # By how many values an index stands for.
        together: dict[int, list[int]] = {}
        for number, bits in enumerate(self.widths):
            together.setdefault(VALUES_AT_ONCE[bits], []).append(number)
        order = [number for numbers in together.values() for number in numbers]
        self._columns = _integers([column for number in order for column in vectors[number]], device)
        self._back_f = _integers([order.index(number) for number in range(len(order))], device)
        self._lookups = []
        for values, numbers in together.items():
            books = tuple(sorted({self.widths[number] for number in numbers}))
            find = finder(books, device)
            first = [find.cells * books.index(self.widths[number]) for number in numbers]
            self._lookups.append((find, values * len(numbers), _integers(first, device) if len(books) > 1 else None))

    def codes(self, halves: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Codes of the gains, ``[B, s, h]`` int16, and the indices, ``[B, s, f]`` int32.

        Args:
            halves: Values ``[B, s, n]`` of each, in units of their spread.
        """
        gains = [gain_codes(x_Bsn, *how) for x_Bsn, *how in zip(halves, self._segments, self._spreads, strict=True)]
        gain_Bsh = gains[0] if len(gains) == 1 else torch.cat(gains, dim=-1)
        apart = gain_values(gain_Bsh).split(1, dim=-1)
        even = [x_Bsn.float() / gain_Bs1 for x_Bsn, gain_Bs1 in zip(halves, apart, strict=True)]
        return gain_Bsh, self._indices(even[0] if len(even) == 1 else torch.cat(even, dim=-1))

    def _indices(self, even_Bsn: Tensor) -> Tensor:
        """Of values of all halves, side by side and divided by their gains."""
        rows = even_Bsn.shape[:-1]
        if not self._lookups:
            return even_Bsn.new_empty((*rows, 0), dtype=torch.int32)
        if self._fills:
            even_Bsn = torch.nn.functional.pad(even_Bsn, (0, 1))
        even_Bsm, found = even_Bsn.index_select(-1, self._columns), []
        parts = even_Bsm.split([size for _, size, _ in self._lookups], dim=-1)
        for part_Bsm, (find, size, first_f) in zip(parts, self._lookups, strict=True):
            shape = (*rows, size // find.values)
            first_n = None if first_f is None else first_f.expand(shape).reshape(-1)
            found.append(find.nearest(part_Bsm.reshape(-1, find.values), first_n).view(shape))
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1).index_select(-1, self._back_f)


def _integers(numbers: Sequence[int], device: torch.device) -> Tensor:
    # Not an inference tensor: training rounds rows, too.
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=torch.long, device=device)


@lru_cache(maxsize=256)
def quantizer(segments: tuple[Segments, ...], spreads: tuple[float, ...], device: torch.device) -> Quantizer:
    """The :class:`Quantizer` of these."""
    return Quantizer(segments, spreads, device)


def coded(x_Bsn: Tensor, segments: Segments, spread: float) -> Tensor:
    """Values as they come back from their codes, float32."""
    gain_Bs1, index_Bsf = quantizer((segments,), (spread,), x_Bsn.device).codes([x_Bsn])
    back_Bsn, value, index = torch.zeros_like(x_Bsn, dtype=torch.float32), 0, 0
    for bits, count in segments:
        if not bits:
            continue
        book = codebook(bits, x_Bsn.device)
        end = index + -(-count // GROUP) * GROUP // book.values
        back_Bsn[..., value : value + count] = book.words_kv[index_Bsf[..., index:end]].flatten(-2)[..., :count]
        value, index = value + count, end
    return back_Bsn * gain_values(gain_Bs1)
