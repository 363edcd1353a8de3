"""Tensors that grow by a few tokens at a time, with room to spare."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["Growing"]

_GROWTH, _LEAST = 64, 32
# Room beyond so many tokens is a multiple: a kernel that is compiled for aligned strides stays the one that is needed.
_LONG, _ALIGNED = 1024, 16


class Growing:
    """Tensors that grow along their second axis, in place while there is room."""

    def __init__(self) -> None:
        self.tensors: tuple[Tensor, ...] = ()
        self.length = 0

    def append(self, new: tuple[Tensor, ...]) -> None:
        end = self.length + new[0].shape[1]
        if not self.tensors:
            self.tensors = tuple(t[:, :0] for t in new)
        if end > self.tensors[0].shape[1]:
            room = end + max(_LEAST, end // _GROWTH)
            if end >= _LONG:
                room -= room % _ALIGNED
            self.tensors = tuple(_enlarged(t[:, : self.length], room) for t in self.tensors)
        for mine, more in zip(self.tensors, new, strict=True):
            mine[:, self.length : end] = more
        self.length = end

    def view(self, start: int, stop: int) -> tuple[Tensor, ...]:
        return tuple(t[:, start:stop] for t in self.tensors)

    def keep(self, head: int, tail: int) -> None:
        """Only the first ``head`` and the last ``tail`` tokens."""
        self.tensors = tuple(torch.cat([t[:, :head], t[:, self.length - tail : self.length]], 1) for t in self.tensors)
        self.length = head + tail

    def map(self, change: Any) -> None:
        self.tensors = tuple(change(t) for t in self.tensors)

    @property
    def nbytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self.tensors)


def _enlarged(t: Tensor, room: int) -> Tensor:
    larger = t.new_empty((t.shape[0], room, *t.shape[2:]))
    larger[:, : t.shape[1]] = t
    return larger
