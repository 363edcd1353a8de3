"""A layer of a static cache: all its room is there from the first token on, and how much of it is filled stands on the
device. No step reads a length on the host, makes a tensor of another size or moves one: it can be captured in a CUDA
graph, and replayed.

The host counts, too, for prompts and refusals; who replays a graph tells it (:meth:`StaticLatentLayer.advance`).

B batch, S room, T new tokens, r kv_lora_rank, P roped keys, R qk_rope_head_dim, d = r + P R.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from latentize.attention.masks import narrowed, newest_mask
from latentize.errors import OptionError
from latentize.runtime.coded import with_angles
from latentize.runtime.kernels.storage import Part
from latentize.runtime.layer import LatentLayer
from latentize.runtime.rows import BLOCK
from latentize.runtime.stored_rows import StoredRows

__all__ = ["MaskColumns", "StaticLatentLayer"]


class MaskColumns(int):
    """Columns of a mask, where there needs to be none: the layer knows on the device which rows are filled."""


class StaticLatentLayer(LatentLayer):
    """One layer's rows.

    Args:
        latent, rope: Formats of latents and roped keys; ``None`` is that of the model.
        max_length: Tokens that there is room for.
        key_scales: As of :class:`LatentLayer`.
    """

    def __init__(self, latent: str | None, rope: str | None, max_length: int, key_scales: int = 0) -> None:
        self.max_length = max_length
        super().__init__(latent, rope, window=None, sinks=0, residual=0, key_scales=key_scales)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        batch = key_states.shape[0]
        one = key_states.new_zeros(batch, 1, self.rank + self.rope_size + self.key_scales)
        self.stored.tensors = tuple(t.new_zeros(batch, self.max_length, t.shape[-1]) for t in self._encoded(one))
        self.filled_B = torch.zeros(batch, dtype=torch.int32, device=self.device)
        # The newest rows as they are, in places that their numbers tell, and those numbers; -1 is none.
        count, size = self._newest, self.rank + self.rope_size
        self.newest_BNd = torch.zeros(batch, count, size, dtype=self.dtype, device=self.device)
        self.newest_N = torch.full((count,), -1, device=self.device)

    @property
    def _newest(self) -> int:
        return 0 if self.coder is None else self.coder.newest

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """As ``LatentLayer.update``; the rows that are returned lie among ``max_length``."""
        new = key_states.shape[2]
        if self.seen + new > self.max_length:
            raise OptionError(
                f"{self.seen + new} tokens in a cache of {self.max_length}",
                where="LatentCache",
                fix="a larger max_length",
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows_BTd, at_T = self._row(key_states, value_states), self._next(new)
        for mine, more in zip(self.stored.tensors, self._encoded(rows_BTd), strict=True):
            mine.index_copy_(1, at_T, more)
        band_BEd = self._keep_newest(rows_BTd, at_T)
        self.filled_B.add_(new)
        self.advance(new)
        rows = StoredRows(self, key_states.dtype, new, band_BEd)
        return (rows, rows) if self.attends_rows else rows.tensors()

    def _keep_newest(self, rows_BTd: Tensor, at_T: Tensor) -> Tensor | None:
        """Keep the newest rows as they are, for later tokens.

        Returns:
            Rows that these tokens see so, ``[B, E, d]``, those that were kept before and the new ones; ``None`` if
            there is one token, which sees what is kept now.
        """
        coder = self.coder
        if coder is None or not coder.newest:
            return None
        new, band_BEd, coder.band = len(at_T), None, 0
        if new > 1:
            before_N = self.newest_N[(self.newest_N >= 0) & (self.newest_N > at_T[0] - coder.newest)].sort().values
            band_BEd = torch.cat([self.newest_BNd[:, before_N % coder.newest], rows_BTd], dim=1)
            coder.band = band_BEd.shape[1]
        last_N = at_T[-coder.newest :]
        self.newest_BNd.index_copy_(1, last_N % coder.newest, rows_BTd[:, -coder.newest :])
        self.newest_N.index_copy_(0, last_N % coder.newest, last_N)
        return band_BEd

    def _next(self, count: int) -> Tensor:
        return self.filled_B[:1].long() + torch.arange(count, device=self.device)

    def advance(self, tokens: int) -> None:
        """Tell the host of tokens that a replayed graph has added."""
        self.seen += tokens
        self.stored.length = self.seen

    def rewind(self, tokens: int) -> None:
        """Forget all but the first ``tokens``; nothing is moved."""
        self.seen = self.stored.length = tokens
        if self.coder is not None:
            self.coder.exact.forget(tokens)
        if self.is_initialized:
            self.filled_B.fill_(tokens)
            self.newest_N.masked_fill_(self.newest_N >= tokens, -1)

    def blocks(self, dtype: torch.dtype, new: int, band_BEd: Tensor | None = None) -> Iterator[Tensor]:
        """Rows ``[B, s, d]`` of all the room: how much is filled, no shape may tell. Then those of the band."""
        for start in range(0, self.max_length, BLOCK):
            yield self._restore(start, min(start + BLOCK, self.max_length), dtype)
        if self._newest:
            yield self._exact_rows(new, band_BEd)

    def filled(self, dtype: torch.dtype, new: int, band_BEd: Tensor | None = None) -> Iterator[Tensor]:
        start = 0
        for rows_Bsd in self._span(0, self.seen, dtype):
            if band_BEd is None:
                at_N = self.newest_N[(self.newest_N >= start) & (self.newest_N < start + rows_Bsd.shape[1])]
                newest_BEd = self.newest_BNd[:, at_N % max(1, self._newest)]
                rows_Bsd[:, at_N - start, : newest_BEd.shape[-1]] = newest_BEd
            yield rows_Bsd
            start += rows_Bsd.shape[1]
        if band_BEd is not None:
            yield self._exact_rows(new, band_BEd)

    def _exact_rows(self, new: int, band_BEd: Tensor | None) -> Tensor:
        """Rows that are seen as they are, ``[B, E, d]``: the band, or what one token sees."""
        assert self.coder is not None
        rows_BEd = self.newest_BNd if band_BEd is None else band_BEd
        return with_angles(rows_BEd, self.coder.angles(self._exact_at(new).clamp_min(0)))

    def _exact_at(self, new: int) -> Tensor:
        """The numbers of those rows, ``[E]``."""
        if new == 1:
            return self.newest_N
        return self.filled_B[0] + torch.arange(-self._band(new), 0, device=self.device)

    def expanded_mask(self, mask: Tensor | None, new: int) -> Tensor | None:
        if self._band(new):
            return self._allowed(mask, new, self.seen)
        return None if mask is None else mask[..., : self.seen]

    def allowed(self, mask: Tensor | None, new: int) -> Tensor | None:
        if mask is not None and not self._newest:
            return mask
        return self._allowed(mask, new, self.max_length)

    def _allowed(self, mask: Tensor | None, new: int, room: int) -> Tensor:
        """For so many stored rows, and those that are seen as they are."""
        at_S = torch.arange(room, device=self.device)
        at_T = self.filled_B[0] + torch.arange(-new, 0, device=self.device)
        if not self._newest:
            return (at_S <= at_T[:, None])[None, None]
        at_E = self._exact_at(new)
        seen_TS = newest_mask(at_T, at_S, at_E, self._newest)
        # What is not there has no number.
        seen_TS[:, room:] &= at_E >= 0
        return narrowed(mask, seen_TS, torch.cat([at_S, at_E.clamp_min(0)]))

    def parts(self) -> list[Part]:
        if self.coder is not None:
            newest = (self.newest_BNd, self.newest_N.expand(len(self.newest_BNd), -1)) if self._newest else None
            return self.coder.parts(self.stored.tensors, self.max_length, newest)
        return [self._part(self.stored.tensors, self.max_length)]

    def lengths_B(self) -> Tensor:
        return self.filled_B

    @property
    def columns(self) -> int:
        return self.max_length

    def get_seq_length(self) -> Any:
        """On the device, as ``StaticLayer`` of transformers has it; 0 before the first token."""
        return self.filled_B[0] if self.attends_rows and self.is_initialized else self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # A model that is not accelerated gets the tokens that are there, and so does the first prompt.
        return (MaskColumns(self.max_length) if self.attends_rows else self.seen + query_length), 0

    def get_max_length(self) -> int:
        return self.max_length

    def reset(self) -> None:
        self.rewind(0)

    def crop(self, tokens_to_remove: int) -> None:
        self.rewind(self.seen - abs(tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for t in (*self.stored.tensors, self.newest_BNd):
            t.copy_(t.index_select(0, beam_idx.to(t.device)))

    def _map(self, change: Any) -> None:
        super()._map(change)
        self.filled_B, self.newest_BNd = change(self.filled_B), change(self.newest_BNd)
