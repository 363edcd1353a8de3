"""Rows of a cached layer as they are stored: what attention gets instead of keys and values.

B batch, S cached tokens, T new tokens, r kv_lora_rank, P roped keys, R qk_rope_head_dim, d = r + P R.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentize.runtime.kernels.storage import Part
from latentize.runtime.rows import CachedRows

if TYPE_CHECKING:
    from latentize.runtime.layer import LatentLayer

__all__ = ["StoredRows"]


class StoredRows(CachedRows):
    """Those of a :class:`LatentLayer`, as they are stored.

    Args:
        layer: Where they lie.
        dtype: What to restore them to.
        new: Tokens that came in last.
        band_BEd: Rows that these see as they are, where each sees others.
    """

    def __init__(self, layer: LatentLayer, dtype: torch.dtype, new: int, band_BEd: Tensor | None = None) -> None:
        self.layer, self.dtype, self.new, self.band_BEd = layer, dtype, new, band_BEd
        self.seen, self.columns = layer.seen, layer.columns
        self.roped_keys, self.key_scales, self.stored_dtype = layer.roped_keys, layer.key_scales, layer.dtype
        self.rotation_rr, self.coded = layer.rotation(dtype), layer.coder is not None
        if layer.coder is not None and band_BEd is not None and layer.window is None:
            self.newest, self.near = layer.coder.newest, band_BEd.shape[1]

    def positions(self) -> Tensor:
        """Of every row, ``[S]``; the mask has these columns."""
        return self.layer.positions(self.new)

    def blocks(self) -> Iterator[Tensor]:
        return self.layer.blocks(self.dtype, self.new, self.band_BEd)

    def allowed(self, mask: Tensor | None) -> Tensor | None:
        return self.layer.allowed(mask, self.new)

    def expanded_mask(self, mask: Tensor | None) -> Tensor | None:
        return self.layer.expanded_mask(mask, self.new)

    def storage(self, q_rope_BHTR: Tensor) -> tuple[list[Part], Tensor, dict[str, Any]]:
        layer, options = self.layer, {}
        if layer.coder is not None:
            options = {"means": layer.coder.means(len(q_rope_BHTR))}
        elif layer.window is not None:
            turned = layer.turned_back(q_rope_BHTR, self.new)
            options = {"window": layer.window, "sinks": layer.sinks, "gone": layer.gone, "q_sink_BHTR": turned}
        return layer.parts(), layer.lengths_B(), options

    @property
    def unread(self) -> str | None:
        if self.layer.coder is None:
            return None
        if self.layer.window is not None:
            return "codes in a window"
        return "codes that several new tokens see" if self.new > 1 else None

    def queries(self, q_rope_BHTR: Tensor) -> Tensor:
        if self.layer.coder is None:
            return super().queries(q_rope_BHTR)
        return self.layer.coder.code.queries(q_rope_BHTR)

    def tensors(self) -> tuple[Tensor, Tensor]:
        rows_BSd = torch.cat(list(self.layer.filled(self.dtype, self.new, self.band_BEd)), dim=1)
        c_BSr, k_BSR = rows_BSd[..., : self.layer.rank], rows_BSd[..., self.layer.rank :]
        turn, k_BPSR = self.rotation_rr, k_BSR.unflatten(-1, (self.roped_keys, -1)).transpose(1, 2)
        if self.layer.coder is not None:
            code = self.layer.coder.code
            z_BSn, angles = k_BSR.float().tensor_split([code.rope_values], dim=-1)
            k_BPSR = code.keys(z_BSn + code.means(angles)).to(k_BSR.dtype)
        return (c_BSr if turn is None else c_BSr @ turn.mT)[:, None], k_BPSR
