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

from latentize.errors import OptionError
from latentize.runtime.kernels.storage import Part
from latentize.runtime.layer import BLOCK, LatentLayer, Rows

__all__ = ["MaskColumns", "StaticLatentLayer"]


class MaskColumns(int):
    """Columns of a mask, where there needs to be none: the layer knows on the device which rows are filled."""


class StaticLatentLayer(LatentLayer):
    """One layer's rows.

    Args:
        latent, rope: Formats of latents and roped keys; ``None`` is that of the model.
        max_length: MaskColumns, in tokens.
    """

    def __init__(self, latent: str | None, rope: str | None, max_length: int) -> None:
        self.max_length = max_length
        super().__init__(latent, rope, window=None, sinks=0, residual=0)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        batch = key_states.shape[0]
        one = [
            t
            for c, size in zip(self.codecs, (self.rank, self.rope_size), strict=True)
            for t in c.encode(key_states.new_zeros(batch, 1, size))
        ]
        self.stored.tensors = tuple(t.new_zeros(batch, self.max_length, t.shape[-1]) for t in one)
        self.filled_B = torch.zeros(batch, dtype=torch.int32, device=self.device)

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
        if self.code is not None and self._new_exact_BT is not None:
            self.exact.add(rows_BTd, self._new_exact_BT, self.seen, self.code.sinks)
        halves = rows_BTd.split([self.rank, rows_BTd.shape[-1] - self.rank], dim=-1)
        encoded = [t for c, half in zip(self.codecs, halves, strict=True) for t in c.encode(half)]
        for mine, more in zip(self.stored.tensors, encoded, strict=True):
            mine.index_copy_(1, at_T, more)
        self.filled_B.add_(new)
        self.advance(new)
        rows = Rows(self, key_states.dtype, new)
        return (rows, rows) if self.attends_rows else rows.tensors()

    def _next(self, count: int) -> Tensor:
        return self.filled_B[:1].long() + torch.arange(count, device=self.device)

    def advance(self, tokens: int) -> None:
        """Tell the host of tokens that a replayed graph has added."""
        self.seen += tokens
        self.stored.length = self.seen

    def rewind(self, tokens: int) -> None:
        """Forget all but the first ``tokens``; nothing is moved."""
        self.seen = self.stored.length = tokens
        self.exact.forget(tokens)
        if self.is_initialized:
            self.filled_B.fill_(tokens)

    def blocks(self, dtype: torch.dtype, new: int) -> Iterator[Tensor]:
        """Rows ``[B, s, d]`` of all the room: how much is filled, no shape may tell."""
        for start in range(0, self.max_length, BLOCK):
            yield self._placed(self._restore(start, min(start + BLOCK, self.max_length), dtype), start, 0)

    def filled(self, dtype: torch.dtype, new: int) -> Iterator[Tensor]:
        start = 0
        for rows_Bsd in self._span(0, self.seen, dtype):
            yield self._placed(rows_Bsd, start, 0)
            start += rows_Bsd.shape[1]

    def expanded_mask(self, mask: Tensor | None, new: int) -> Tensor | None:
        return None if mask is None else mask[..., : self.seen]

    def allowed(self, mask: Tensor | None, new: int) -> Tensor | None:
        if mask is not None:
            return mask
        at_T1 = self.filled_B[:1, None] + torch.arange(-new, 0, device=self.device)[:, None]
        return (torch.arange(self.max_length, device=self.device) <= at_T1)[None, None]

    def parts(self) -> list[Part]:
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
        for t in self.stored.tensors:
            t.copy_(t.index_select(0, beam_idx.to(t.device)))

    def _map(self, change: Any) -> None:
        super()._map(change)
        self.filled_B = change(self.filled_B)
