"""Fewer kv heads by averaging neighbours, the usual way from MHA to GQA or MQA without training.

It needs no new architecture and is the baseline that latent attention has to beat at equal bytes.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from latentize.attention.grouped import AttentionWeights

__all__ = ["pool_heads"]


def pool_heads(w: AttentionWeights, kv_heads: int) -> AttentionWeights:
    """Mean-pool keys and values of neighbouring kv heads (Ainslie et al., arXiv 2305.13245, section 2.1).

    Args:
        w: ``G`` kv heads.
        kv_heads: How many are to be left, a divisor of ``G``.
    """

    def pool(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.unflatten(0, (kv_heads, -1)).mean(1)

    pooled_k, pooled_v = pool(w.k_GdD), pool(w.v_GdD)
    assert pooled_k is not None and pooled_v is not None
    return replace(w, k_GdD=pooled_k, v_GdD=pooled_v, k_bias_Gd=pool(w.k_bias_Gd), v_bias_Gd=pool(w.v_bias_Gd))
