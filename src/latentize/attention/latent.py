"""Latent attention as conversions need it: :mod:`latentize.attention.mla`, and more than DeepSeek's form.

Roped keys may be several (``P``: one a kv head for MHA2MLA and for exact conversions), heads of a group may share
up-projections (``U = G``), projections may have biases, roped parts a norm, and logits a cap. The latent has no norm,
and queries are not compressed. RoPE is in the "half" layout.

A norm of keys (qk-norm, Qwen3) is one number a token and kv head, ``κ = 1 / rms(W_K x)``, and its weight is a part of
the projections. So the norm is exact beside a key of any rank where ``κ`` is cached: a logit is ``κ (q_C · W_UK c + q_R
· k_R)``. Queries are normalised before they are split (arXiv 2606.16310). Where values are normalised keys (Gemma 4),
the same number is theirs: a probability is multiplied by it before latents are summed.

B batch, T new tokens, S cached tokens, D hidden, H query heads, P roped keys, U up-projections, s = H / U,
r kv_lora_rank, N qk_nope_head_dim, R qk_rope_head_dim, F = R / 2 pairs, V v_head_dim; K norms of keys, d size of a
head before its norm, e = d or, where all heads have one norm, G d.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latentize.attention.cache import GrowingCache
from latentize.attention.coding import RowCode
from latentize.attention.grouped import attend, beside_sink, by_groups, capped, for_heads, gated, grown, head_norm
from latentize.attention.masks import causal_mask
from latentize.attention.projections import UpProjections
from latentize.attention.rope import Beyond, rope_angles, rotate_half
from latentize.attention.spec import LatentSpec

__all__ = [
    "LatentWeights",
    "absorbed_heads",
    "backwards",
    "cache_rows",
    "expand",
    "expanded_heads",
    "factors_apart",
    "key_factors",
    "latent_attention",
    "output",
    "queries",
    "turned",
]


@dataclass(frozen=True)
class LatentWeights:
    """The projections of one MLA layer. RoPE is in the "half" layout.

    Attributes:
        q_nope_HND, q_rope_HRD: Queries, un-roped and roped part.
        kv_a_rD: Down-projection to the latent.
        k_rope_PRD: Roped keys.
        k_up_UNr, v_up_UVr: Up-projections ``W_UK`` and ``W_UV``.
        o_DHV: Output projection.
        frequencies_PF: Radians per position of each pair of each roped key; not trained.
        softmax_scale: Factor on the logits.
        beyond: What a long text does to the frequencies, or ``None``.
        q_nope_bias_HN, q_rope_bias_HR, k_rope_bias_PR, o_bias_D: Biases, or ``None``. The un-roped key and the
            latent need none: a constant key drops out of the softmax, a constant value is an output bias.
        v_up_bias_UV: Of values, where there are sinks: these take a share of it, so that it is no output bias.
        sink_H: Learnt logits that take a share of attention, or ``None``.
        q_norm_R, k_norm_R: Weights of an RMSNorm of each head, or of all heads together (``[H, R]`` and ``[P, R]``), or
            ``None``; where the whole head is roped. With ``q_HdD`` the first is of the whole queries, ``[d]`` or
            ``[H, d]``, and there is no second.
        norm_eps: Epsilon of that norm.
        softcap: Logits are ``softcap · tanh(logits / softcap)``; 0 is not at all.
        growth, growth_length, growth_first: As of :class:`AttentionSpec`.
        code: How cached rows are rounded, or ``None``; not trained.
        q_HdD: Queries before their norm, where norms are kept beside a compressed key. Un-roped and roped part are then
            made from normalised queries: ``q_nope_HNd`` and ``q_rope_HRd``.
        q_mirror_HRd: A second map of normalised queries, whose product rotates backwards and is added to the roped part
            (norms after RoPE, :func:`latentize.methods.norms.with_norms`), or ``None``.
        k_KeD, key_gain_K: There a token's factors are ``key_gain / rms(k_KeD x)``.
        scales_values: Whether values are multiplied by them, too.
        gate_HVD: Of a gate on what heads read, or ``None``.
    """

    q_nope_HND: Tensor
    q_rope_HRD: Tensor
    kv_a_rD: Tensor
    k_rope_PRD: Tensor
    k_up_UNr: Tensor
    v_up_UVr: Tensor
    o_DHV: Tensor
    frequencies_PF: Tensor
    softmax_scale: float
    beyond: Beyond | None = None
    q_nope_bias_HN: Tensor | None = None
    q_rope_bias_HR: Tensor | None = None
    k_rope_bias_PR: Tensor | None = None
    o_bias_D: Tensor | None = None
    q_norm_R: Tensor | None = None
    k_norm_R: Tensor | None = None
    norm_eps: float = 1e-6
    softcap: float = 0.0
    growth: float = 0.0
    growth_length: float = 1.0
    growth_first: int = 0
    code: RowCode | None = None
    q_HdD: Tensor | None = None
    q_mirror_HRd: Tensor | None = None
    k_KeD: Tensor | None = None
    key_gain_K: Tensor | None = None
    gate_HVD: Tensor | None = None
    v_up_bias_UV: Tensor | None = None
    sink_H: Tensor | None = None
    scales_values: bool = False

    @property
    def spec(self) -> LatentSpec:
        heads, nope, _ = self.q_nope_HND.shape
        return LatentSpec(
            hidden_size=self.kv_a_rD.shape[1],
            num_heads=heads,
            kv_lora_rank=self.kv_a_rD.shape[0],
            qk_rope_head_dim=self.k_rope_PRD.shape[1],
            qk_nope_head_dim=nope,
            v_head_dim=self.v_up_UVr.shape[1],
            rope_heads=self.k_rope_PRD.shape[0],
            up_heads=self.k_up_UNr.shape[0],
            softmax_scale=self.softmax_scale,
            softcap=self.softcap,
            key_scales=self.key_scales,
            scales_values=self.scales_values,
        )

    @property
    def key_scales(self) -> int:
        return 0 if self.k_KeD is None else len(self.k_KeD)

    @property
    def requires_grad(self) -> bool:
        return self.k_up_UNr.requires_grad or self.v_up_UVr.requires_grad

    def turning(self, positions_BT: Tensor) -> Tensor:
        """Radians per position where these are the positions, ``[P, F]``."""
        if self.beyond is None:
            return self.frequencies_PF
        return self.beyond.frequencies(self.frequencies_PF, positions_BT)

    def up(self, c_B1Sr: Tensor) -> tuple[Tensor, Tensor]:
        """Un-roped keys ``[B, U, S, N]`` and values ``[B, U, S, V]`` of latents."""
        v_BUSV = c_B1Sr @ self.v_up_UVr.mT
        return c_B1Sr @ self.k_up_UNr.mT, v_BUSV if self.v_up_bias_UV is None else v_BUSV + self.v_up_bias_UV[:, None]

    def to(self, dtype: torch.dtype) -> LatentWeights:
        """The same weights in another precision; frequencies stay as they are."""
        kept = {"frequencies_PF"}
        present = {n: t.to(dtype) for n, t in vars(self).items() if isinstance(t, Tensor) and n not in kept}
        return replace(self, **present)


def _project(x_BTD: Tensor, w_hdD: Tensor, bias_hd: Tensor | None) -> Tensor:
    h, d, hidden = w_hdD.shape
    y_BThd = torch.nn.functional.linear(x_BTD, w_hdD.reshape(h * d, hidden)).unflatten(-1, (h, d))
    return (y_BThd if bias_hd is None else y_BThd + bias_hd).transpose(1, 2)


def queries(x_BTD: Tensor, w: LatentWeights, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Un-roped and roped queries, ``[B, H, T, N]`` and ``[B, H, T, R]``."""
    q_nope_BHTN, q_rope_BHTR = _steady_queries(x_BTD, w, positions_BT)
    growth = (positions_BT, w.growth, w.growth_length, w.growth_first)
    return grown(q_nope_BHTN, *growth), grown(q_rope_BHTR, *growth)


