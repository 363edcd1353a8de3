"""Attention over cached latents that are never expanded, fast.

Absorbed, every query head sees the same keys, the cached rows ``[c, k_R]``, and sums the same rows: multi-query
attention with one shared head whose value is its key. What the sum has beyond the latent is dropped.

A long cache is attended in blocks, each with its own softmax, and the blocks are merged by their log-sum-exp: so a
block may be quantised, and several may be under way at once.

B batch, T new tokens, S cached tokens, H query heads, r kv_lora_rank, R qk_rope_head_dim, d = r + R.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, reduce

import torch
from torch import Tensor

from latentize.machine import has_matrix_units, multiplies_bfloat16

__all__ = [
    "additive",
    "attend_block",
    "attend_block_fused",
    "attend_rows",
    "fused_attention",
    "has_fused",
    "merge",
    "products",
    "softmax_with_lse",
    "sums",
]

# Cached tokens that one thread attends at a time; below twice that nothing is split.
_SPLIT = 2048
# Parts whose log-sum-exps are merged at once.
_MANY = 16


def _fused_is_faster(dtype: torch.dtype) -> bool:
    """Without matrix units the operator does not use a CPU's bfloat16 instructions, and plain products do: 1.6 times
    as fast."""
    products = dtype == torch.bfloat16 and multiplies_bfloat16("cpu") and not has_matrix_units()
    return has_fused() and not products


@cache
def has_fused() -> bool:
    """Whether this PyTorch has the CPU operator that returns the log-sum-exp, and it does what its twin does.

    It is private, so it may change or go: it is tried, once.
    """
    q_BQd, rows_Bsd = torch.ones(1, 2, 3), torch.arange(12.0).view(1, 4, 3)
    try:
        made = attend_block_fused(q_BQd, rows_Bsd, 0.1)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return all(torch.allclose(a, b, atol=1e-4) for a, b in zip(made, attend_block(q_BQd, rows_Bsd, 0.1), strict=True))


def attend_block(
    q_BQd: Tensor,
    rows_Bsd: Tensor,
    scale: float,
    mask_BQs: Tensor | None = None,
    *,
    size: int | None = None,
    key_scales: int = 0,
    scales_values: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention over some rows, by matrix products: the twin of :func:`attend_block_fused`.

    Args:
        q_BQd: Absorbed queries; heads and new tokens share the axis ``Q``.
        rows_Bsd: Rows, keys and values at once.
        scale: Factor on the logits.
        mask_BQs: Added to the logits, broadcastable; ``-inf`` where nothing may be seen.
        size: Values of a row that are summed, the first ones; all by default.
        key_scales: Values of a row that are factors on its logits, the last ones, each for as many queries; those are
            zero there.
        scales_values: Whether they are factors on what is summed, too.

    Returns:
        Weighted sums of rows, ``[B, Q, size]``, and log-sum-exps of the logits, ``[B, Q]`` in float32. A query that may
        see nothing here gets zeros, and ``-inf``.
    """
    narrow = rows_Bsd.dtype == torch.bfloat16 and multiplies_bfloat16(rows_Bsd.device.type)
    rows = rows_Bsd if narrow else rows_Bsd.to(torch.promote_types(rows_Bsd.dtype, torch.float32))
    score_BQs = products((q_BQd * scale).to(rows.dtype), rows)
    if key_scales:
        score_BQs = _times(score_BQs, rows[..., -key_scales:])
    if mask_BQs is not None:
        score_BQs = score_BQs + mask_BQs
    p_BQs, lse_BQ = softmax_with_lse(score_BQs, blind=mask_BQs is not None)
    if scales_values:
        p_BQs = _times(p_BQs, rows[..., -key_scales:])
    return sums(p_BQs.to(rows.dtype), rows, size).to(q_BQd.dtype), lse_BQ


def _times(of_BQs: Tensor, factor_BsK: Tensor) -> Tensor:
    """Each of ``K`` factors of a row is for as many queries."""
    return (of_BQs.unflatten(1, (factor_BsK.shape[-1], -1)) * factor_BsK.mT[:, :, None]).flatten(1, 2)


def softmax_with_lse(score_BQs: Tensor, *, blind: bool = True) -> tuple[Tensor, Tensor]:
    """Probabilities and log-sum-exps of scores, these in float32 or wider.

    Args:
        score_BQs: Logits.
        blind: Whether a query may see nothing; it gets zeros, and ``-inf``.
    """
    p_BQs = score_BQs.softmax(-1)
    # p = exp(score - lse) tells the log-sum-exp wherever it is known best: at its largest.
    wide = torch.promote_types(score_BQs.dtype, torch.float32)
    top_BQ = score_BQs.amax(-1).to(wide)
    lse_BQ = top_BQ - p_BQs.amax(-1).to(wide).log()
    if blind:
        blind_BQ = top_BQ == -torch.inf
        lse_BQ, p_BQs = lse_BQ.masked_fill(blind_BQ, -torch.inf), p_BQs.masked_fill(blind_BQ[..., None], 0)
    return p_BQs, lse_BQ


def products(q_BQd: Tensor, rows_Bsd: Tensor) -> Tensor:
    """Of queries with rows, ``[B, Q, s]``; rows may be of one sequence for all."""
    if len(q_BQd) == 1:
        return (q_BQd[0] @ rows_Bsd[0].mT)[None]
    # Batched products are another matter than plain ones: with rows on the left this one is twice as fast.
    return (rows_Bsd @ q_BQd.mT).mT.contiguous()


