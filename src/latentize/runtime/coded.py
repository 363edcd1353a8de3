"""What a cached layer does with rows that a model's own code stores.

Rows are components in units of their spread, without the mean of the keys. A few rows stay exact: the first of each
text, which lie apart, and the newest, which are coded when newer ones have come.

B batch, S cached tokens, T new tokens, s rows of a block, r kv_lora_rank, P roped keys, R size of a roped key, F pairs,
d = r + P R.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from latentize.attention.coding import RowCode
from latentize.runtime.codecs import Coded, encode_together
from latentize.runtime.exact import ExactRows
from latentize.runtime.kernels.storage import Part, Stored, plain_part
from latentize.runtime.means import Means

__all__ = ["RowCoder", "code_ahead", "with_angles"]

# Rows that are seen as they are, ``[B, E, d]``, and their numbers, ``[B, E]``; -1 where there is none.
Apart = tuple[Tensor, Tensor]


class RowCoder:
    """Of one layer.

    Args:
        code: How the model's rows are stored.
        newest: Of each token, how many of its newest rows it sees as they are.

    Attributes:
        codecs: Of latents and roped keys.
        exact: The first rows of each text.
        new_exact_BT: Which of the tokens that come next are among them.
        band: How many rows the last tokens saw as they are, where each saw others; else 0.
        ahead: Codes of the row that is coded next, where there are some already.
    """

    def __init__(self, code: RowCode, newest: int) -> None:
        self.code, self.newest = code, max(newest, code.newest)
        self.codecs = (Coded(code.latent, code.spreads[0]), Coded(code.rope, code.spreads[1]))
        self.exact, self.new_exact_BT, self.band = ExactRows(), torch.zeros(1, 0, dtype=torch.bool), 0
        self.ahead: tuple[Tensor, ...] | None = None

    def expect(self, exact_BT: Tensor, *, first: bool) -> None:
        """Say which of the tokens that come next are the first of their texts; ``first`` is before any token."""
        self.new_exact_BT = exact_BT
        if first:
            self.exact.begin(exact_BT)

    def rows(self, c_BTr: Tensor, k_rope_BPTR: Tensor, number: int | Tensor, first: int) -> Tensor:
        """New rows before they are rounded, ``[B, T, d]``; those that stay exact are kept.

        Args:
            c_BTr, k_rope_BPTR: Latents and roped keys.
            number: Of the first token among all that there were, or those of all, ``[T]``, where only the device knows.
            first: Of the first of them, among the rows that are kept.
        """
        batch, count = c_BTr.shape[:2]
        if isinstance(number, int):
            angles = self.means(batch).from_row(number, count, torch.float32)
        else:
            angles = self.angles(number)
        z_BTn = self.code.components(k_rope_BPTR) - self.code.means(angles)
        rows_BTd = torch.cat([c_BTr.float() @ self.code.latent_mix_rr.mT, z_BTn], dim=-1).to(c_BTr.dtype)
        self.exact.add(rows_BTd, self.new_exact_BT, first, self.code.sinks)
        return rows_BTd

    def encoded(self, rows_Bsd: Tensor) -> tuple[Tensor, ...]:
        """Codes of latents and of roped keys, as :meth:`rows` has them."""
        if self.ahead is not None and rows_Bsd.shape[1] == 1:
            return self.ahead
        return encode_together(self.codecs, rows_Bsd)

    def decoded(self, tensors: tuple[Tensor, ...], start: int, first: int, dtype: torch.dtype) -> Tensor:
        """A block of rows of their codes as :meth:`placed` has them; exact ones are in their places.

        Args:
            tensors: Codes of latents and of roped keys.
            start: Number of the first row among those that are kept.
            first: And among all that there were.
            dtype: Of the result.
        """
        halves = [codec.decode((stored,), dtype) for codec, stored in zip(self.codecs, tensors, strict=True)]
        rows_Bse = torch.cat([*halves, self._beside(halves[0], first)], dim=-1)
        self.exact.lay_over(rows_Bse[..., : sum(half.shape[-1] for half in halves)], start)
        return rows_Bse

    def parts(
        self, tensors: tuple[Tensor, ...], count: int, newest: Apart | None = None, *, full: bool = False
    ) -> list[Part]:
        """Rows as a kernel reads them: those in codes, and those of them that are seen as they are.

        Args:
            tensors: Codes of latents and of roped keys.
            count: Rows in codes, at most.
            newest: Those of the newest rows that are among them, where rows have a place each.
            full: Whether it is known that there are ``count``.
        """
        leading = self.exact.leading
        if newest is None and self.exact.kept is not None and 0 < leading < count:
            first = plain_part(self.exact.kept[0], len(self.code.latent_mix_rr), leading, full=full)
            return [self._in_codes(tensors, count - leading, first=leading, full=full), first]
        apart: list[Apart] = []
        if self.exact.kept is not None:
            rows_BEd, at_BE = self.exact.kept
            # What is not in codes is seen as it is anyway, and the newest are read once.
            here_BE = at_BE < count
            if newest is not None:
                here_BE &= (at_BE[..., None] != newest[1][:, None]).all(-1)
            apart.append((rows_BEd, at_BE.where(here_BE, -1)))
        apart += [] if newest is None else [newest]
        elsewhere_BA = torch.cat([at_BE for _, at_BE in apart], dim=1) if apart else None
        plain = [plain_part(t, len(self.code.latent_mix_rr), t.shape[1], numbers_BE=at_BE) for t, at_BE in apart]
        return [self._in_codes(tensors, count, apart_BA=elsewhere_BA, full=full), *plain]

    def _in_codes(self, tensors: tuple[Tensor, ...], count: int, *, first: int = 0, **where: Any) -> Part:
        """So many rows from ``first`` on."""
        sizes = (len(self.code.latent_mix_rr), self.code.rope_values)
        latent, rope = (
            Stored((t[:, first:],), "coded", n, c) for t, n, c in zip(tensors, sizes, self.codecs, strict=True)
        )
        return Part(latent, rope, count, first, **where)

    def means(self, batch: int) -> Means:
        """For so many sequences."""
        frequencies_F, starts_B1 = self.code.frequencies_F, self.exact.starts_B1
        if starts_B1 is not None:
            return Means(frequencies_F.float(), starts_B1[:, 0].to(torch.int32))
        starts_B = torch.zeros(batch, dtype=torch.int32, device=frequencies_F.device)
        return Means(frequencies_F.float(), starts_B, self.code.frequencies)

    def angles(self, number_s: Tensor) -> Tensor:
        """Of rows by their numbers among all that there were, ``[s, 2 F]``; ``[B, s, 2 F]`` if padded."""
        starts_B1 = self.exact.starts_B1
        return self.code.angles(number_s if starts_B1 is None else number_s - starts_B1)

    def placed(self, rows_Bsd: Tensor, first: int) -> Tensor:
        """A block with the angles that the mean of its keys is turned by.

        Args:
            rows_Bsd: Components.
            first: Number of the first row among all that there were.
        """
        return torch.cat([rows_Bsd, self._beside(rows_Bsd, first)], dim=-1)

    def _beside(self, like_Bsm: Tensor, first: int) -> Tensor:
        """The angles of as many rows from ``first`` on, ``[B, s, 2 F]``."""
        (batch, count), dtype = like_Bsm.shape[:2], like_Bsm.dtype
        return self.means(batch).from_row(first, count, dtype).expand(batch, -1, -1)


def code_ahead(layers: Sequence[tuple[RowCoder, Tensor | None]]) -> None:
    """Code what each layer codes when one more token comes, for all layers together.

    Args:
        layers: Coders and the row that is next, ``[B, 1, d]``; ``None`` where there is none.
    """
    apart: dict[torch.device, list[tuple[RowCoder, Tensor]]] = {}
    for coder, row_B1d in layers:
        coder.ahead = None
        if row_B1d is not None:
            apart.setdefault(row_B1d.device, []).append((coder, row_B1d))
    for some in apart.values():
        codecs = [codec for coder, _ in some for codec in coder.codecs]
        found = encode_together(codecs, torch.cat([row_B1d for _, row_B1d in some], dim=-1))
        for (coder, _), latent, rope in zip(some, found[::2], found[1::2], strict=True):
            coder.ahead = (latent, rope)


def with_angles(rows_Bsd: Tensor, angles: Tensor) -> Tensor:
    """Rows and their angles side by side, ``[B, s, d + 2 F]``."""
    return torch.cat([rows_Bsd, angles.to(rows_Bsd.dtype).expand(len(rows_Bsd), -1, -1)], dim=-1)
