"""One layer of a latent model's cache: a row a token, in as few bits as one likes.

A token's row is its latent ``c`` and its roped key ``k_R``. Rows are appended, never touched again: quantised ones keep
the scale that they were given, and the newest may wait in full precision for a while (``residual``). With ``window``
only the first tokens and the last ``N`` are kept (StreamingLLM, Xiao et al., arXiv 2309.17453).

:func:`latentize.accelerate` attends to the rows as they lie. A model that is not accelerated gets latents and keys back
in its own precision, as from any cache of transformers.

Norms that are kept beside a compressed key have a factor each in the row, behind the roped key. They are stored in the
model's precision whatever the format.

B batch, S cached tokens, T new tokens, r kv_lora_rank, P roped keys, R qk_rope_head_dim, K factors, d = r + P R + K.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from latentize.attention.coding import RowCode
from latentize.attention.rope import rotate_half, rotate_interleaved
from latentize.errors import OptionError
from latentize.runtime.codecs import FLOATS, Beside, Codec, Plain, codec
from latentize.runtime.coded import RowCoder
from latentize.runtime.growing import Growing
from latentize.runtime.kernels.storage import Part, encoded_part, plain_part
from latentize.runtime.rotation import rotation_on
from latentize.runtime.rows import BLOCK
from latentize.runtime.sight import Sight
from latentize.runtime.stored_rows import StoredRows

__all__ = ["LatentLayer"]


class LatentLayer(CacheLayerMixin):
    """One layer's rows.

    Args:
        latent, rope: Formats of latents and roped keys; ``None`` is that of the model.
        window, sinks: As in :class:`LatentCache`.
        residual: As in :class:`LatentCache`.
        key_scales: Factors of keys in a row, the last of its values.
    """

    is_sliding = False

    def __init__(
        self,
        latent: str | None,
        rope: str | None,
        window: int | None,
        sinks: int,
        residual: int,
        key_scales: int = 0,
        **_: Any,
    ) -> None:
        # The base class would set `keys` and `values`, which are made on demand here.
        self.formats, self.window, self.sinks, self.residual = (latent, rope), window, sinks, residual
        self.is_croppable, self.key_scales = window is None, key_scales
        # Set by what attends to rows as they lie.
        self.attends_rows = False
        self.frequencies_F: Tensor | None = None
        self.interleaved = False
        self._clear()

    def _clear(self) -> None:
        self.coder: RowCoder | None = None
        self.seen, self.rank, self.roped_keys, self.is_initialized = 0, 0, 1, False
        self.stored, self.recent = Growing(), Growing()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.rank = key_states.dtype, key_states.device, key_states.shape[-1]
        own = Plain(key_states.dtype)
        self.roped_keys = value_states.shape[1] if self.coder is None else 1
        self.rope_size = value_states.shape[1] * value_states.shape[-1] - self.key_scales
        names, sizes = self.formats, (self.rank, self.rope_size)
        self.codecs: tuple[Codec, Codec] = tuple(  # type: ignore[assignment]
            own if name is None else codec(name, size) for name, size in zip(names, sizes, strict=True)
        )
        if self.coder is not None:
            self.codecs = self.coder.codecs
        elif self.key_scales and self.codecs[1] != own:
            self.codecs = self.codecs[0], Beside(self.codecs[1], self.key_scales, key_states.dtype)
        self.plain = all(c == own for c in self.codecs)
        self.is_initialized = True

    def rotation(self, dtype: torch.dtype) -> Tensor | None:
        if self.coder is not None:
            return self.coder.code.latent_unmix_rr.to(self.device, dtype)
        if isinstance(self.codecs[0], Plain):
            return None
        return rotation_on(self.rank, self.device, dtype)

    def codes(self, code: RowCode, exact_BT: Tensor) -> bool:
        """Whether the layer rounds rows itself: it takes the model's code unless it was given formats.

        Args:
            code: How the model's rows are stored.
            exact_BT: Which of the tokens that come next are stored as they are.
        """
        if self.formats == (None, None):
            if self.coder is None:
                self.coder = RowCoder(code, self.residual)
            # The same, but it may have moved to another device.
            self.coder.code = code
            self.coder.expect(exact_BT, first=not self.seen)
        return True

    def _row(self, key_states: Tensor, value_states: Tensor) -> Tensor:
        """Latents and roped keys as they are stored before they are rounded, ``[B, T, d]``."""
        c_BTr = key_states[:, 0]
        if self.coder is not None:
            return self.coder.rows(c_BTr, value_states, self._next(c_BTr.shape[1]), self._kept)
        turn = self.rotation(torch.float32)
        if turn is not None:
            c_BTr = (c_BTr.float() @ turn).to(c_BTr.dtype)
        return torch.cat([c_BTr, value_states.transpose(1, 2).flatten(2)], dim=-1)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """Append ``c [B, 1, T, r]`` and ``k_R [B, P, T, R]``.

        Returns:
            All of both, or where the model attends to rows, a ``StoredRows`` for either.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._trim()
        new, rows_BTd = key_states.shape[2], self._row(key_states, value_states)
        self.recent.append((rows_BTd,))
        self.seen += new
        band_BEd = None
        if self.coder is not None:
            band_BEd = self._code_old(self.coder, new)
        elif not self.plain and self.recent.length >= 2 * self.residual + 1:
            self._store(self.recent.length - self.residual)
        rows = StoredRows(self, key_states.dtype, new, band_BEd)
        if self.attends_rows:
            return rows, rows
        if self.window is not None:
            raise OptionError(
                "a window needs a model that attends to cached rows",
                where="LatentCache",
                fix="latentize.accelerate(model)",
            )
        return rows.tensors()

    def _code_old(self, coder: RowCoder, new: int) -> Tensor | None:
        """Code all rows but the newest; where the new tokens see different ones as they are, return those."""
        have = self.recent.length
        coder.band = min(have, new + coder.newest - 1) if new > 1 and coder.newest else 0
        band_BEd = self.recent.view(have - coder.band, have)[0] if coder.band else None
        if have > coder.newest:
            self._store(have - coder.newest)
        return band_BEd

    @property
    def next_coded(self) -> Tensor | None:
        """The row that is coded when one more token comes, ``[B, 1, d]``."""
        newest = 0 if self.coder is None else self.coder.newest
        return self.recent.view(0, 1)[0] if newest and self.recent.length == newest else None

    def _store(self, count: int) -> None:
        """The oldest of the waiting rows, for good."""
        (old_Bsd,) = self.recent.view(0, count)
        self.stored.append(self._encoded(old_Bsd))
        self.recent.keep(0, self.recent.length - count)

    def _encoded(self, rows_Bsd: Tensor) -> tuple[Tensor, ...]:
        """What is stored of rows."""
        if self.coder is not None:
            return self.coder.encoded(rows_Bsd)
        halves = rows_Bsd.split([self.rank, rows_Bsd.shape[-1] - self.rank], dim=-1)
        return tuple(t for c, half in zip(self.codecs, halves, strict=True) for t in c.encode(half))

    def _restore(self, start: int, stop: int, dtype: torch.dtype, shift: int = 0) -> Tensor:
        """Stored rows, as :meth:`_placed` has them."""
        tensors = self.stored.view(start, stop)
        if self.coder is not None:
            return self.coder.decoded(tensors, start, self._sight(1).number(start, shift), dtype)
        count, (latent, rope) = self._latent_tensors, self.codecs
        return torch.cat([latent.decode(tensors[:count], dtype), rope.decode(tensors[count:], dtype)], dim=-1)

    def _next(self, count: int) -> int | Tensor:
        """Number of the row that comes next, or those of the next ``count``, ``[T]``, where only the device knows."""
        return self.seen

    def _placed(self, rows_Bsd: Tensor, first: int, shift: int) -> Tensor:
        """Coded rows with the angles that the mean of their keys is turned by; others as they are.

        Args:
            rows_Bsd: A block.
            first: Number of its first row among those that are kept.
            shift: Positions by which it seems nearer than it is.
        """
        if self.coder is None:
            return rows_Bsd
        return self.coder.placed(rows_Bsd, self._sight(1).number(first, shift))

    def _trim(self) -> None:
        """Let go of what no later token will see, now and then."""
        if self.window is None or self._kept < self.sinks + 2 * self.window:
            return
        if self.stored.length:
            self.stored.keep(self.sinks, self.window - self.recent.length)
        else:
            self.recent.keep(self.sinks, self.window)
        if self.coder is not None:
            self.coder.exact.forget(self.sinks)

    @property
    def _kept(self) -> int:
        return self.stored.length + self.recent.length

    def _band(self, new: int) -> int:
        """How many rows the ``new`` last tokens see as they are, where each sees others."""
        return self.coder.band if self.coder is not None and new > 1 else 0

    def _sight(self, new: int) -> Sight:
        """What the ``new`` last tokens see."""
        newest = 0 if self.coder is None else self.coder.newest
        where = (self.seen, self._kept, self.stored.length, self.window, self.sinks)
        return Sight(new, *where, self._band(new), newest)

    def positions(self, new: int) -> Tensor:
        """Of every row that some of the ``new`` last tokens see, ``[S]``; those of the band come last."""
        return self._sight(new).positions(self.device)

    def blocks(self, dtype: torch.dtype, new: int, band_BEd: Tensor | None = None) -> Iterator[Tensor]:
        """Rows ``[B, s, d]`` in order, as far as some of the ``new`` last tokens see them; then those of the band."""
        sight = self._sight(new)
        spans, shift = sight.spans_beside_band, sight.shift
        if len(spans) == 1 and shift:
            spans = [(0, self.sinks), (self.sinks, spans[0][1])]
        for number, (start, stop) in enumerate(spans):
            seems = shift if number == 0 else 0
            for rows_Bsd in self._span(start, stop, dtype, seems):
                yield self._turned(rows_Bsd, seems) if seems else rows_Bsd
        if band_BEd is not None:
            yield self._placed(band_BEd, self._kept - band_BEd.shape[1], 0)

    def filled(self, dtype: torch.dtype, new: int, band_BEd: Tensor | None = None) -> Iterator[Tensor]:
        """As ``blocks``, without room that nothing was written to."""
        return self.blocks(dtype, new, band_BEd)

    def allowed(self, mask: Tensor | None, new: int) -> Tensor | None:
        """Of a mask for all tokens, ``[B, h, T, S]``, what the rows of ``blocks`` need; ``None`` is causal."""
        return self._sight(new).allowed(mask, self.device)

    def expanded_mask(self, mask: Tensor | None, new: int) -> Tensor | None:
        """As ``allowed``, for the rows of ``tensors``."""
        return self.allowed(mask, new)

    @property
    def gone(self) -> int:
        """Rows that were let go of, between the sinks and the rest."""
        return self.seen - self._kept

    def parts(self) -> list[Part]:
        """All rows that are kept, as they lie."""
        border, found = self.stored.length, []
        if border and self.coder is not None:
            found = self.coder.parts(self.stored.tensors, border, full=True)
        elif border:
            found = [self._part(self.stored.tensors, border)]
        if self.recent.length:
            where = {"first": border, "full": True, "key_scales": self.key_scales}
            found.append(plain_part(self.recent.tensors[0], self.rank, self.recent.length, **where))
        return found

    def _part(self, tensors: tuple[Tensor, ...], count: int) -> Part:
        """Encoded rows, as a kernel reads them."""
        border, (latent, rope) = self._latent_tensors, self.formats
        names, sizes = (latent or FLOATS[self.dtype], rope or FLOATS[self.dtype]), (self.rank, self.rope_size)
        return encoded_part(tensors[:border], tensors[border:], names, sizes, count, self.key_scales)

    @property
    def _latent_tensors(self) -> int:
        # A format with a scale has two tensors, one without has one.
        return 1 if self.coder is not None or isinstance(self.codecs[0], Plain) else 2

    def lengths_B(self) -> Tensor:
        """Rows that are kept of every sequence, int32, on the device."""
        batch = (self.stored if self.stored.length else self.recent).tensors[0].shape[0]
        return torch.full((batch,), self._kept, dtype=torch.int32, device=self.device)

    def turned_back(self, q_BHTR: Tensor, new: int) -> Tensor | None:
        """Roped queries for the sinks, where those are to seem nearer than they are."""
        shift = self._sight(new).shift
        if not shift or not self.sinks or self.frequencies_F is None:
            return None
        turn, (cos, sin) = self._turn(-shift)
        # Queries that serve several roped keys hold one stretch for each, as the rows do.
        return turn(q_BHTR.unflatten(-1, (self.roped_keys, -1)), cos, sin).flatten(-2)

    def _turn(self, shift: int) -> tuple[Callable[..., Tensor], tuple[Tensor, Tensor]]:
        """How to turn pairs by so many positions: the function, and its cosines and sines."""
        assert self.frequencies_F is not None
        angle_F = shift * self.frequencies_F.to(self.device, torch.float64)
        if self.coder is not None:
            # All keys turn alike, and components stand side by side.
            angle_J = angle_F[0, self.coder.code.pair_J.long()]
            return rotate_interleaved, (angle_J.cos(), angle_J.sin())
        return rotate_interleaved if self.interleaved else rotate_half, (angle_F.cos(), angle_F.sin())

    def _span(self, start: int, stop: int, dtype: torch.dtype, shift: int = 0) -> Iterator[Tensor]:
        border = self.stored.length
        for begin in range(start, min(stop, border), BLOCK):
            yield self._restore(begin, min(begin + BLOCK, stop, border), dtype, shift)
        if stop > border:
            begin = max(start, border)
            yield self._placed(self.recent.view(begin - border, stop - border)[0], begin, shift)

    def _turned(self, rows_Bsd: Tensor, shift: int) -> Tensor:
        if self.frequencies_F is None:
            return rows_Bsd
        turn, (cos, sin) = self._turn(shift)
        c_Bsr, k_BsR, rest = rows_Bsd.tensor_split([self.rank, self.rank + self.rope_size], dim=-1)
        k_BsPR = k_BsR.unflatten(-1, (self.roped_keys, -1))
        return torch.cat([c_Bsr, turn(k_BsPR, cos, sin).flatten(2), rest], dim=-1)

    @property
    def keys(self) -> Tensor:
        """Latents ``[B, 1, S, r]``, restored."""
        return StoredRows(self, self.dtype, 1).tensors()[0]

    @property
    def values(self) -> Tensor:
        """Roped keys ``[B, P, S, R]``, restored."""
        return StoredRows(self, self.dtype, 1).tensors()[1]

    @property
    def nbytes(self) -> int:
        """Bytes that the layer's tensors take up."""
        exact = 0 if self.coder is None else self.coder.exact.nbytes
        return self.stored.nbytes + self.recent.nbytes + exact

    @property
    def row_bytes(self) -> int:
        """Bytes of a token's row once it is stored for good."""
        if self.coder is not None:
            return self.coder.code.row_bytes
        tensors = (self.stored if self.stored.tensors else self.recent).tensors
        return sum(t[:1, :1].numel() * t.element_size() for t in tensors)

    @property
    def columns(self) -> int:
        return self.seen

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        count = abs(tokens_to_remove)
        if not self.is_initialized or count == 0:
            return
        if self.window is not None:
            raise OptionError("a cache with a window cannot be cropped", where="LatentCache", fix="use none here")
        self.seen -= count
        waiting = min(count, self.recent.length)
        self.recent.length -= waiting
        self.stored.length -= count - waiting
        if self.coder is not None:
            self.coder.exact.forget(self.seen)

    def _map(self, change: Any) -> None:
        self.stored.map(change)
        self.recent.map(change)
        if self.coder is not None:
            self.coder.exact.map(change)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda t: t[indices])
