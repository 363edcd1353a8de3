"""Who may look at whom."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["causal_mask"]


def causal_mask(queries: int, keys: int, *, window: int | None = None, device: torch.device | None = None) -> Tensor:
    """Boolean ``[queries, keys]``, true where attention is allowed.

    The queries are the last ones of the ``keys`` tokens.

    Args:
        queries: New tokens ``T``.
        keys: Tokens in the cache ``S``, the new ones included.
        window: Tokens that a query sees, itself included (sliding-window attention).
        device: Where to build it.
    """
    at = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)[None, :]
    allowed = key <= at
    return allowed if window is None else allowed & (key > at - window)
