"""Heads out of queries and a latent cache: ``prefill`` expands the cache in blocks, ``decode`` never does.

B batch, T new tokens, S cached tokens, H query heads, U up-projections, s = H / U, P roped keys, r kv_lora_rank,
N qk_nope_head_dim, R qk_rope_head_dim, V v_head_dim, d = r + P R.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from latentize.attention.grouped import beside_sink, by_groups
from latentize.attention.latent import expand
from latentize.attention.masks import causal_mask, narrowed, newest_mask
from latentize.attention.projections import Up, UpProjections
from latentize.modeling.expanded import attend_expanded
from latentize.runtime.absorbed import additive, attend_rows, fused_attention, has_fused, merge
from latentize.runtime.backends import TORCH, Backend, refusal
from latentize.runtime.coded_attention import attend_codes
from latentize.runtime.rows import CachedRows

__all__ = ["Up", "decode", "heads", "prefill"]

# So many new tokens are still cheaper to absorb than to expand everything for.
_ABSORBED = 16
# Cached tokens that are expanded at once.
_EXPANDED = 4096
# New tokens that look at once where each sees other rows as they are.
_QUERIES = 128


def heads(
    q_nope_BHTN: Tensor,
    q_rope_BHTR: Tensor,
    rows: CachedRows,
    up: UpProjections,
    mask: Tensor | None,
    backend: Backend = TORCH,
) -> Tensor:
    """``[B, H, T, V]``, by the form that is cheaper.

    Args:
        q_nope_BHTN, q_rope_BHTR: Queries.
        rows: Latents and roped keys of all tokens.
        up: Up-projections.
        mask: Boolean or additive, ``[B, h, T, S]``; ``None`` where attention is causal.
        backend: Who decodes.
    """
    tokens = q_nope_BHTN.shape[2]
    if tokens <= _ABSORBED and tokens < rows.seen:
        return decode(q_nope_BHTN, q_rope_BHTR, rows, up, mask, backend)
    return prefill(q_nope_BHTN, q_rope_BHTR, rows, up, mask)


def decode(
    q_nope_BHTN: Tensor,
    q_rope_BHTR: Tensor,
    rows: CachedRows,
    up: UpProjections,
    mask: Tensor | None,
    backend: Backend = TORCH,
) -> Tensor:
    """Few new tokens: queries go into the latent space, sums of latents come out of it. As :func:`heads`."""
    turn_rr, unroped = rows.rotation_rr, q_nope_BHTN.shape[-1] > 0
    if unroped:
        q_latent_BHTr = by_groups(q_nope_BHTN, up.k_up_UNr)
        if turn_rr is not None:
            q_latent_BHTr = q_latent_BHTr @ turn_rr
    else:
        q_latent_BHTr = q_nope_BHTN.new_zeros(*q_nope_BHTN.shape[:-1], up.k_up_UNr.shape[2])
    q_rope_BHTR = rows.queries(q_rope_BHTR)
    found = backend.attend(q_latent_BHTr, q_rope_BHTR, rows, up.softmax_scale, mask, scales_values=up.scales_values)
    if found is None and rows.coded and refusal(q_latent_BHTr, q_rope_BHTR, rows, mask) is None:
        parts, lengths_B, options = rows.storage(q_rope_BHTR)
        mask_BTS = None if mask is None else mask[:, 0]
        q_codes_BHTr = q_latent_BHTr if unroped else None
        found = attend_codes(
            q_codes_BHTr, q_rope_BHTR, parts, lengths_B, up.softmax_scale, mask_BTS=mask_BTS, **options
        )
    if found is None:
        size, factors, mask = up.k_up_UNr.shape[2], rows.key_scales, _seen(rows, mask, q_nope_BHTN)
        # Factors are no part of a product.
        q_BHTd = F.pad(torch.cat([q_latent_BHTr, q_rope_BHTR], dim=-1), (0, factors))
        scales = {"key_scales": factors, "scales_values": up.scales_values}
        found = attend_rows(q_BHTd, rows.blocks(), up.softmax_scale, mask, size=size, **scales)
    summed_BHTr, lse_BHT = found
    if turn_rr is not None:
        summed_BHTr = summed_BHTr @ turn_rr.mT
    return _beside_sink(by_groups(summed_BHTr, up.v_up_UVr.mT, up.v_up_bias_UV), lse_BHT, up)


def _beside_sink(heads_BHTV: Tensor, lse_BHT: Tensor, up: UpProjections) -> Tensor:
    if up.sink_H is None:
        return heads_BHTV
    return heads_BHTV * beside_sink(lse_BHT[..., None], up.sink_H).to(heads_BHTV.dtype)


def prefill(
    q_nope_BHTN: Tensor, q_rope_BHTR: Tensor, rows: CachedRows, up: UpProjections, mask: Tensor | None
) -> Tensor:
    """Many new tokens: keys and values are expanded, so many at a time. As :func:`heads`."""
    c_B1Sr, k_rope_BPSR = rows.tensors()
    q_BHTd, length = torch.cat([q_nope_BHTN, q_rope_BHTR], dim=-1), c_B1Sr.shape[2]
    new = q_BHTd.shape[2]
    learns = torch.is_grad_enabled() and (q_BHTd.requires_grad or c_B1Sr.requires_grad or up.requires_grad)
    plain = q_BHTd.device.type != "cpu" or learns or not has_fused()
    if rows.newest and not plain:
        return _beside_sink(*_newest(q_BHTd, c_B1Sr, k_rope_BPSR, rows, up, mask), up)
    mask = rows.expanded_mask(mask)
    if plain and up.sink_H is not None:
        return attend_expanded(q_nope_BHTN, q_rope_BHTR, c_B1Sr, k_rope_BPSR, up, mask)
    if plain:
        k_BHSd, v_BHSV = expand(c_B1Sr, k_rope_BPSR, up, q_BHTd.shape[1])
        if mask is None and new < length:
            mask = causal_mask(new, length, device=q_BHTd.device)
        causal = mask is None and new > 1
        return F.scaled_dot_product_attention(
            q_BHTd, k_BHSd, v_BHSV, attn_mask=mask, is_causal=causal, scale=up.softmax_scale
        )
    # Without a mask the new tokens see all earlier ones, and each other in order.
    past = length - new if mask is None else length
    parts = _seen_by_all(q_BHTd, c_B1Sr[:, :, :past], k_rope_BPSR, up, mask)
    if mask is None:
        k_BHTd, v_BHTV = expand(c_B1Sr[:, :, past:], k_rope_BPSR[:, :, past:], up, q_BHTd.shape[1])
        parts.append(_fused(q_BHTd, k_BHTd, v_BHTV, up.softmax_scale, None, causal=True))
    return _beside_sink(*merge(parts), up)


def _seen_by_all(
    q_BHTd: Tensor, c_B1Sr: Tensor, k_rope_BPSR: Tensor, up: UpProjections, mask: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """Heads and log-sum-exps over rows that every query sees, but for the mask, so many rows at a time."""
    parts = []
    for start, stop in pairwise([*range(0, c_B1Sr.shape[2], _EXPANDED), c_B1Sr.shape[2]]):
        k_BHsd, v_BHsV = expand(c_B1Sr[:, :, start:stop], k_rope_BPSR[:, :, start:stop], up, q_BHTd.shape[1])
        parts.append(_fused(q_BHTd, k_BHsd, v_BHsV, up.softmax_scale, None if mask is None else mask[..., start:stop]))
    return parts


def _newest(
    q_BHTd: Tensor, c_B1Sr: Tensor, k_rope_BPSR: Tensor, rows: CachedRows, up: UpProjections, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Heads and log-sum-exps of tokens that each see their newest rows as they are, and those before them as they are
    stored: a few queries at a time, so that nobody looks at both versions of all rows.

    The rows are those of ``CachedRows.tensors``: as they are stored, from the first one on, then the newest.
    """
    new, count, newest = q_BHTd.shape[2], rows.seen, rows.newest
    # How many are stored, the first that is there as it is, and how many all queries see as they are stored.
    stored, exact = c_B1Sr.shape[2] - rows.near, count - rows.near
    past = max(0, min(stored, count - new - newest + 1))
    parts = _seen_by_all(q_BHTd, c_B1Sr[:, :, :past], k_rope_BPSR, up, mask)
    k_BHSd, v_BHSV = expand(c_B1Sr[:, :, past:], k_rope_BPSR[:, :, past:], up, q_BHTd.shape[1])
    at_S, found = torch.arange(count, device=q_BHTd.device), []
    for start in range(0, new, _QUERIES):
        end = min(start + _QUERIES, new)
        first, last = count - new + start, count - new + end
        # Where a row is not there as it is, the stored one is seen.
        far, low = max(past, min(stored, max(last - newest, exact))), max(exact, first - newest + 1)
        near = slice(stored - past + low - exact, stored - past + last - exact)
        k_BHsd, v_BHsV = (torch.cat([t[:, :, : far - past], t[:, :, near]], dim=2) for t in (k_BHSd, v_BHSV))
        seen_ts = newest_mask(at_S[first:last], at_S[past:far], at_S[low:last], newest)
        at_s = torch.cat([at_S[past:far], at_S[low:last]])
        mask_Bhts = narrowed(None if mask is None else mask[..., start:end, :], seen_ts, at_s)
        found.append(_fused(q_BHTd[:, :, start:end], k_BHsd, v_BHsV, up.softmax_scale, mask_Bhts))
    heads_BHTV, lse_BHT = (torch.cat(made, dim=2) for made in zip(*found, strict=True))
    parts.append((heads_BHTV, lse_BHT))
    return merge(parts)


def _fused(
    q_BHTd: Tensor, k_BHsd: Tensor, v_BHsV: Tensor, scale: float, mask: Tensor | None, *, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Heads and log-sum-exps, by PyTorch's fused CPU operator."""
    size, v_size = q_BHTd.shape[-1], v_BHsV.shape[-1]
    padded = max(size, v_size)
    # The operator wants equal head sizes; zeros cost less than the unfused path.
    q, k, v = F.pad(q_BHTd, (0, padded - size)), F.pad(k_BHsd, (0, padded - size)), F.pad(v_BHsV, (0, padded - v_size))
    out, lse = fused_attention(q, k, v, scale, None if mask is None else additive(mask, q.dtype), causal=causal)
    return out[..., :v_size], lse


def _seen(rows: CachedRows, mask: Tensor | None, q_BHTd: Tensor) -> Tensor | None:
    """The mask for the rows' blocks; ``None`` where all of them are seen."""
    mask, tokens = rows.allowed(mask), q_BHTd.shape[2]
    if mask is not None or tokens == 1:
        return mask
    return causal_mask(tokens, rows.seen, device=q_BHTd.device)[None, None]