def sums(p_BQs: Tensor, rows_Bsd: Tensor, size: int | None) -> Tensor:
    """Of the first ``size`` values of rows, weighted, ``[B, Q, size]``."""
    if len(rows_Bsd) == 1:
        return (p_BQs[0] @ rows_Bsd[0, :, :size])[None]
    # A batched product copies what is not contiguous, which costs more than to sum all of it.
    return (p_BQs @ rows_Bsd)[..., :size]


def attend_block_fused(
    q_BQd: Tensor, rows_Bsd: Tensor, scale: float, mask_BQs: Tensor | None = None, *, size: int | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`attend_block`, by PyTorch's fused CPU operator, which sums whole rows."""
    rows, mask = rows_Bsd[:, None], None if mask_BQs is None else mask_BQs[:, None]
    out, lse = fused_attention(q_BQd[:, None], rows, rows, scale, mask)
    return out[:, 0, :, :size], lse[:, 0]


def fused_attention(
    q_BHTd: Tensor, k_BHSd: Tensor, v_BHSd: Tensor, scale: float, mask: Tensor | None = None, *, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Heads ``[B, H, T, d]`` and log-sum-exps ``[B, H, T]``, by the private operator; an additive mask, or none."""
    mask = None if mask is None else mask.to(q_BHTd.dtype)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_BHTd, k_BHSd, v_BHSd, 0.0, causal, attn_mask=mask, scale=scale
    )
    if mask is not None:
        # For a query that may see nothing the operator returns 0.
        lse = lse.masked_fill((mask == -torch.inf).all(-1), -torch.inf)
    return out, lse


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One attention out of those over disjoint blocks."""
    if len(parts) == 1:
        return parts[0]
    lse_nBQ = torch.stack([lse for _, lse in parts])
    # Two at a time it is much faster, until there are many.
    total_BQ = reduce(torch.logaddexp, lse_nBQ) if len(parts) < _MANY else lse_nBQ.logsumexp(0)
    share_nBQ = (lse_nBQ - total_BQ.clamp_min(torch.finfo(total_BQ.dtype).min)).exp()
    # The shares are in float32 or wider, and so is the sum.
    out_BQd = sum(s[..., None] * out for s, (out, _) in zip(share_nBQ, parts, strict=True))
    assert isinstance(out_BQd, Tensor)
    return out_BQd.to(parts[0][0].dtype), total_BQ


def attend_rows(
    q_BHTd: Tensor,
    blocks: Iterable[Tensor],
    scale: float,
    mask_BhTS: Tensor | None = None,
    *,
    size: int | None = None,
    key_scales: int = 0,
    scales_values: bool = False,
    fused: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Absorbed attention over a cache.

    Args:
        q_BHTd: Absorbed queries ``[W_UKᵀ q_C, q_R]``.
        blocks: The cache's rows ``[B, s, d]``, in order.
        scale: Factor on the logits.
        mask_BhTS: Boolean or additive, for all rows together; ``h`` is 1 or H. Without one everything is seen.
        size: Values of a row that are summed, the first ones: ``r`` for the sum of latents. All by default.
        key_scales, scales_values: Values of a row that are factors, as for :func:`attend_block`.
        fused: Use the fused operator; by default where there is one for the tensors. It knows of no factors.

    Returns:
        Sums ``[B, H, T, size]``, and log-sum-exps of the logits ``[B, H, T]``.
    """
    heads, tokens = q_BHTd.shape[1:3]
    q_BQd = q_BHTd.flatten(1, 2)
    if fused is None:
        plain = not (q_BHTd.requires_grad or key_scales)
        fused = q_BHTd.device.type == "cpu" and plain and _fused_is_faster(q_BHTd.dtype)
    parts, start = [], 0
    for rows_Bsd in blocks:
        mask_BQs = None
        if mask_BhTS is not None:
            mask_BhTs = additive(mask_BhTS[..., start : start + rows_Bsd.shape[1]], q_BHTd.dtype)
            mask_BQs = mask_BhTs.expand(-1, heads, -1, -1).flatten(1, 2)
        start += rows_Bsd.shape[1]
        if fused:
            parts += _split(q_BQd, rows_Bsd, scale, mask_BQs, size)
        else:
            factors = {"key_scales": key_scales, "scales_values": scales_values}
            parts.append(attend_block(q_BQd, rows_Bsd, scale, mask_BQs, size=size, **factors))
    summed_BQd, lse_BQ = merge(parts)
    return summed_BQd.unflatten(1, (heads, tokens)), lse_BQ.unflatten(1, (heads, tokens))


def _split(
    q_BQd: Tensor, rows_Bsd: Tensor, scale: float, mask_BQs: Tensor | None, size: int | None
) -> list[tuple[Tensor, Tensor]]:
    """A long block as a batch of shorter ones: more to do in parallel, and each stays in a core's cache."""
    batch, tokens = rows_Bsd.shape[:2]
    count = tokens // _SPLIT
    if batch > 1 or count < 2 or mask_BQs is not None:
        return [attend_block_fused(q_BQd, rows_Bsd, scale, mask_BQs, size=size)]
    even = count * _SPLIT
    out_nQd, lse_nQ = attend_block_fused(
        q_BQd.expand(count, -1, -1), rows_Bsd[0, :even].unflatten(0, (count, _SPLIT)), scale, size=size
    )
    parts = [(out[None], lse[None]) for out, lse in zip(out_nQd, lse_nQ, strict=True)]
    if even < tokens:
        parts.append(attend_block_fused(q_BQd, rows_Bsd[:, even:], scale, size=size))
    return parts


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as one that is added to logits; another as it is."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros((), dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)
