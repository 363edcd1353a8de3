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
    """Exact rows of all sequences, and where they belong.

    Attributes:
        starts_B1: Number of the row that each text begins with; ``None`` where all begin with the first.
        leading: How many rows there are, where they are the first of all sequences, in order; 0 where they are not.
    """

    def __init__(self) -> None:
        self.starts_B1: Tensor | None = None
        self._rows_BEd: Tensor | None = None
        # Numbers of rows; -1 where there is none yet.
        self._at_BE: Tensor | None = None
        self._settle()

    def _settle(self) -> None:
        """Find once what every step asks for: no step of a captured graph may."""
        self._first, self._end, self._full, self.leading = 0, 0, False, 0
        if self._at_BE is None:
            return
        there_BE = self._at_BE >= 0
        self._sequence, self._slot = there_BE.nonzero(as_tuple=True)
        self._row = self._at_BE[self._sequence, self._slot]
        self._full = bool(there_BE.all())
        if len(self._row):
            self._first, self._end = int(self._row.min()), int(self._row.max()) + 1
            if len(self._row) == self._end * len(there_BE) and bool((self._row == self._slot).all()):
                self.leading = self._end

    @property
    def kept(self) -> tuple[Tensor, Tensor] | None:
        """The rows ``[B, E, d]`` and their numbers ``[B, E]``, -1 where there is none yet; ``None`` before any."""
        return None if self._rows_BEd is None or self._at_BE is None else (self._rows_BEd, self._at_BE)

    def begin(self, exact_BT: Tensor) -> None:
        """Find where the texts begin: at the first of the tokens that are exact."""
        begins_B1 = exact_BT.int().argmax(1, keepdim=True)
        self.starts_B1 = begins_B1 if bool(begins_B1.any()) else None

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
        self._settle()

    def lay_over(self, rows_Bsd: Tensor, start: int) -> None:
        """Put exact rows into their places in a block of restored ones, of which ``start`` is the first."""
        stop = start + rows_Bsd.shape[1]
        if start >= self._end or stop <= self._first or self._rows_BEd is None:
            return
        sequence, slot, row = self._sequence, self._slot, self._row
        if start > self._first or stop < self._end:
            here = (row >= start) & (row < stop)
            sequence, slot, row = sequence[here], slot[here], row[here]
        rows_Bsd[sequence, row - start] = self._rows_BEd[sequence, slot].to(rows_Bsd.dtype)

    def forget(self, first: int) -> None:
        """Those from row ``first`` on."""
        if self._at_BE is None or first >= self._end:
            return
        self._at_BE = self._at_BE.masked_fill(self._at_BE >= first, -1)
        self._settle()

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Choose among sequences."""
        if self.starts_B1 is not None:
            self.starts_B1 = change(self.starts_B1)
        if self._rows_BEd is not None and self._at_BE is not None:
            self._rows_BEd, self._at_BE = change(self._rows_BEd), change(self._at_BE)
            self._settle()

    @property
    def nbytes(self) -> int:
        return 0 if self._rows_BEd is None else self._rows_BEd.untyped_storage().nbytes()
