"""Latent attention of many new tokens: keys and values are expanded, and attended to in the way that is fastest.

Shape letters as in :mod:`latentize.attention.latent`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentize.attention.grouped import capped
from latentize.attention.latent import expand
from latentize.attention.masks import causal_mask
from latentize.attention.projections import UpProjections
from latentize.modeling.blocks import causal_blocks, padded_attention, suit_blocks

__all__ = ["attend_expanded"]

# Queries whose bent logits exist at once.
_CAPPED = 256


def attend_expanded(
    q_nope_BHTN: Tensor,
    q_rope_BHTR: Tensor,
    c_B1Sr: Tensor,
    k_rope_BPSR: Tensor,
    w: UpProjections,
    mask: Tensor | None = None,
) -> Tensor:
    """Heads ``[B, H, T, V]`` of many new tokens: expand keys and values, then fused attention.

    Args:
        q_nope_BHTN, q_rope_BHTR, c_B1Sr, k_rope_BPSR: As for ``expanded_heads``, its naive twin.
        w: The weights, or up-projections alone.
        mask: Boolean or additive, broadcastable to ``[B, H, T, S]``; without one attention is causal.
    """
    q_BHTd = torch.cat([q_nope_BHTN, q_rope_BHTR], dim=-1)
    k_BHSd, v_BHSV = expand(c_B1Sr, k_rope_BPSR, w, q_nope_BHTN.shape[1])
    if w.softcap:
        return _capped_blocks(q_BHTd, k_BHSd, v_BHSV, w.softmax_scale, w.softcap, mask)
    if mask is None and q_BHTd.dtype == k_BHSd.dtype and suit_blocks(q_BHTd, k_BHSd.shape[2]):
        return causal_blocks(q_BHTd, k_BHSd, v_BHSV, w.softmax_scale)
    if mask is None and q_BHTd.shape[2] != k_BHSd.shape[2]:
        tokens, keys = q_BHTd.shape[2], k_BHSd.shape[2]
        mask = causal_mask(tokens, keys, device=q_BHTd.device)
    return padded_attention(q_BHTd, k_BHSd, v_BHSV, w.softmax_scale, mask)


def _capped_blocks(
    q_BHTd: Tensor, k_BHSd: Tensor, v_BHSV: Tensor, scale: float, softcap: float, mask: Tensor | None
) -> Tensor:
    """Attention with bent logits, which no fused operator of PyTorch has, ``[B, H, T, V]``: block by block of queries.

    Args:
        q_BHTd, k_BHSd, v_BHSV: Queries, the last ones of all tokens; keys and values of all tokens.
        scale, softcap: Of the logits.
        mask: As for :func:`attend_expanded`.
    """
    tokens, keys = q_BHTd.shape[2], k_BHSd.shape[2]
    if mask is None:
        mask = causal_mask(tokens, keys, device=q_BHTd.device)[None, None]
    mask = mask.expand(*mask.shape[:2], tokens, keys)
    heads = []
    for start in range(0, tokens, _CAPPED):
        score_BHtS = capped(scale * (q_BHTd[:, :, start : start + _CAPPED] @ k_BHSd.mT), softcap)
        part = mask[:, :, start : start + _CAPPED]
        score_BHtS = score_BHtS.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else score_BHtS + part
        heads.append(score_BHtS.softmax(-1) @ v_BHSV)
    return torch.cat(heads, dim=2)
