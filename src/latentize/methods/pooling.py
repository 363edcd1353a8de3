"""Fewer kv heads by averaging neighbours, the usual way from MHA to GQA or MQA without training.

It needs no new architecture and is the baseline that latent attention has to beat at equal bytes.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from latentize.attention.grouped import AttentionWeights
from latentize.modeling.unread import living

__all__ = ["pool_heads"]


def pool_heads(w: AttentionWeights, kv_heads: int) -> AttentionWeights:
    """Mean-pool keys and values of neighbouring kv heads (Ainslie et al., arXiv 2305.13245, section 2.1).

    Heads that are zero have no part in the mean.

    Args:
        w: ``G`` kv heads; of those that are zero the queries, or what reads the values, are zero too, see
            :mod:`unread`.
        kv_heads: How many are to be left, a divisor of ``G``.
    """

    def pooled(t: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        # Each pool is divided by the number of its heads that make anything.
        living_Gs = living(t, bias).view(kv_heads, -1)
        shrunk_G = living_Gs.shape[1] / living_Gs.sum(1).clamp_min(1)

        def mean(x: Tensor) -> Tensor:
            return x.unflatten(0, (kv_heads, -1)).mean(1) * shrunk_G.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)

        return mean(t), None if bias is None else mean(bias)

    (k_GdD, k_bias_Gd), (v_GdD, v_bias_Gd) = pooled(w.k_GdD, w.k_bias_Gd), pooled(w.v_GdD, w.v_bias_Gd)
    return replace(w, k_GdD=k_GdD, v_GdD=v_GdD, k_bias_Gd=k_bias_Gd, v_bias_Gd=v_bias_Gd)
