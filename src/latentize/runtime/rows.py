"""What attention may see of earlier tokens, in whatever cache they lie.

B batch, T new tokens, S cached tokens, s rows of a block, r kv_lora_rank, P roped keys, R qk_rope_head_dim, K factors
of keys, d = r + P R + K.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from latentize.runtime.codecs import FLOATS
from latentize.runtime.kernels.storage import Part, Stored

__all__ = ["BLOCK", "CachedRows", "TensorRows", "rows_of"]

# Rows that are restored at once: with fewer the calls cost more than the work, more leave a core's cache.
BLOCK = 4096


class CachedRows(ABC):
    """Latents and roped keys of all tokens so far.

    Attributes:
        seen: How many tokens that are.
        columns: Of a mask for all of them; more where there is room for more.
        roped_keys: How many a token has.
        key_scales: Factors of keys in a row, the last of its values; one for each ``H / K`` heads.
        stored_dtype: Of the model whose rows they are.
        rotation_rr: From stored latents to latents: queries are multiplied by it, sums by its transpose. ``None`` is
            not at all.
        coded: Whether rows are components in codes (``attention.coding.RowCode``).
        newest: How many of its newest rows each of several new tokens sees as they are, and others do not; 0 is none.
        near: How many rows that makes, the last ones of :meth:`tensors`.
    """

    seen: int
    columns: int
    roped_keys: int
    key_scales: int = 0
    stored_dtype: torch.dtype
    rotation_rr: Tensor | None
    coded: bool = False
    newest: int = 0
    near: int = 0

    @property
    def unread(self) -> str | None:
        """Why no kernel reads such rows, in the form that they have; ``None`` if some may."""
        return None

    def queries(self, q_rope_BHTR: Tensor) -> Tensor:
        """Roped queries as wide as what :meth:`blocks` holds of the roped keys."""
        if self.roped_keys == 1:
            return q_rope_BHTR
        # A head's own roped key is one stretch of the row; zeros leave the others out.
        own_HP = torch.eye(self.roped_keys, dtype=q_rope_BHTR.dtype, device=q_rope_BHTR.device)
        own_HP = own_HP.repeat_interleave(q_rope_BHTR.shape[1] // self.roped_keys, dim=0)
        return (q_rope_BHTR[..., None, :] * own_HP[:, None, :, None]).flatten(-2)

    @abstractmethod
    def blocks(self) -> Iterable[Tensor]:
        """Rows ``[B, s, d]`` in order."""

    @abstractmethod
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Latents ``[B, 1, S, r]`` in their own basis, and roped keys ``[B, P, S, R]``."""

    @abstractmethod
    def allowed(self, mask: Tensor | None) -> Tensor | None:
        """Of a mask for all tokens, ``[B, h, T, S]``, what the rows of :meth:`blocks` need; ``None`` is causal."""

    @abstractmethod
    def expanded_mask(self, mask: Tensor | None) -> Tensor | None:
        """The same for those of :meth:`tensors`."""

    @abstractmethod
    def storage(self, q_rope_BHTR: Tensor) -> tuple[list[Part], Tensor, dict[str, Any]]:
        """Rows as a kernel reads them: where they lie, how many each sequence has, and what a window asks for."""


class TensorRows(CachedRows):
    """Those of a cache that holds plain tensors.

    Args:
        c_B1Sr, k_rope_BPSR: Latents and roped keys.
        key_scales: Factors behind the roped key.
    """

    rotation_rr = None

    def __init__(self, c_B1Sr: Tensor, k_rope_BPSR: Tensor, key_scales: int = 0) -> None:
        self.key_scales = key_scales
        self._c, self._k_rope = c_B1Sr, k_rope_BPSR
        self.seen = self.columns = c_B1Sr.shape[2]
        self.roped_keys, self.stored_dtype = k_rope_BPSR.shape[1], c_B1Sr.dtype

    def blocks(self) -> list[Tensor]:
        return [torch.cat([self._c[:, 0], self._k_rope.transpose(1, 2).flatten(2)], dim=-1)]

    def tensors(self) -> tuple[Tensor, Tensor]:
        return self._c, self._k_rope

    def allowed(self, mask: Tensor | None) -> Tensor | None:
        return mask

    def expanded_mask(self, mask: Tensor | None) -> Tensor | None:
        return mask

    def storage(self, q_rope_BHTR: Tensor) -> tuple[list[Part], Tensor, dict[str, Any]]:
        halves = (self._c[:, 0], self._k_rope.transpose(1, 2).flatten(2))
        c_BSr, keys_BSR = (t if t.stride(-1) == 1 else t.contiguous() for t in halves)
        keys_BSR, factors_BSK = keys_BSR.tensor_split([keys_BSR.shape[-1] - self.key_scales], dim=-1)
        latent, rope = (Stored((t,), FLOATS[t.dtype], t.shape[-1]) for t in (c_BSr, keys_BSR))
        factors = factors_BSK if self.key_scales else None
        lengths_B = torch.full((len(self._c),), self.seen, dtype=torch.int32, device=self._c.device)
        return [Part(latent, rope, self.seen, factors_BSK=factors)], lengths_B, {}


def rows_of(key: Tensor | CachedRows, value: Tensor | CachedRows, key_scales: int = 0) -> CachedRows:
    """What a cache has returned: latents and roped keys as tensors, or rows, which stand for both."""
    if isinstance(key, CachedRows):
        return key
    assert isinstance(value, Tensor)
    return TensorRows(key, value, key_scales)
