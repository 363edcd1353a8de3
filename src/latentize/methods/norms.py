"""Norms of queries and keys (qk-norm) beside a key of any rank: fitted, or kept.

A method splits and compresses linear keys. A normalised key ``γ W x / rms(W x)`` is not linear, but nearly: its size
differs from token to token, its direction is linear. So a method is given ``s γ W``, where ``s`` is the factor that
suits all tokens of a head best. What is left over may be fitted (:func:`~latentize.methods.position.linearised`). Or
the norm is kept: ``1 / (s rms(W x))`` is one number a token and norm, which is cached and multiplies logits
(arXiv 2606.16310), and queries are normalised before they are split. Values that are keys without the weight of their
norm (Gemma 4) have the same number, and are multiplied by it, too.

H query heads, G kv heads, s = H / G, d head size, D inputs, K norms of keys, N un-roped and R roped query size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from latentize.attention.grouped import AttentionWeights
from latentize.attention.latent import LatentWeights
from latentize.attention.spec import AttentionSpec
from latentize.methods.linalg import svd
from latentize.methods.position import best_factors, even_part, linearised
from latentize.methods.setting import Setting
from latentize.methods.statistics import CalibrationStats

__all__ = ["linear_heads", "with_norms"]


def linear_heads(w: AttentionWeights, stats: CalibrationStats, setting: Setting) -> AttentionWeights:
    """A layer as methods take it: without the norms of its heads, unless it keeps its keys whole.

    Args:
        w: The layer, float64.
        stats: Of its inputs, with cross moments where queries and keys are normalised.
        setting: Says what becomes of norms and biases.
    """
    if setting.linear:
        return linearised(w, stats)
    if not setting.key_scales:
        return w
    assert w.q_norm_d is not None and w.k_norm_d is not None and stats.qx_HdD is not None and stats.kx_GdD is not None
    q_HdD, k_GdD = w.q_norm_d[..., None] * w.q_HdD, w.k_norm_d[..., None] * w.k_GdD
    q_HdD = best_factors(q_HdD, stats.qx_HdD, stats)[:, None, None] * q_HdD
    factor_G11 = best_factors(k_GdD, stats.kx_GdD, stats)[:, None, None]
    # Keys whose norm has a weight of zero are nothing, the values that they are without it are not.
    v_GdD = torch.where(factor_G11 != 0, factor_G11, 1.0) * w.v_GdD if w.v_norm else w.v_GdD
    none: dict[str, Any] = {"q_norm_d": None, "k_norm_d": None, "q_turned_d": None, "v_norm": False}
    return replace(w, q_HdD=q_HdD, k_GdD=factor_G11 * k_GdD, v_GdD=v_GdD, **none)


def with_norms(
    made: LatentWeights, w: AttentionWeights, linear: AttentionWeights, spec: AttentionSpec
) -> LatentWeights:
    """What was made of linear heads, with the source's norms.

    Args:
        made: The converted layer.
        w: The source's, float64.
        linear: What ``made`` was made from, of :func:`linear_heads`.
        spec: The layer.
    """
    assert w.q_norm_d is not None and w.k_norm_d is not None
    factor_G = _size(linear.k_GdD) / _size(w.k_norm_d[..., None] * w.k_GdD)
    # Of a head that is zero any factor is right.
    factor_G = torch.where(factor_G > 0, factor_G, 1.0).nan_to_num(1.0)
    # A power of two, which any precision holds; queries take the rest.
    of_norm_K = factor_G.unflatten(0, (spec.key_norms, -1)).mean(1).log2().round().exp2()
    rest_G = of_norm_K.repeat_interleave(len(factor_G) // spec.key_norms) / factor_G
    # Queries were split as linear functions of x, each a function of its head: that one is what normalised heads need.
    inverse_HDd = _inverse(linear.q_HdD) * rest_G.repeat_interleave(spec.group_size)[:, None, None]
    q_nope_HNd, q_rope_HRd, q_mirror_HRd = _before_rope(
        made.q_nope_HND @ inverse_HDd, made.q_rope_HRD @ inverse_HDd, w.q_turned_d
    )
    return replace(
        made,
        q_nope_HND=q_nope_HNd,
        q_rope_HRD=q_rope_HRd,
        q_mirror_HRd=q_mirror_HRd,
        q_norm_R=w.q_norm_d,
        k_norm_R=None,
        q_HdD=w.q_HdD,
        k_KeD=w.k_GdD.flatten(0, 1).unflatten(0, (spec.key_norms, -1)),
        key_gain_K=1 / of_norm_K,
        v_up_UVr=rest_G[:, None, None] * made.v_up_UVr if w.v_norm else made.v_up_UVr,
        scales_values=w.v_norm,
    )


def _before_rope(
    q_nope_HNd: Tensor, q_rope_HRd: Tensor, turned_d: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Maps of queries that are multiplied by a factor after RoPE, as maps of queries before it.

    Per pair the factor is ``a + b F``, where ``F`` turns the sign of the second of the two, and mirrors a rotation:
    ``F R(t) = R(-t) F``. So what is odd in a pair rotates backwards. Maps to what rotates leave rotations alone.

    Args:
        q_nope_HNd, q_rope_HRd: Maps.
        turned_d: The factor, or ``None``.

    Returns:
        Un-roped, roped, and what rotates backwards.
    """
    if turned_d is None:
        return q_nope_HNd, q_rope_HRd, None
    even_d = even_part(turned_d)
    return q_nope_HNd * turned_d, q_rope_HRd * even_d, q_rope_HRd * (turned_d - even_d)


def _size(w_hdD: Tensor) -> Tensor:
    return w_hdD.flatten(1).norm(dim=1)


def _inverse(w_hdD: Tensor) -> Tensor:
    """Pseudo-inverses, ``[h, D, d]``."""
    u_hdi, sigma_hi, v_hiD = svd(w_hdD)
    kept_hi = sigma_hi > torch.finfo(sigma_hi.dtype).eps * max(w_hdD.shape[1:]) * sigma_hi[:, :1]
    inverse_hi = torch.where(kept_hi, 1 / sigma_hi, 0.0)
    return (v_hiD.mT * inverse_hi[:, None]) @ u_hdi.mT
