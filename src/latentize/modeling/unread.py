"""What of an attention layer nothing reads: pruned heads, and whatever else cannot change its output.

A query of a head whose value is lost, a key that is multiplied by nothing: such weights may be anything, and are best
nothing. They take no part of a latent then, and the output stays what it was.

H query heads, G kv heads, s = H / G, d head size.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from latentize.attention.grouped import AttentionWeights

__all__ = ["living", "without_unread"]


def living(w_hdD: Tensor, bias_hd: Tensor | None = None) -> Tensor:
    """Which heads make anything but zeros, ``[h]``."""
    found_h = (w_hdD != 0).flatten(1).any(1)
    return found_h if bias_hd is None else found_h | (bias_hd != 0).any(1)


def without_unread(w: AttentionWeights) -> AttentionWeights:
    """The same layer with zeros in the place of what cannot change its output.

    Values that the output projection ignores; what the output projection does with values that are zero; queries of
    heads that add nothing or whose keys are zero; keys that only meet queries that are zero. The last two are left as
    they are under a norm over all heads, which every head has a part in, and keys that are values whole.

    Args:
        w: The layer; the tensors of one in which all is read are returned as they are.
    """
    heads, groups = len(w.q_HdD), len(w.k_GdD)
    share = heads // groups
    value_H = living(w.v_GdD, w.v_bias_Gd).repeat_interleave(share)
    adds_H = (w.o_DHd != 0).any(2).any(0) & value_H
    found = replace(w, o_DHd=_kept(w.o_DHd, adds_H, 1))
    value_G = adds_H.view(groups, share).any(1)
    found = replace(found, v_GdD=_kept(w.v_GdD, value_G), v_bias_Gd=_kept_bias(w.v_bias_Gd, value_G))
    if w.q_norm_d is not None and w.q_norm_d.ndim > 1:
        return found
    key_H = living(w.k_GdD, w.k_bias_Gd).repeat_interleave(share)
    asks_H = adds_H & key_H & living(w.q_HdD, w.q_bias_Hd)
    key_G = asks_H.view(groups, share).any(1) | (value_G if w.v_norm else False)
    return replace(
        found,
        q_HdD=_kept(w.q_HdD, asks_H),
        q_bias_Hd=_kept_bias(w.q_bias_Hd, asks_H),
        k_GdD=_kept(w.k_GdD, key_G),
        k_bias_Gd=_kept_bias(w.k_bias_Gd, key_G),
    )


def _kept(weight: Tensor, kept_h: Tensor, dim: int = 0) -> Tensor:
    """Zeros for the heads that are not kept."""
    if bool(kept_h.all()):
        return weight
    shape = [1] * weight.ndim
    shape[dim] = -1
    return weight * kept_h.view(shape)


def _kept_bias(bias: Tensor | None, kept_h: Tensor) -> Tensor | None:
    return None if bias is None else _kept(bias, kept_h)
