"""Attention to rows that are rounded whenever they are read, as a cache of codes would have them.

Shape letters as in :mod:`latentize.attention.latent`; E rows that are seen as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from latentize.attention.coding import Rounding, RowCode
from latentize.attention.latent import expand
from latentize.attention.masks import narrowed
from latentize.attention.projections import UpProjections
from latentize.modeling.blocks import newest_blocks

__all__ = ["codes_itself", "rounded_heads"]


def codes_itself(cache: Any, layer_idx: int, rounding: Rounding, positions_BT: Tensor) -> bool:
    """Whether a cache stores a layer's codes itself; then it is told how.

    Args:
        cache: transformers', one like it, or ``None``.
        layer_idx: Which layer of it.
        rounding: How rows are rounded.
        positions_BT: Of the new tokens.
    """
    layers = getattr(cache, "layers", ())
    codes = getattr(layers[layer_idx], "codes", None) if layer_idx < len(layers) else None
    if codes is None or not isinstance(rounding, RowCode):
        return False
    return codes(rounding, rounding.exact(positions_BT, int(cache.get_seq_length(layer_idx))))


def rounded_heads(
    queries: tuple[Tensor, Tensor],
    rows: tuple[Tensor, Tensor],
    up: UpProjections,
    mask: Tensor | None,
    rounding: Rounding,
    position_ids: Tensor,
    heads: Callable[..., Tensor],
) -> Tensor:
    """``[B, H, T, V]`` from rows of all tokens as they are.

    Args:
        queries: Un-roped and roped.
        rows: Latents and roped keys; factors of keys follow the latter.
        up: What makes keys and values of them.
        mask: Of all tokens; ``None`` is causal.
        rounding: How rows are rounded.
        position_ids: Of the new tokens.
        heads: Attends to rows that are rounded already.
    """
    tokens, count = queries[0].shape[2], rows[0].shape[2]
    # Factors stay as they are.
    k_rope, factors = rows[1].tensor_split([rows[1].shape[-1] - up.key_scales], dim=-1)
    c, k_rope, stored = rounding.as_cached(rows[0], k_rope, position_ids.expand(len(rows[0]), -1))
    if up.key_scales:
        near = c.shape[2] - stored
        factors = torch.cat([factors[:, :, :stored], factors[:, :, count - near :]], dim=2)
        k_rope = torch.cat([k_rope, factors], dim=-1)
    if rounding.newest and tokens > 1:
        if mask is None and not up.softcap and up.sink_H is None:
            k_BHSd, v_BHSV = expand(c, k_rope, up, queries[0].shape[1])
            return newest_blocks(torch.cat(queries, dim=-1), k_BHSd, v_BHSV, stored, rounding.newest, up.softmax_scale)
        seen_TS, at_S = rounding.who_sees(tokens, count, c.device)
        mask = narrowed(mask, seen_TS, at_S)
    return heads(*queries, c, k_rope, up, mask)
