"""Causal attention by plain matrix products, in blocks of queries: on a CPU often faster than the fused operator.

Shape letters as in :mod:`latentize.attention.latent`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from latentize.attention.masks import newest_mask

__all__ = ["causal_blocks", "newest_blocks", "padded_attention", "suit_blocks"]

# Queries of a block.
_QUERIES = 128
# Scores that exist at once, elements: of all blocks where attention learns, of one where it does not.
_SCORES = 1 << 27
# In float32 blocks pay in short sequences only, and fewer scores may be kept: a whole model that learns keeps those of
# all layers.
_WIDE_TOKENS, _WIDE_SCORES = 1024, 1 << 23


def causal_blocks(q_BHTd: Tensor, k_BHTd: Tensor, v_BHTV: Tensor, scale: float) -> Tensor:
    """Causal attention, ``[B, H, T, V]``, each block of queries on the keys up to its end.

    The fused operator takes two to four times as long forward in bfloat16 where the CPU has instructions but no tiles
    for it, and six times that backward on any; float32 gains a third at 512 tokens and loses from some 1,500 on.
    Memory goes with ``T²`` where it learns. Scores are rounded to the inputs' precision; within autocast that is its.
    """
    lead, kind = q_BHTd.shape[:2], q_BHTd.device.type
    q_nTd, k_nTd, v_nTV = (q_BHTd * scale).flatten(0, 1), k_BHTd.flatten(0, 1), v_BHTV.flatten(0, 1)
    if torch.is_autocast_enabled(kind):
        narrow = torch.get_autocast_dtype(kind)
        q_nTd, k_nTd, v_nTV = q_nTd.to(narrow), k_nTd.to(narrow), v_nTV.to(narrow)
    heads_nTV: Tensor = _CausalBlocks.apply(q_nTd, k_nTd, v_nTV)
    return heads_nTV.unflatten(0, lead)


class _CausalBlocks(torch.autograd.Function):
    """Attention of scaled queries. PyTorch's gradients of slices are as large as what was sliced, and mostly zero."""

    @staticmethod
    def forward(ctx: Any, q_nTd: Tensor, k_nTd: Tensor, v_nTV: Tensor) -> Tensor:
        size = min(_QUERIES, q_nTd.shape[1])
        later = torch.full((size, size), -torch.inf, dtype=q_nTd.dtype, device=q_nTd.device).triu(1)
        heads_nTV, kept = q_nTd.new_empty(*q_nTd.shape[:2], v_nTV.shape[2]), list[Tensor]()
        for start, end in _spans(q_nTd):
            score_ntS = q_nTd[:, start:end] @ k_nTd[:, :end].mT
            score_ntS[:, :, start:].add_(later[: end - start, : end - start])
            share_ntS = score_ntS.softmax(-1)
            heads_nTV[:, start:end] = share_ntS @ v_nTV[:, :end]
            if any(ctx.needs_input_grad):
                kept.append(share_ntS)
        ctx.save_for_backward(q_nTd, k_nTd, v_nTV, *kept)
        return heads_nTV

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_heads_nTV: Tensor) -> tuple[Tensor | None, ...]:
        q_nTd, k_nTd, v_nTV, *shares = ctx.saved_tensors
        by_q_nTd, by_k_nTd, by_v_nTV = torch.empty_like(q_nTd), None, None
        # The last queries see all keys, so that the others' parts are added to theirs.
        for (start, end), share_ntS in zip(reversed(_spans(q_nTd)), reversed(shares), strict=True):
            by_ntV, q_ntd = by_heads_nTV[:, start:end].contiguous(), q_nTd[:, start:end]
            by_share_ntS = by_ntV @ v_nTV[:, :end].mT
            by_score_ntS = torch.ops.aten._softmax_backward_data(by_share_ntS, share_ntS, -1, share_ntS.dtype)
            by_q_nTd[:, start:end] = by_score_ntS @ k_nTd[:, :end]
            by_k_nSd, by_v_nSV = by_score_ntS.mT @ q_ntd, share_ntS.mT @ by_ntV
            if by_k_nTd is None or by_v_nTV is None:
                by_k_nTd, by_v_nTV = by_k_nSd, by_v_nSV
            else:
                by_k_nTd[:, :end].add_(by_k_nSd)
                by_v_nTV[:, :end].add_(by_v_nSV)
        return by_q_nTd, by_k_nTd, by_v_nTV


