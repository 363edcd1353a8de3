"""Multi-head, grouped-query and multi-query attention: one computation, three numbers of kv heads.

With ``G = H`` kv heads this is the attention of Vaswani et al. (arXiv 1706.03762); with ``G = 1`` multi-query
attention (Shazeer, arXiv 1911.02150); between them grouped-query attention (Ainslie et al., arXiv 2305.13245).

B batch, T new tokens, S cached tokens, D hidden, H query heads, G kv heads, s = H / G, d head size, U groups of
heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latentize.attention.cache import GrowingCache
from latentize.attention.masks import causal_mask
from latentize.attention.rope import rope_angles, rotate_half
from latentize.attention.spec import AttentionSpec

__all__ = [
    "AttentionWeights",
    "attend",
    "beside_sink",
    "by_groups",
    "capped",
    "for_heads",
    "gated",
    "grouped_attention",
    "grown",
    "head_norm",
    "queries_keys",
    "rms_norm",
    "turned_queries",
    "turning_at",
]


@dataclass(frozen=True)
class AttentionWeights:
    """The projections of one layer, heads unpacked, groups unexpanded.

    Attributes:
        q_HdD, k_GdD, v_GdD: Weights that make queries, keys, values from the normalised hidden state.
        o_DHd: Weights from heads back to the hidden state.
        q_bias_Hd, k_bias_Gd, v_bias_Gd, o_bias_D: Biases, or ``None``.
        q_norm_d, k_norm_d: Weights of the per-head RMSNorm (Qwen3), or of one over all heads ``[h, d]`` (OLMo 2), or
            ``None``.
        q_turned_d: What queries are multiplied by after RoPE, where norms have their weights (Hunyuan), or ``None``.
        gate_HdD: Of a gate on what heads read, or ``None``.
        sink_H: Learnt logits that take a share of attention, or ``None``.
        v_norm: Whether values, too, are normalised, by a norm without a weight; ``v_GdD`` is ``k_GdD`` then.
    """

    q_HdD: Tensor
    k_GdD: Tensor
    v_GdD: Tensor
    o_DHd: Tensor
    q_bias_Hd: Tensor | None = None
    k_bias_Gd: Tensor | None = None
    v_bias_Gd: Tensor | None = None
    o_bias_D: Tensor | None = None
    q_norm_d: Tensor | None = None
    k_norm_d: Tensor | None = None
    q_turned_d: Tensor | None = None
    gate_HdD: Tensor | None = None
    sink_H: Tensor | None = None
    v_norm: bool = False

    def to(self, dtype: torch.dtype) -> AttentionWeights:
        """The same weights in another precision."""
        present = {name: t.to(dtype) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **present)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension (Zhang & Sennrich, arXiv 1910.07467)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def head_norm(x_BhTd: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of each head by a weight ``[d]``, or of all heads together by one ``[h, d]``."""
    if weight.ndim == 1:
        return rms_norm(x_BhTd, weight, eps)
    normed_BTn = rms_norm(x_BhTd.transpose(1, 2).flatten(2), weight.flatten(), eps)
    return normed_BTn.unflatten(-1, weight.shape).transpose(1, 2)


def _project(x_BTD: Tensor, w_hdD: Tensor, bias_hd: Tensor | None) -> Tensor:
    y_BhTd = torch.einsum("btD,hdD->bhtd", x_BTD, w_hdD)
    return y_BhTd if bias_hd is None else y_BhTd + bias_hd[:, None]


