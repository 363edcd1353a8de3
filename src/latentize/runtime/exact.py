"""Rows that are stored as they are beside others that are coded: the first tokens of each text.

Where a text begins differs by padding, so each sequence has its own.

B batch, T new tokens, s rows of a block, E exact rows of a sequence, d values of a row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["ExactRows"]


class ExactRows:
    """Exact rows of all sequences, and where they belong."""

    def __init__(self) -> None:
        self._rows_BEd: Tensor | None = None
        # Numbers of rows; -1 where there is none yet.
        self._at_BE: Tensor | None = None
        self._end, self._full = 0, False

    def add(self, rows_BTd: Tensor, exact_BT: Tensor, first: int, most: int) -> None:
        """Take what is to stay exact of new rows.

        Args:
            rows_BTd: New rows.
            exact_BT: Which of them are exact.
            first: Number of the first of them.
            most: Exact rows of a sequence.
        """
        if self._full or not most:
            return
        batch, _, size = rows_BTd.shape
        if self._rows_BEd is None or self._at_BE is None:
            self._rows_BEd = rows_BTd.new_zeros(batch, most, size)
            self._at_BE = torch.full((batch, most), -1, device=rows_BTd.device)
        have_B1 = (self._at_BE >= 0).sum(1, keepdim=True)
        slot_BT = exact_BT.cumsum(1) - 1 + have_B1
        sequence, token = (exact_BT & (slot_BT < most)).nonzero(as_tuple=True)
        slot = slot_BT[sequence, token]
        self._rows_BEd[sequence, slot] = rows_BTd[sequence, token]
        self._at_BE[sequence, slot] = first + token
        self._end, self._full = int(self._at_BE.max()) + 1, bool((self._at_BE >= 0).all())

    def laid_over(self, rows_Bsd: Tensor, start: int) -> Tensor:
        """A block of restored rows, of which ``start`` is the first, with the exact ones in their places."""
        if start >= self._end or self._rows_BEd is None or self._at_BE is None:
            return rows_Bsd
        here_BE = (self._at_BE >= start) & (self._at_BE < start + rows_Bsd.shape[1])
        sequence, slot = here_BE.nonzero(as_tuple=True)
        rows_Bsd[sequence, self._at_BE[sequence, slot] - start] = self._rows_BEd[sequence, slot].to(rows_Bsd.dtype)
        return rows_Bsd

    def forget(self, first: int) -> None:
        """Those from row ``first`` on."""
        if self._at_BE is None or first >= self._end:
            return
        self._at_BE = self._at_BE.masked_fill(self._at_BE >= first, -1)
        self._end, self._full = int(self._at_BE.max()) + 1, False

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Choose among sequences."""
        if self._rows_BEd is not None and self._at_BE is not None:
            self._rows_BEd, self._at_BE = change(self._rows_BEd), change(self._at_BE)

    @property
    def nbytes(self) -> int:
        return 0 if self._rows_BEd is None else self._rows_BEd.untyped_storage().nbytes()