def _steady_queries(x_BTD: Tensor, w: LatentWeights, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The same where they do not grow."""
    angles = rope_angles(w.turning(positions_BT), positions_BT)
    if w.q_HdD is not None:
        assert w.q_norm_R is not None
        q_BHTd = head_norm(_project(x_BTD, w.q_HdD, None), w.q_norm_R, w.norm_eps)
        q_rope_BHTR = turned(q_BHTd @ w.q_rope_HRD.mT, None, w.norm_eps, angles)
        if w.q_mirror_HRd is not None:
            q_rope_BHTR = q_rope_BHTR + turned(q_BHTd @ w.q_mirror_HRd.mT, None, w.norm_eps, backwards(angles))
        return q_BHTd @ w.q_nope_HND.mT, q_rope_BHTR
    q_nope_BHTN = _project(x_BTD, w.q_nope_HND, w.q_nope_bias_HN)
    q_rope_BHTR = _project(x_BTD, w.q_rope_HRD, w.q_rope_bias_HR)
    return q_nope_BHTN, turned(q_rope_BHTR, w.q_norm_R, w.norm_eps, angles)


def cache_rows(x_BTD: Tensor, w: LatentWeights, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
    """What is cached of the new tokens: the latent ``[B, 1, T, r]`` and the roped keys ``[B, P, T, R]``.

    Where norms are kept beside a compressed key, factors follow the one roped key: ``[B, 1, T, R + K]``.
    """
    c_B1Tr = torch.nn.functional.linear(x_BTD, w.kv_a_rD)[:, None]
    k_rope_BPTR = _project(x_BTD, w.k_rope_PRD, w.k_rope_bias_PR)
    angles = rope_angles(w.turning(positions_BT), positions_BT)
    k_rope_BPTR = turned(k_rope_BPTR, w.k_norm_R, w.norm_eps, angles)
    if w.k_KeD is None or w.key_gain_K is None:
        return c_B1Tr, k_rope_BPTR
    k_BTKe = torch.einsum("btD,keD->btke", x_BTD, w.k_KeD)
    return c_B1Tr, torch.cat([k_rope_BPTR, key_factors(k_BTKe, w.key_gain_K, w.norm_eps)], dim=-1)


def key_factors(k_BTKe: Tensor, gain_K: Tensor, eps: float) -> Tensor:
    """What norms multiply keys by, ``[B, 1, T, K]``: ``gain / rms(k)``.

    Args:
        k_BTKe: Keys before their norms.
        gain_K: A factor on each; it brings what is cached near one.
        eps: Of the norms.
    """
    wide = k_BTKe.to(torch.promote_types(k_BTKe.dtype, torch.float32))
    return (gain_K * torch.rsqrt(wide.square().mean(-1) + eps)).to(k_BTKe.dtype)[:, None]


def factors_apart(k_rope_BPSR: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
    """Roped keys, and the ``count`` factors that follow them, ``[B, K, S]``."""
    if not count:
        return k_rope_BPSR, None
    k_rope_B1SR, factor_B1SK = k_rope_BPSR.tensor_split([k_rope_BPSR.shape[-1] - count], dim=-1)
    return k_rope_B1SR, factor_B1SK[:, 0].mT


def turned(x_BhTR: Tensor, norm_R: Tensor | None, eps: float, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Roped queries or keys after their norm, if there is one, and RoPE.

    Args:
        x_BhTR: Of all query heads, or of all roped keys.
        norm_R: Weight of an RMSNorm, ``[R]`` or ``[h, R]``.
        eps: Of that norm.
        angles: Cosines and sines of each roped key at each token, ``[B, P, T, F]``.
    """
    if norm_R is not None:
        x_BhTR = head_norm(x_BhTR, norm_R, eps)
    cos, sin = angles
    if 1 < cos.shape[1] != x_BhTR.shape[1]:
        share = x_BhTR.shape[1] // cos.shape[1]
        cos, sin = cos.repeat_interleave(share, dim=1), sin.repeat_interleave(share, dim=1)
    return rotate_half(x_BhTR, cos, sin)


def backwards(angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotations that undo these."""
    return angles[0], -angles[1]


def expand(c_B1Sr: Tensor, k_rope_BPSR: Tensor, w: UpProjections, heads: int) -> tuple[Tensor, Tensor]:
    """Keys ``[B, H, S, N + R]`` and values ``[B, H, S, V]`` of all ``heads``."""
    k_nope_BUSN, v_BUSV = w.up(c_B1Sr)
    k_rope_BPSR, factor_BKS = factors_apart(k_rope_BPSR, w.key_scales)
    k_BHSd = torch.cat([for_heads(k_nope_BUSN, heads), for_heads(k_rope_BPSR, heads)], dim=-1)
    v_BHSV = for_heads(v_BUSV, heads)
    if factor_BKS is not None:
        factor_BHS1 = factor_BKS.repeat_interleave(heads // w.key_scales, dim=1)[..., None]
        k_BHSd, v_BHSV = k_BHSd * factor_BHS1, v_BHSV * factor_BHS1 if w.scales_values else v_BHSV
    return k_BHSd, v_BHSV


def expanded_heads(
    q_nope_BHTN: Tensor, q_rope_BHTR: Tensor, c_B1Sr: Tensor, k_rope_BPSR: Tensor, allowed: Tensor, w: UpProjections
) -> Tensor:
    """Heads ``[B, H, T, V]`` by ordinary attention over expanded keys and values."""
    k_BHSd, v_BHSV = expand(c_B1Sr, k_rope_BPSR, w, q_nope_BHTN.shape[1])
    q_BHTd = torch.cat([q_nope_BHTN, q_rope_BHTR], dim=-1)
    return attend(q_BHTd, k_BHSd, v_BHSV, allowed, w.softmax_scale, w.softcap, w.sink_H)


def absorbed_heads(
    q_nope_BHTN: Tensor, q_rope_BHTR: Tensor, c_B1Sr: Tensor, k_rope_BPSR: Tensor, allowed: Tensor, w: UpProjections
) -> Tensor:
    """Heads ``[B, H, T, V]`` by attention in the latent space.

    Args:
        q_nope_BHTN, q_rope_BHTR: From :func:`queries`.
        c_B1Sr, k_rope_BPSR: From :func:`cache_rows`, of all tokens so far.
        allowed: Boolean, broadcastable to ``[B, H, T, S]``.
        w: The weights, or up-projections alone.
    """
    k_rope_BPSR, factor_BKS = factors_apart(k_rope_BPSR, w.key_scales)
    heads, ropes = q_nope_BHTN.shape[1], k_rope_BPSR.shape[1]
    # Heads that share a projection or a roped key lie next to each other: (U, s) and (P, H / P).
    q_latent_BHTr = by_groups(q_nope_BHTN, w.k_up_UNr)
    score_rope = q_rope_BHTR.unflatten(1, (ropes, heads // ropes)) @ k_rope_BPSR[:, :, None].mT
    score_BHTS = w.softmax_scale * (q_latent_BHTr @ c_B1Sr.mT + score_rope.flatten(1, 2))
    factor_BH1S = None if factor_BKS is None else factor_BKS.repeat_interleave(heads // w.key_scales, dim=1)[:, :, None]
    if factor_BH1S is not None:
        score_BHTS = score_BHTS * factor_BH1S
    score_BHTS = capped(score_BHTS, w.softcap)
    score_BHTS = score_BHTS.masked_fill(~allowed, -torch.inf)
    p_BHTS = score_BHTS.softmax(-1)
    if factor_BH1S is not None and w.scales_values:
        p_BHTS = p_BHTS * factor_BH1S
    summed_BHTr = p_BHTS @ c_B1Sr
    heads_BHTV = by_groups(summed_BHTr, w.v_up_UVr.mT, w.v_up_bias_UV)
    return (
        heads_BHTV if w.sink_H is None else heads_BHTV * beside_sink(score_BHTS.logsumexp(-1, keepdim=True), w.sink_H)
    )


def output(heads_BHTV: Tensor, w: LatentWeights) -> Tensor:
    """Heads back to the residual stream, ``[B, T, D]``."""
    y_BTD = torch.nn.functional.linear(heads_BHTV.transpose(1, 2).flatten(2), w.o_DHV.flatten(1))
    return y_BTD if w.o_bias_D is None else y_BTD + w.o_bias_D


def latent_attention(
    x_BTD: Tensor,
    w: LatentWeights,
    *,
    absorb: bool,
    positions_BT: Tensor | None = None,
    cache: GrowingCache | None = None,
    layer_idx: int = 0,
    window: int | None = None,
) -> Tensor:
    """Attention of one MLA layer, the readable form that every faster one is tested against.

    Args:
        x_BTD: Normalised hidden states of the new tokens.
        w: The weights.
        absorb: Attend in the latent space instead of expanding keys and values.
        positions_BT: Positions of the new tokens; by default they continue the cache.
        cache: Holds ``r + P R`` values a token.
        layer_idx: Which of the cache's layers.
        window: Tokens that a query sees, itself included; ``None`` is all.

    Returns:
        ``[B, T, D]``, what is added to the residual stream.
    """
    past = cache.get_seq_length(layer_idx) if cache else 0
    if positions_BT is None:
        positions_BT = torch.arange(past, past + x_BTD.shape[1], device=x_BTD.device)[None]
    q_nope_BHTN, q_rope_BHTR = queries(x_BTD, w, positions_BT)
    c_B1Sr, k_rope_BPSR = cache_rows(x_BTD, w, positions_BT)
    if cache is not None:
        c_B1Sr, k_rope_BPSR = cache.update(c_B1Sr, k_rope_BPSR, layer_idx)
    tokens, count = x_BTD.shape[1], c_B1Sr.shape[2]
    allowed_TS = causal_mask(tokens, count, window=window, device=x_BTD.device)
    if w.code is not None:
        # This cache holds rows as they are, and they are rounded whenever they are read.
        c_B1Sr, k_rope_BPSR, _ = w.code.as_cached(c_B1Sr, k_rope_BPSR, positions_BT)
        allowed_TS, _ = w.code.who_sees(tokens, count, x_BTD.device)
    form = absorbed_heads if absorb else expanded_heads
    heads_BHTV = form(q_nope_BHTN, q_rope_BHTR, c_B1Sr, k_rope_BPSR, allowed_TS, w)
    return output(gated(heads_BHTV, x_BTD, w.gate_HVD), w)