def by_groups(x_BHTi: Tensor, factor_Uio: Tensor, bias_Uo: Tensor | None = None) -> Tensor:
    """Heads ``[B, H, T, o]``: each times the matrix that its group of ``H / U`` heads shares, plus its bias.

    One product for each group: broadcast over the heads, PyTorch would copy the matrix for every one of them.
    """
    (batch, heads, tokens, _), groups = x_BHTi.shape, len(factor_Uio)
    x_Uni = x_BHTi.unflatten(1, (groups, heads // groups)).transpose(0, 1).flatten(1, 3)
    y_Uno = x_Uni @ factor_Uio
    if bias_Uo is not None:
        y_Uno = y_Uno + bias_Uo[:, None]
    return y_Uno.unflatten(1, (batch, heads // groups, tokens)).transpose(0, 1).flatten(1, 2)


def queries_keys(x_BTD: Tensor, w: AttentionWeights, eps: float) -> tuple[Tensor, Tensor]:
    """Queries ``[B, H, T, d]`` and keys ``[B, G, T, d]`` before RoPE, biases and per-head norms applied."""
    q_BHTd = _project(x_BTD, w.q_HdD, w.q_bias_Hd)
    k_BGTd = _project(x_BTD, w.k_GdD, w.k_bias_Gd)
    if w.q_norm_d is not None and w.k_norm_d is not None:
        return head_norm(q_BHTd, w.q_norm_d, eps), head_norm(k_BGTd, w.k_norm_d, eps)
    return q_BHTd, k_BGTd


def turned_queries(q_BHTd: Tensor, w: AttentionWeights, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries after RoPE, and what they are multiplied by there."""
    q_BHTd = rotate_half(q_BHTd, cos, sin)
    return q_BHTd if w.q_turned_d is None else q_BHTd * w.q_turned_d


def capped(score: Tensor, softcap: float) -> Tensor:
    """Logits bent to stay below ``softcap``; 0 leaves them alone (Gemma 2, arXiv 2408.00118, section 2)."""
    return softcap * torch.tanh(score / softcap) if softcap else score


def for_heads(x_GTd: Tensor, heads: int) -> Tensor:
    """Keys or values of ``G`` groups, ``[..., G, T, d]``, for each head of theirs; a view where it can be one."""
    groups, *sizes = x_GTd.shape[-3:]
    return x_GTd.unsqueeze(-3).expand(*x_GTd.shape[:-2], heads // groups, *sizes).flatten(-4, -3)


def attend(
    q_BHTd: Tensor,
    k_BHSd: Tensor,
    v_BHSd: Tensor,
    allowed_TS: Tensor,
    scale: float,
    softcap: float = 0.0,
    sink_H: Tensor | None = None,
) -> Tensor:
    """Softmax attention, written out: ``softmax(scale · q kᵀ) v`` over the allowed keys, and a sink if there is one."""
    score_BHTS = capped(scale * (q_BHTd @ k_BHSd.mT), softcap)
    score_BHTS = score_BHTS.masked_fill(~allowed_TS, -torch.inf)
    heads_BHTd = score_BHTS.softmax(-1) @ v_BHSd
    return heads_BHTd if sink_H is None else heads_BHTd * beside_sink(score_BHTS.logsumexp(-1, keepdim=True), sink_H)


def beside_sink(lse_BHT1: Tensor, sink_H: Tensor) -> Tensor:
    """The share of attention that a sink leaves to the keys, ``[B, H, T, 1]``: ``Σ eˢ / (Σ eˢ + e^sink)``.

    So a sink (gpt-oss, arXiv 2508.10925) is a factor on attention without one.

    Args:
        lse_BHT1: Log-sum-exps of the scores.
        sink_H: The sinks.
    """
    return (lse_BHT1 - sink_H[:, None, None]).sigmoid()


def grown(q_BHTd: Tensor, positions_BT: Tensor, growth: float, length: float, first: int = 0) -> Tensor:
    """Queries times ``1 + β log(1 + ⌊t / L⌋)`` at position ``t``: attention stays sharp in long texts (Llama 4, where
    the first position is 1; Ministral 3)."""
    if not growth:
        return q_BHTd
    factor_BT = 1 + growth * torch.log1p(((positions_BT + first) / length).floor())
    return q_BHTd * factor_BT[:, None, :, None].to(q_BHTd.dtype)


def gated(heads_BHTd: Tensor, x_BTD: Tensor, gate_HdD: Tensor | None) -> Tensor:
    """What heads read, times the sigmoid of a gate, if there is one (Qiu et al., arXiv 2505.06708)."""
    return heads_BHTd if gate_HdD is None else heads_BHTd * _project(x_BTD, gate_HdD, None).sigmoid()


def turning_at(spec: AttentionSpec, positions_BT: Tensor) -> tuple[float, ...]:
    """Radians per position of the pairs of a head, where these are the positions."""
    # Asked only where it matters: a device has to be waited for.
    return spec.at_length(int(positions_BT.max()) + 1) if spec.rope.length else spec.frequencies


def grouped_attention(
    x_BTD: Tensor,
    w: AttentionWeights,
    spec: AttentionSpec,
    *,
    positions_BT: Tensor | None = None,
    cache: GrowingCache | None = None,
    layer_idx: int = 0,
    window: int | None = None,
) -> Tensor:
    """Attention of one layer; with a ``cache`` the new tokens follow those that it holds.

    Args:
        x_BTD: Normalised hidden states of the new tokens.
        w: The weights.
        spec: The layer.
        positions_BT: Positions of the new tokens; by default they continue the cache.
        cache: Holds ``2 G d`` values a token: the keys, after RoPE, and the values.
        layer_idx: Which of the cache's layers.
        window: Tokens that a query sees, itself included; ``None`` is all.

    Returns:
        ``[B, T, D]``, what is added to the residual stream.
    """
    past = cache.get_seq_length(layer_idx) if cache else 0
    if positions_BT is None:
        positions_BT = torch.arange(past, past + x_BTD.shape[1], device=x_BTD.device)[None]
    q_BHTd, k_BGTd = queries_keys(x_BTD, w, spec.norm_eps)
    v_BGSd = _project(x_BTD, w.v_GdD, w.v_bias_Gd)
    if w.v_norm:
        v_BGSd = rms_norm(v_BGSd, v_BGSd.new_ones(()), spec.norm_eps)
    frequencies = torch.tensor([turning_at(spec, positions_BT)], device=x_BTD.device, dtype=torch.float64)
    cos, sin = rope_angles(frequencies, positions_BT)
    q_BHTd, k_BGSd = turned_queries(q_BHTd, w, cos, sin), rotate_half(k_BGTd, cos, sin)
    q_BHTd = grown(q_BHTd, positions_BT, spec.growth, spec.growth_length, spec.growth_first)
    if cache is not None:
        k_BGSd, v_BGSd = cache.update(k_BGSd, v_BGSd, layer_idx)
    allowed_TS = causal_mask(x_BTD.shape[1], k_BGSd.shape[2], window=window, device=x_BTD.device)
    k_BHSd, v_BHSd = (for_heads(t, spec.num_heads) for t in (k_BGSd, v_BGSd))
    heads_BHTd = attend(q_BHTd, k_BHSd, v_BHSd, allowed_TS, spec.softmax_scale, spec.softcap, w.sink_H)
    heads_BHTd = gated(heads_BHTd, x_BTD, w.gate_HdD)
    y_BTD = torch.einsum("bhtd,Dhd->btD", heads_BHTd, w.o_DHd)
    return y_BTD if w.o_bias_D is None else y_BTD + w.o_bias_D
