"""Fewer kv heads by averaging neighbours, the usual way from MHA to GQA or MQA without training.

It needs no new architecture and is the baseline that latent attention has to beat at equal bytes.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from latentize.attention.grouped import AttentionWeights
from latentize.attention.spec import AttentionSpec
from latentize.errors import OptionError
from latentize.modeling.unread import living
from latentize.recipe import Recipe

__all__ = ["pool_heads", "pooled_heads"]


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


def pooled_heads(recipe: Recipe, spec: AttentionSpec) -> int:
    """kv heads for ``--to gqa`` or ``mqa`` within the budget.

    Raises:
        OptionError: pooling whole heads cannot reach the budget, or nothing would change.
    """
    if recipe.to == "mqa":
        heads = 1
    else:
        fitting = [g for g in range(1, spec.num_kv_heads) if spec.num_kv_heads % g == 0]
        fitting = [g for g in fitting if g / spec.num_kv_heads <= recipe.budget + 1e-9]
        heads = max(fitting, default=0)
    if recipe.keep is not None and heads and heads / spec.num_kv_heads > recipe.keep + 1e-9:
        heads = 0
    if heads == 0 or heads == spec.num_kv_heads:
        raise OptionError(
            f"pooling {spec.num_kv_heads} kv heads cannot give {recipe.budget:.1%} of the cache",
            code="LZ304",
            where=f"--to {recipe.to} --keep",
            fix=f"the least that heads can be pooled to is {1 / spec.num_kv_heads:.1%}; latent attention goes lower",
        )
    return heads
