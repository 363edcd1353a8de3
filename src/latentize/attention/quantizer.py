"""Values to codes: a gain for all of a token's values together, and an index into a codebook for some neighbours.

A row has one or more halves (a latent, roped keys), and each a gain of its own. One token asks for as many operations
as thousands, so all halves and widths are looked up together, as far as their indices stand for equally many values.

B batch, s tokens, h halves, n values of a half, f indices.
"""

from __future__ import annotations

from functools import cache, lru_cache

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
# Codes of a gain for a factor of two, the code of one, and the largest.
_OCTAVE, _ONE, _LARGEST = 8, 128, 255
# Below it a token's squares are nothing.
_TINY = 1e-30


def row_bytes(latent: Segments, rope: Segments) -> int:
    """Bytes of a token: a gain for each half, and eight values of a width in as many bytes as it has bits."""
    return 2 + sum(bits * -(-count // GROUP) for part in (latent, rope) for bits, count in part)


def gain_values(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gains of their codes, ``[..., h]``."""
    return _gains(dtype, codes.device).index_select(0, codes.flatten().int()).view(codes.shape)


@cache
def _gains(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Of all codes."""
    with torch.inference_mode(False):
        return torch.exp2((torch.arange(_LARGEST + 1, device=device) - _ONE).double() / _OCTAVE).to(dtype)


class Quantizer:
    """Finds the codes of rows.

    Args:
        segments: Widths of each half's values.
        spreads: Factor on each half's gain, which is the root mean square of its values that have bits.
        device: Of the rows.
    """

    def __init__(self, segments: tuple[Segments, ...], spreads: tuple[float, ...], device: torch.device) -> None:
        # Column, index and half by half, the widest first. Values that fill up an index are zeros, one column beyond.
        at, beyond = 0, sum(count for half in segments for _, count in half)
        vectors: list[tuple[int, int, list[int]]] = []
        counted_nh = torch.zeros(beyond, len(segments), dtype=torch.float32)
        self._fills = False
        for half, (bits, count) in ((half, segment) for half, some in enumerate(segments) for segment in some):
            if bits:
                filled, values = -(-count // GROUP) * GROUP, VALUES_AT_ONCE[bits]
                columns = [at + n if n < count else beyond for n in range(filled)]
                vectors += [(half, bits, columns[n : n + values]) for n in range(0, filled, values)]
                counted_nh[at : at + count, half] = 1
                self._fills |= filled > count
            at += count
        counts_h = counted_nh.sum(0).clamp_min(1)
        level_h = _ONE + _OCTAVE * (torch.tensor(spreads, dtype=torch.float32).log2() - 0.5 * counts_h.log2())
        # By how many values an index stands for.
        together: dict[int, list[int]] = {}
        for number, (_, bits, _) in enumerate(vectors):
            together.setdefault(VALUES_AT_ONCE[bits], []).append(number)
        order = [number for numbers in together.values() for number in numbers]
        back = [0] * len(order)
        for place, number in enumerate(order):
            back[number] = place
        self._lookups = []
        with torch.inference_mode(False):
            # Not inference tensors: training rounds rows, too.
            self._counted_nh, self._level_h = counted_nh.to(device), level_h.to(device)
            columns = [(column, half) for half, _, some in (vectors[number] for number in order) for column in some]
            self._column_m, self._half_m = (
                torch.tensor(columns, dtype=torch.long, device=device).view(-1, 2).T.contiguous()
            )
            self._back_f = torch.tensor(back, dtype=torch.long, device=device)
            for values, numbers in together.items():
                books = tuple(sorted({vectors[number][1] for number in numbers}))
                find = finder(books, device)
                first_f = torch.tensor([find.cells * books.index(vectors[n][1]) for n in numbers], device=device)
                self._lookups.append((find, values * len(numbers), first_f if len(books) > 1 else None))

    def gain_codes(self, x_Bsn: Tensor) -> Tensor:
        """What is stored of the gains of rows, a byte each, ``[B, s, h]`` int32.

        Args:
            x_Bsn: Values of all halves side by side, in units of their spread, float32.
        """
        with torch.autocast(x_Bsn.device.type, enabled=False):
            square_Bsh = (x_Bsn.square() @ self._counted_nh).clamp_min_(_TINY)
        wanted_Bsh = square_Bsh.log2_().mul_(0.5 * _OCTAVE).add_(self._level_h)
        # What is no number has some code, too.
        return wanted_Bsh.round_().clamp_(0, _LARGEST).int().clamp_(0)

    def codes(self, x_Bsn: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of the gains, ``[B, s, h]``, and indices, ``[B, s, f]`` int32: half by half, the widest first.

        Args:
            x_Bsn: As in :meth:`gain_codes`.
        """
        gain_Bsh, rows = self.gain_codes(x_Bsn), x_Bsn.shape[:-1]
        if not self._lookups:
            return gain_Bsh, gain_Bsh.new_empty((*rows, 0))
        if self._fills:
            x_Bsn = torch.nn.functional.pad(x_Bsn, (0, 1))
        even_Bsm = x_Bsn.index_select(-1, self._column_m)
        even_Bsm /= gain_values(gain_Bsh).index_select(-1, self._half_m)
        found = []
        parts = even_Bsm.split([size for _, size, _ in self._lookups], dim=-1)
        for part_Bsm, (find, size, first_f) in zip(parts, self._lookups, strict=True):
            shape = (*rows, size // find.values)
            first_n = None if first_f is None else first_f.expand(shape).reshape(-1)
            found.append(find.nearest(part_Bsm.reshape(-1, find.values), first_n).view(shape))
        return gain_Bsh, found[0] if len(found) == 1 else torch.cat(found, dim=-1).index_select(-1, self._back_f)


@lru_cache(maxsize=256)
def quantizer(segments: tuple[Segments, ...], spreads: tuple[float, ...], device: torch.device) -> Quantizer:
    """The :class:`Quantizer` of these."""
    return Quantizer(segments, spreads, device)


def coded(x_Bsn: Tensor, segments: Segments, spread: float) -> Tensor:
    """Values as they come back from their codes, float32."""
    gain_Bs1, index_Bsf = quantizer((segments,), (spread,), x_Bsn.device).codes(x_Bsn.float())
    back_Bsn, value, index = torch.zeros_like(x_Bsn, dtype=torch.float32), 0, 0
    for bits, count in segments:
        if not bits:
            continue
        book = codebook(bits, x_Bsn.device)
        end = index + -(-count // GROUP) * GROUP // book.values
        back_Bsn[..., value : value + count] = book.words_kv[index_Bsf[..., index:end]].flatten(-2)[..., :count]
        value, index = value + count, end
    return back_Bsn * gain_values(gain_Bs1)
