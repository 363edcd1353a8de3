"""Multi-head latent attention as DeepSeek-V2 states it (arXiv 2405.04434, section 2.1, equations 9 to 19).

What a layer caches of a token:

    MHA   2 H d    every head its own key and value                     grouped.py, G = H
    GQA   2 G d    heads of a group share a key and a value             grouped.py
    MQA   2 d      all heads share one key and one value                grouped.py, G = 1
    MLA   r + R    all heads share one latent and one roped key         here

Every key and value is linear in the latent ``c``: ``k_h = W_UK,h c``, ``v_h = W_UV,h c``. A rotated key would not be.
So position has a key of its own, ``k_R``, which is roped and shared.

Two ways to attend give the same output:

    expanded   make the key and the value of every head and cached token, then attend as in MHA
    absorbed   q_h · (W_UK,h c) = (W_UK,hᵀ q_h) · c, and Σ p W_UV,h c = W_UV,h Σ p c: no key or value is ever made

Absorbed MLA is MQA. There is one head of keys, ``[c; k_R]`` of ``r + R`` dimensions, and one of values, ``c`` itself.
Queries are wide, and what they read is brought back to the size of a head afterwards. So it reads ``r + R`` numbers of
a cached token where MHA reads ``2 H d``, and pays for it with wider dot products.

:mod:`latentize.attention.latent` generalises this to what a conversion needs.

B batch, T new tokens, S cached tokens, D hidden, H heads, r kv_lora_rank, Q q_lora_rank, N qk_nope_head_dim,
R qk_rope_head_dim, F = R / 2 pairs, V v_head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latentize.attention.cache import GrowingCache
from latentize.attention.grouped import attend, rms_norm
from latentize.attention.masks import causal_mask
from latentize.attention.rope import rope_angles, rotate_interleaved

__all__ = ["MlaWeights", "absorbed", "cached", "expanded", "multi_head_latent_attention", "queries"]


@dataclass(frozen=True)
class MlaWeights:
    """The matrices of one layer, named as in the paper.

    Attributes:
        dq_QD, uq_HNQ, qr_HRQ: ``W_DQ``, ``W_UQ`` and ``W_QR``, the queries'.
        dkv_rD, uk_HNr, uv_HVr: ``W_DKV``, ``W_UK`` and ``W_UV``.
        kr_RD: ``W_KR``, of the roped key.
        o_DHV: ``W_O``.
        frequencies_F: Radians per position of each pair of roped dimensions.
        q_norm_Q, kv_norm_r: Weights of an RMSNorm on either latent. The equations have none, the released models
            have both.
    """

    dq_QD: Tensor
    uq_HNQ: Tensor
    qr_HRQ: Tensor
    dkv_rD: Tensor
    uk_HNr: Tensor
    uv_HVr: Tensor
    kr_RD: Tensor
    o_DHV: Tensor
    frequencies_F: Tensor
    q_norm_Q: Tensor | None = None
    kv_norm_r: Tensor | None = None
    norm_eps: float = 1e-6


def queries(h_BTD: Tensor, w: MlaWeights, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Un-roped and roped queries, ``[B, H, T, N]`` and ``[B, H, T, R]`` (equations 12 to 14)."""
    c_BTQ = h_BTD @ w.dq_QD.T
    if w.q_norm_Q is not None:
        c_BTQ = rms_norm(c_BTQ, w.q_norm_Q, w.norm_eps)
    q_BHTN = torch.einsum("btQ,hnQ->bhtn", c_BTQ, w.uq_HNQ)
    return q_BHTN, _roped(torch.einsum("btQ,hrQ->bhtr", c_BTQ, w.qr_HRQ), w, positions_BT)


def cached(h_BTD: Tensor, w: MlaWeights, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
    """All that is cached: latents ``[B, 1, T, r]`` and roped keys ``[B, 1, T, R]`` (equations 9 and 15)."""
    c_BTr = h_BTD @ w.dkv_rD.T
    if w.kv_norm_r is not None:
        c_BTr = rms_norm(c_BTr, w.kv_norm_r, w.norm_eps)
    return c_BTr[:, None], _roped((h_BTD @ w.kr_RD.T)[:, None], w, positions_BT)


def _roped(x_BhTR: Tensor, w: MlaWeights, positions_BT: Tensor) -> Tensor:
    return rotate_interleaved(x_BhTR, *rope_angles(w.frequencies_F[None], positions_BT))


def expanded(
    q_BHTN: Tensor, q_rope_BHTR: Tensor, c_B1Sr: Tensor, k_rope_B1SR: Tensor, allowed_TS: Tensor, w: MlaWeights
) -> Tensor:
    """Heads ``[B, H, T, V]`` by ordinary attention over keys and values of all heads (equations 10, 11, 16 to 18)."""
    k_BHSN, v_BHSV = c_B1Sr @ w.uk_HNr.mT, c_B1Sr @ w.uv_HVr.mT
    k_BHSd = torch.cat([k_BHSN, k_rope_B1SR.expand(-1, len(w.uk_HNr), -1, -1)], dim=-1)
    return attend(torch.cat([q_BHTN, q_rope_BHTR], dim=-1), k_BHSd, v_BHSV, allowed_TS, _scale(w))


def absorbed(
    q_BHTN: Tensor, q_rope_BHTR: Tensor, c_B1Sr: Tensor, k_rope_B1SR: Tensor, allowed_TS: Tensor, w: MlaWeights
) -> Tensor:
    """The same heads by multi-query attention over what is cached: one key ``[c; k_R]`` and one value ``c``."""
    q_BHTw = torch.cat([q_BHTN @ w.uk_HNr, q_rope_BHTR], dim=-1)
    read_BHTr = attend(q_BHTw, torch.cat([c_B1Sr, k_rope_B1SR], dim=-1), c_B1Sr, allowed_TS, _scale(w))
    return read_BHTr @ w.uv_HVr.mT


def _scale(w: MlaWeights) -> float:
    return (w.uq_HNQ.shape[1] + w.qr_HRQ.shape[1]) ** -0.5


def multi_head_latent_attention(
    h_BTD: Tensor, w: MlaWeights, *, absorb: bool, cache: GrowingCache | None = None, layer_idx: int = 0
) -> Tensor:
    """Attention of one layer, ``[B, T, D]`` (equation 19); with a ``cache`` the new tokens follow those that it holds.

    Args:
        h_BTD: Hidden states of the new tokens.
        w: The weights.
        absorb: Attend to the cached latents as they are, instead of expanding them.
        cache: Holds ``r + R`` values a token.
        layer_idx: Which of the cache's layers.
    """
    past = cache.get_seq_length(layer_idx) if cache else 0
    positions_BT = torch.arange(past, past + h_BTD.shape[1], device=h_BTD.device)[None]
    q_BHTN, q_rope_BHTR = queries(h_BTD, w, positions_BT)
    c_B1Sr, k_rope_B1SR = cached(h_BTD, w, positions_BT)
    if cache is not None:
        c_B1Sr, k_rope_B1SR = cache.update(c_B1Sr, k_rope_B1SR, layer_idx)
    allowed_TS = causal_mask(h_BTD.shape[1], c_B1Sr.shape[2], device=h_BTD.device)
    heads_BHTV = (absorbed if absorb else expanded)(q_BHTN, q_rope_BHTR, c_B1Sr, k_rope_B1SR, allowed_TS, w)
    return torch.einsum("bhtv,Dhv->btD", heads_BHTV, w.o_DHV)
