"""How cached values are stored: as they are, in 8 or 4 bits with a scale for each token, or in widths of their own.

A codec maps ``x [B, S, n]`` to tensors that share the first two axes, so that tokens are appended without touching
those before them, and back. Scales are rounded before they are used: their own rounding costs nothing.

B batch, S tokens, n values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Protocol

import torch
from torch import Tensor

from latentize.attention.codebooks import VALUES_AT_ONCE, codebook, words
from latentize.attention.quantizer import GROUP, Segments, gain_values, quantizer
from latentize.errors import OptionError

__all__ = [
    "FLOATS",
    "FORMATS",
    "Beside",
    "Codec",
    "Coded",
    "Float8",
    "Int4",
    "Int8",
    "Plain",
    "all_words",
    "codec",
    "encode_together",
]

_TINY = 1e-30


class Codec(Protocol):
    """Stores and restores rows."""

    def encode(self, x_BSn: Tensor) -> tuple[Tensor, ...]: ...

    def decode(self, stored: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor: ...


@dataclass(frozen=True)
class Plain:
    """A floating-point type."""

    dtype: torch.dtype

    def encode(self, x_BSn: Tensor) -> tuple[Tensor, ...]:
        return (x_BSn.to(self.dtype),)

    def decode(self, stored: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        return stored[0].to(dtype)


def _scale(x_BSn: Tensor, largest: float) -> Tensor:
    """Per token, so that its largest value is ``largest`` steps, in bfloat16."""
    top_BS1 = x_BSn.abs().amax(-1, keepdim=True).float().clamp_min(_TINY)
    # A little more than is needed: rounding down must not push values over the edge.
    return (top_BS1 * (1 + 2**-8) / largest).to(torch.bfloat16)


@dataclass(frozen=True)
class Int8:
    """127 steps to either side."""

    def encode(self, x_BSn: Tensor) -> tuple[Tensor, ...]:
        scale_BS1 = _scale(x_BSn, 127)
        return (x_BSn.float() / scale_BS1.float()).round().clamp(-127, 127).to(torch.int8), scale_BS1

    def decode(self, stored: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        steps_BSn, scale_BS1 = stored
        return steps_BSn.to(dtype) * scale_BS1.to(dtype)


@dataclass(frozen=True)
class Float8:
    """``float8_e4m3fn``: 4 bits of exponent, 3 of mantissa, kept as bytes."""

    def encode(self, x_BSn: Tensor) -> tuple[Tensor, ...]:
        scale_BS1 = _scale(x_BSn, 448)
        return (x_BSn.float() / scale_BS1.float()).to(torch.float8_e4m3fn).view(torch.uint8), scale_BS1

    def decode(self, stored: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        byte_BSn, scale_BS1 = stored
        # A table is three times as fast as PyTorch's conversion; so is arithmetic on the bits, but for subnormals.
        return _looked_up(byte_BSn.int(), _float8s(dtype, byte_BSn.device), dtype) * scale_BS1.to(dtype)


@cache
def _float8s(dtype: torch.dtype, device: torch.device) -> Tensor:
    return _as_wide(torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).to(dtype)[:, None])


@cache
def _pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The two steps of each byte."""
    byte = torch.arange(256, device=device)
    return _as_wide(torch.stack([byte & 15, byte >> 4], dim=1).to(dtype) - 7.5)


# Anything of so many bytes that is moved as one.
_WIDE = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def _as_wide(table_bv: Tensor) -> Tensor:
    """A table with one wide number for all values of a row, if there is one of their size: one fetch instead of
    several, and twice as fast along one axis."""
    wide = _WIDE.get(table_bv.shape[1] * table_bv.element_size())
    return table_bv if wide is None else table_bv.contiguous().view(wide)[:, 0]