def _spans(q_nTd: Tensor) -> list[tuple[int, int]]:
    """First and last query of each block, the last not included."""
    tokens = q_nTd.shape[1]
    return [(start, min(start + _QUERIES, tokens)) for start in range(0, tokens, _QUERIES)]


def newest_blocks(q_BHTd: Tensor, k_BHSd: Tensor, v_BHSV: Tensor, stored: int, newest: int, scale: float) -> Tensor:
    """Attention in which each token sees its newest rows exactly, ``[B, H, T, V]``, block by block of queries.

    Args:
        q_BHTd: Queries of the last tokens.
        k_BHSd, v_BHSV: Keys and values of rows as they are stored, then of the newest as they are
            (``RowCode.as_cached``).
        stored: How many are stored.
        newest: How many of its newest rows a token sees exactly.
        scale: Factor on the logits.
    """
    tokens, device = q_BHTd.shape[2], q_BHTd.device
    near = k_BHSd.shape[2] - stored
    count = stored + newest if stored else near
    plain, size = suit_blocks(q_BHTd, tokens) and q_BHTd.dtype == k_BHSd.dtype, min(_QUERIES, tokens)
    at_S, heads = torch.arange(count, device=device), []
    for start in range(0, tokens, size):
        end = min(start + size, tokens)
        first, last = count - tokens + start, count - tokens + end
        far, low = max(0, min(stored, last - newest)), max(count - near, first - newest + 1)
        here = slice(stored + low - (count - near), stored + last - (count - near))
        seen_ts = newest_mask(at_S[first:last], at_S[:far], at_S[low:last], newest)
        k_BHsd, v_BHsV = (torch.cat([t[:, :, :far], t[:, :, here]], dim=2) for t in (k_BHSd, v_BHSV))
        attend = _block if plain else padded_attention
        heads.append(attend(q_BHTd[:, :, start:end], k_BHsd, v_BHsV, scale, seen_ts))
    return torch.cat(heads, dim=2)


def _block(q_BHtd: Tensor, k_BHsd: Tensor, v_BHsV: Tensor, scale: float, seen_ts: Tensor) -> Tensor:
    """A sum with infinities and a factor on the queries: both leave less to do, and to undo, than they do on scores."""
    hidden_ts = q_BHtd.new_zeros(seen_ts.shape).masked_fill_(~seen_ts, -torch.inf)
    return ((q_BHtd * scale) @ k_BHsd.mT + hidden_ts).softmax(-1) @ v_BHsV


def padded_attention(q_BHTd: Tensor, k_BHSd: Tensor, v_BHSV: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """PyTorch's fused attention; without a mask it is causal, or that of one query."""
    # Unequal head sizes would fall to an unfused path on CPU, ten times slower; zeros cost a little.
    size, v_size = q_BHTd.shape[-1], v_BHSV.shape[-1]
    padded = max(size, v_size)
    heads_BHTV = F.scaled_dot_product_attention(
        F.pad(q_BHTd, (0, padded - size)),
        F.pad(k_BHSd, (0, padded - size)),
        F.pad(v_BHSV, (0, padded - v_size)),
        attn_mask=mask,
        is_causal=mask is None and q_BHTd.shape[2] > 1,
        scale=scale,
    )
    return heads_BHTV[..., :v_size]


def suit_blocks(q_BHTd: Tensor, keys: int) -> bool:
    """Whether :func:`causal_blocks` is the faster way, within its memory.

    In bfloat16 only where rounded scores do not matter: in what learns, and within autocast.

    Args:
        q_BHTd: Queries, in the precision that they are multiplied in.
        keys: How many there are; blocks are of as many queries.
    """
    kind, tokens = q_BHTd.device.type, q_BHTd.shape[2]
    if kind != "cpu" or tokens != keys or tokens == 1:
        return False
    learns = q_BHTd.requires_grad
    scores = q_BHTd.shape[:2].numel() * keys * (tokens if learns else min(_QUERIES, tokens))
    if q_BHTd.dtype == torch.bfloat16:
        return (learns or torch.is_autocast_enabled(kind)) and scores <= _SCORES
    return tokens <= _WIDE_TOKENS and scores <= _WIDE_SCORES
