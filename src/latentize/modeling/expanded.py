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
    if w.sink_H is not None:
        q_BHTd, k_BHSd, v_BHSV, mask = _with_sink(q_BHTd, k_BHSd, v_BHSV, mask, w.sink_H / w.softmax_scale)
    if w.softcap:
        return _capped_blocks(q_BHTd, k_BHSd, v_BHSV, w.softmax_scale, w.softcap, mask)
    if mask is None and q_BHTd.dtype == k_BHSd.dtype and suit_blocks(q_BHTd, k_BHSd.shape[2]):
        return causal_blocks(q_BHTd, k_BHSd, v_BHSV, w.softmax_scale)
    if mask is None and q_BHTd.shape[2] != k_BHSd.shape[2]:
        tokens, keys = q_BHTd.shape[2], k_BHSd.shape[2]
        mask = causal_mask(tokens, keys, device=q_BHTd.device)
    return padded_attention(q_BHTd, k_BHSd, v_BHSV, w.softmax_scale, mask)


def _with_sink(
    q_BHTd: Tensor, k_BHSd: Tensor, v_BHSV: Tensor, mask: Tensor | None, sink_H: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The same with a first key that all queries see: its product is the sink, its value is nothing."""
    k_BH1d = k_BHSd.new_zeros(*k_BHSd.shape[:2], 1, k_BHSd.shape[3])
    k_BHSd = torch.cat([k_BH1d, k_BHSd], dim=2)
    sinks_BHS1 = torch.nn.functional.pad(sink_H[:, None, None], (0, 0, 0, k_BHSd.shape[2] - 1)).to(k_BHSd.dtype)
    k_BHSd = torch.cat([k_BHSd, sinks_BHS1.expand(len(k_BHSd), -1, -1, -1)], dim=-1)
    q_BHTd = torch.cat([q_BHTd, torch.ones_like(q_BHTd[..., :1])], dim=-1)
    v_BHSV = torch.cat([torch.zeros_like(v_BHSV[:, :, :1]), v_BHSV], dim=2)
    if mask is not None:
        seen = mask.new_ones(()) if mask.dtype == torch.bool else mask.new_zeros(())
        mask = torch.cat([seen.expand(*mask.shape[:-1], 1), mask], dim=-1)
    return q_BHTd, k_BHSd, v_BHSV, mask


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
