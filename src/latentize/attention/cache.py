"""The simplest cache: two growing tensors a layer, along the token dimension."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["GrowingCache"]


class GrowingCache:
    """Keeps what attention needs of earlier tokens; ``update`` is that of transformers' ``Cache``.

    Grouped attention keeps keys and values, ``[B, G, S, d]`` each. Latent attention keeps the latent
    ``[B, 1, S, r]`` and the roped keys ``[B, P, S, d_R]``.
    """

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, first: Tensor, second: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append the new tokens and return everything."""
        if layer_idx in self.layers:
            old_first, old_second = self.layers[layer_idx]
            first, second = torch.cat([old_first, first], dim=-2), torch.cat([old_second, second], dim=-2)
        self.layers[layer_idx] = (first, second)
        return first, second

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.layers[layer_idx][0].shape[-2] if layer_idx in self.layers else 0

    def values_per_token(self, layer_idx: int = 0) -> int:
        """Numbers kept for one token, counted in the tensors themselves."""
        return sum(t[0, :, 0].numel() for t in self.layers[layer_idx])