def _looked_up(index_BSm: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of each index, side by side.

    Args:
        index_BSm: Which rows of the table; 32 bits.
        table: As ``_as_wide`` gives it.
        dtype: What the values are.
    """
    found = table.index_select(0, index_BSm.flatten())
    return found.view(dtype).view(*index_BSm.shape[:-1], -1)


@dataclass(frozen=True)
class Int4:
    """Sixteen levels, half-integers from -7.5 to 7.5: none is wasted on a zero that rotated values never have.

    Values of even number are in the low halves of the bytes, those after them in the high ones; an odd ``n`` is
    rounded up.

    Attributes:
        size: ``n``.
    """

    size: int

    def encode(self, x_BSn: Tensor) -> tuple[Tensor, ...]:
        scale_BS1 = _scale(x_BSn, 7.5)
        level_BSn = (x_BSn.float() / scale_BS1.float() + 7.5).round().clamp(0, 15).to(torch.uint8)
        if level_BSn.shape[-1] % 2:
            level_BSn = torch.nn.functional.pad(level_BSn, (0, 1))
        return level_BSn[..., ::2] | (level_BSn[..., 1::2] << 4), scale_BS1

    def decode(self, stored: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        byte_BSm, scale_BS1 = stored
        steps_BSn = _looked_up(byte_BSm.int(), _pairs(dtype, byte_BSm.device), dtype)
        return steps_BSn[..., : self.size] * scale_BS1.to(dtype)


@dataclass(frozen=True)
class Beside:
    """All values but the last few by a codec, those as they are: one of a kind has no part in what others share.

    Attributes:
        others: Stores the others.
        count: How many are stored as they are.
        dtype: In which type.
    """

    others: Codec
    count: int
    dtype: torch.dtype

    def encode(self, x_BSn: Tensor) -> tuple[Tensor, ...]:
        return *self.others.encode(x_BSn[..., : -self.count]), x_BSn[..., -self.count :].to(self.dtype)

    def decode(self, stored: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        *others, last_BSk = stored
        return torch.cat([self.others.decode(tuple(others), dtype), last_BSk.to(dtype)], dim=-1)


@cache
def _words(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values of each index."""
    with torch.inference_mode(False):
        return _as_wide(codebook(bits, device).words_kv.to(dtype))


@cache
def _high_bits(rest: int, device: torch.device) -> Tensor:
    """What a byte says of the bits beyond eight of ``8 / rest`` indices, int32."""
    with torch.inference_mode(False):
        byte = torch.arange(256, device=device, dtype=torch.int32)[:, None]
        return _as_wide((byte >> _shifts(rest, device) & (1 << rest) - 1) << 8)


@dataclass(frozen=True)
class Coded:
    """Values in units of their spread, in as many bits as each is worth, with one gain for each token.

    A row is its gain, a byte, and the indices of all values one after the other, the lowest bits first.

    Attributes:
        segments: ``(bits, values)``, the widest first, values in multiples of eight; what has no bits comes back as
            zero.
        spread: Factor on the gains.
    """

    segments: Segments
    spread: float

    def encode(self, x_BSn: Tensor) -> tuple[Tensor, ...]:
        return encode_together((self,), x_BSn)

    def decode(self, stored: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        even_BSb = self.even(stored, dtype).mul_(self.gains(stored, dtype))
        return torch.nn.functional.pad(even_BSb, (0, self.without_bits))

    def gains(self, stored: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """Of each token, ``[B, S, 1]``."""
        return gain_values(stored[0][..., :1], dtype)

    def places(self, device: torch.device) -> Tensor:
        """Where a kernel finds each value before its gain, ``[6, n]`` int32.

        A value's index is ``row[p0] + 256 ((row[p1] >> p2) & p3)``; the value, ``all_words(device)[p4 + p5 index]``.
        ``p3`` is zero for indices of one byte, ``p5`` for values that have no bits.
        """
        return _places(self.segments, device)

    def even(self, stored: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """Values that have bits, before their gain, ``[B, S, b]``."""
        # Once a row, where each segment would do it for itself: tables are looked up by integers of 32 bits.
        byte_BSm = stored[0].to(torch.int32)
        with_bits = [(bits, count) for bits, count in self.segments if bits and count]
        if not with_bits:
            return byte_BSm.new_empty((*byte_BSm.shape[:-1], 0), dtype=dtype)
        _, *segments = byte_BSm.split([1, *(bits * -(-count // GROUP) for bits, count in with_bits)], dim=-1)
        made = [_unpacked(own_BSk, bits, dtype) for (bits, _), own_BSk in zip(with_bits, segments, strict=True)]
        if byte_BSm.device.type == "cpu" and not any(count % GROUP for _, count in with_bits):
            # Short runs are copied faster in wide pieces.
            return torch.cat([own.view(torch.complex128) for own in made], dim=-1).view(dtype)
        return torch.cat([own[..., :count] for (_, count), own in zip(with_bits, made, strict=True)], dim=-1)

    @property
    def without_bits(self) -> int:
        """Values that have none, the last ones."""
        return sum(count for bits, count in self.segments if not bits)


def encode_together(codecs: Sequence[Coded], rows_BSn: Tensor) -> tuple[Tensor, ...]:
    """What each codec stores of its values, which lie side by side: one row asks for as many operations as thousands,
    so all that can be is done together."""
    segments, device = tuple(c.segments for c in codecs), rows_BSn.device
    pack = _packing(segments, device)
    gain_BSh, index_BSf = quantizer(segments, tuple(c.spread for c in codecs), device).codes(rows_BSn.float())
    high_BSf = index_BSf.index_select(-1, pack.wide_f) >> 8 << pack.shift_f
    high_BSm = high_BSf.new_zeros((*high_BSf.shape[:-1], pack.highs))
    high_BSm.scatter_add_(-1, pack.high_f.expand_as(high_BSf), high_BSf)
    made_BSm = torch.cat([gain_BSh, index_BSf & 255, high_BSm], dim=-1)
    return made_BSm.index_select(-1, pack.order_m).to(torch.uint8).split(pack.sizes, dim=-1)


@dataclass(frozen=True)
class _Packing:
    """How bytes are made of gains and indices.

    A half is its gain and its segments. An index of more than eight bits is in two places: the lowest eight bits of all
    indices of the segment, then the rest of all, the first in the lowest bits.

    Attributes:
        wide_f: Numbers of the indices of more than eight bits.
        shift_f, high_f: What their rest is shifted by, and the number of the byte that it goes to.
        highs: How many of these bytes there are.
        order_m: Of gains, lowest bits and bytes of the rest, what comes where.
        sizes: Bytes of each half.
    """

    wide_f: Tensor
    shift_f: Tensor
    high_f: Tensor
    highs: int
    order_m: Tensor
    sizes: list[int]


@lru_cache(maxsize=256)
def _packing(segments: tuple[Segments, ...], device: torch.device) -> _Packing:
    wide: list[tuple[int, int, int]] = []
    order: list[tuple[int, int]] = []
    sizes, lows, highs = [], 0, 0
    for half, some in enumerate(segments):
        began = len(order)
        order.append((0, half))
        for bits, count in some:
            if not bits:
                continue
            indices, rest = -(-count // GROUP) * GROUP // VALUES_AT_ONCE[bits], bits * VALUES_AT_ONCE[bits] - 8
            order += [(1, lows + n) for n in range(indices)]
            order += [(2, highs + n) for n in range(indices * rest // 8)]
            wide += [(lows + n, n * rest % 8, highs + n * rest // 8) for n in range(indices if rest else 0)]
            lows, highs = lows + indices, highs + indices * rest // 8
        sizes.append(len(order) - began)
    first = (0, len(segments), len(segments) + lows)
    with torch.inference_mode(False):
        wide_f, shift_f, high_f = torch.tensor(wide, dtype=torch.long, device=device).view(-1, 3).T.contiguous()
        order_m = torch.tensor([first[kind] + n for kind, n in order], device=device)
    return _Packing(wide_f, shift_f.to(torch.int32), high_f, highs, order_m, sizes)


@cache
def _shifts(rest: int, device: torch.device) -> Tensor:
    """Of the bits beyond eight of the indices that share a byte."""
    with torch.inference_mode(False):
        return torch.arange(0, 8, rest, device=device, dtype=torch.int32)


def _unpacked(byte_BSm: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Values of a segment, of its bytes as ``_Packing`` puts them."""
    table, rest = _words(bits, dtype, byte_BSm.device), bits * VALUES_AT_ONCE[bits] - 8
    if not rest:
        return _looked_up(byte_BSm, table, dtype)
    border = byte_BSm.shape[-1] * 8 // (8 + rest)
    low_BSf, high_BSk = byte_BSm.tensor_split([border], dim=-1)
    high_BSf = _looked_up(high_BSk, _high_bits(rest, byte_BSm.device), torch.int32)
    return _looked_up(high_BSf.bitwise_or_(low_BSf), table, dtype)


@lru_cache(maxsize=256)
def _places(segments: Segments, device: torch.device) -> Tensor:
    """As ``_Packing`` puts them."""
    first_word, total = {}, 0
    for bits, values in VALUES_AT_ONCE.items():
        first_word[bits], total = total, total + (values << bits * values)
    found, at = [], 1
    for bits, count in segments:
        if not bits:
            found += [(0,) * 6] * count
            continue
        values, whole = VALUES_AT_ONCE[bits], -(-count // GROUP) * GROUP
        border, rest = at + whole // values, bits * values - 8
        for value in range(count):
            index, within = divmod(value, values)
            high, shift = divmod(index * rest, 8)
            found.append((at + index, border + high, shift, (1 << rest) - 1, first_word[bits] + within, values))
        at += bits * whole // 8
    with torch.inference_mode(False):
        return torch.tensor(found, dtype=torch.int32, device=device).view(-1, 6).T.contiguous()


@lru_cache(maxsize=64)
def all_words(device: torch.device) -> Tensor:
    """The words of all codebooks one after the other, float16; see :meth:`Coded.places`."""
    with torch.inference_mode(False):
        return torch.cat([words(bits).flatten() for bits in VALUES_AT_ONCE]).to(device)


_FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FORMATS = (*_FLOATS, "fp8", "int8", "int4")
FLOATS = {dtype: name for name, dtype in _FLOATS.items()}


def codec(name: str, size: int) -> Codec:
    """The codec of a name in ``FORMATS`` for rows of ``size`` values.

    Raises:
        OptionError: there is none of that name.
    """
    if name in _FLOATS:
        return Plain(_FLOATS[name])
    if name == "fp8":
        return Float8()
    if name == "int8":
        return Int8()
    if name == "int4":
        return Int4(size)
    raise OptionError(f"no cache format '{name}'", where="LatentCache", fix=f"there are {', '.join(FORMATS)}")
