"""Who may look at whom."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["causal_mask", "narrowed", "newest_mask"]


def causal_mask(
    queries: int, keys: int, *, window: int | None = None, chunk: int | None = None, device: torch.device | None = None
) -> Tensor:
    """Boolean ``[queries, keys]``, true where attention is allowed.

    The queries are the last ones of the ``keys`` tokens.

    Args:
        queries: New tokens ``T``.
        keys: Tokens in the cache ``S``, the new ones included.
        window: Tokens that a query sees, itself included (sliding-window attention).
        chunk: Tokens of a chunk; a query sees those of its own alone (Llama 4).
        device: Where to build it.
    """
    at = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)[None, :]
    allowed = key <= at
    if chunk is not None:
        allowed = allowed & (key // chunk == at // chunk)
    return allowed if window is None else allowed & (key > at - window)


def newest_mask(at_T: Tensor, coded_S: Tensor, exact_E: Tensor, newest: int) -> Tensor:
    """Boolean ``[T, S + E]``, who may see which version of a token's row: each token sees its newest rows, itself
    included, as they are, and those before them as they are stored.

    Args:
        at_T: Numbers of the tokens that look.
        coded_S: Numbers of the rows that are stored.
        exact_E: Numbers of the rows that are exact; of none that is missing here.
        newest: How many of its newest rows a token sees exactly, where they are here.
    """
    gap_TS, gap_TE = at_T[:, None] - coded_S, at_T[:, None] - exact_E
    # Without its exact row a token is seen as it is stored.
    here_S = torch.isin(coded_S, exact_E)
    return torch.cat([(gap_TS >= 0) & ((gap_TS >= newest) | ~here_S), (gap_TE >= 0) & (gap_TE < newest)], dim=1)


def narrowed(mask: Tensor | None, seen_TS: Tensor, at_S: Tensor) -> Tensor:
    """A mask for some rows, of one for all tokens.

    Args:
        mask: Boolean or additive, ``[B, h, T, tokens]``; ``None`` if nothing else has to hold.
        seen_TS: Who sees which row, boolean.
        at_S: The rows' tokens.
    """
    if mask is None:
        return seen_TS[None, None]
    mask = mask[..., at_S]
    return mask & seen_TS if mask.dtype == torch.bool else mask.masked_fill(~seen_TS, -torch.inf)
