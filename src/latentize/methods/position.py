"""Position-aware RoPE selection: rotation is kept where losing it would change what is attended.

A key pair is a complex number. A logit is ``Re Σ_f q_f conj(k_f) e^{i ω_f Δ}``; giving up the rotation of a component
of logit energy ``λ`` and putting its best constant ``ρ_f = E[e^{i ω_f Δ}]`` in its place costs ``λ (1 - |ρ_f|²)``, with
``Δ`` distributed as the layer attends. The components that are the most expensive to give up keep rotating, in one
shared key: each at a rung of one ladder of frequencies, or each at its own where a format can hold that.

H query heads, G kv heads, s = H / G, d head size, F = d / 2 pairs, D inputs, R roped dimensions, J = R / 2 rungs.
A bias is the weight of one more input that is always one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latentize.attention.grouped import AttentionWeights
from latentize.attention.spec import AttentionSpec
from latentize.methods.distances import expected_rotation, rotations
from latentize.methods.linalg import eigh
from latentize.methods.rope_split import RopeSplit
from latentize.methods.statistics import CalibrationStats

__all__ = [
    "Components",
    "assign_rungs",
    "best_factors",
    "costliest",
    "dropping_cost",
    "even_part",
    "key_components",
    "ladder",
    "linearised",
    "on_ladder",
    "position_aware_split",
    "rope_cost",
    "rung_gains",
    "unrotated_split",
]

# Relative to the mean of the diagonal: directions in which inputs hardly vary stay as they are without the fit.
_FIT_DAMPING = 1e-4
# The same of inputs that are always zero, which nothing follows from.
_LEAST_DAMPING = 1e-30
# Bytes of heads whose energy is measured at once.
_HEAD_BYTES = 16 << 20


def ladder(theta: float, head_dim: int, rope_dim: int, stride: float) -> Tensor:
    """Frequencies ``θ^(-2 σ j / d)`` of ``R / 2`` rungs, a plain ladder of base ``θ^(σ R / d)``, float64.

    Stride 1 is the source's fastest frequencies, ``d / R`` an even choice of all.
    """
    return theta ** (-2 * stride * torch.arange(rope_dim // 2, dtype=torch.float64) / head_dim)


def linearised(w: AttentionWeights, stats: CalibrationStats) -> AttentionWeights:
    """The nearest attention without biases and per-head norms: ``E[y xᵀ] E[x xᵀ]⁻¹`` for every projection, damped.

    Of a factor on queries after RoPE what is alike in a pair is kept.

    Args:
        w: The layer, float64.
        stats: Of its inputs, with the cross moments of queries and keys where these are normalised.
    """
    second = stats.second_moment_DD
    damping = (_FIT_DAMPING * second.diagonal().mean()).clamp_min(_LEAST_DAMPING)
    damped = second + damping * torch.eye(len(second), dtype=second.dtype, device=second.device)
    mean_D = stats.x_D / stats.tokens

    def constant(bias_hd: Tensor) -> Tensor:
        # The linear function of x that comes nearest to one.
        return bias_hd[..., None] * torch.linalg.solve(damped, mean_D)

    def fit(w_hdD: Tensor, cross_hdD: Tensor) -> Tensor:
        # What one factor for all tokens of a head leaves over is fitted; there is little of it.
        scaled_hdD = best_factors(w_hdD, cross_hdD, stats)[:, None, None] * w_hdD
        left_hdD = cross_hdD / stats.tokens - scaled_hdD @ second
        return scaled_hdD + torch.linalg.solve(damped, left_hdD.mT).mT

    q, k, v = w.q_HdD, w.k_GdD, w.v_GdD
    if w.q_norm_d is not None and w.k_norm_d is not None:
        assert stats.qx_HdD is not None and stats.kx_GdD is not None
        if w.v_norm:
            # What one factor leaves over is left.
            v = best_factors(w.k_norm_d[..., None] * k, stats.kx_GdD, stats)[:, None, None] * v
        q, k = fit(w.q_norm_d[..., None] * q, stats.qx_HdD), fit(w.k_norm_d[..., None] * k, stats.kx_GdD)
        if w.q_turned_d is not None:
            q = even_part(w.q_turned_d)[:, None] * q
    elif w.q_bias_Hd is not None and w.k_bias_Gd is not None:
        q, k = q + constant(w.q_bias_Hd), k + constant(w.k_bias_Gd)
    if w.v_bias_Gd is not None:
        v = v + constant(w.v_bias_Gd)
    if w.o_bias_D is not None:
        # Probabilities sum to one: the values that come nearest to making it, as a constant of every token.
        o_DGd = w.o_DHd.unflatten(1, (len(v), -1)).sum(2)
        # On a CPU, where it need not have full rank: heads may be zero.
        made_E = torch.linalg.lstsq(o_DGd.flatten(1).cpu(), w.o_bias_D[:, None].cpu()).solution[:, 0]
        v = v + constant(made_E.to(v.device).view_as(v[..., 0]))
    return AttentionWeights(q, k, v, w.o_DHd, gate_HdD=w.gate_HdD, sink_H=w.sink_H)


def even_part(factor_d: Tensor) -> Tensor:
    """What a factor is to both of a pair alike, the nearest that RoPE does not mind, ``[d]``."""
    return factor_d.unflatten(0, (2, -1)).mean(0).repeat(2)


def best_factors(w_hdD: Tensor, cross_hdD: Tensor, stats: CalibrationStats) -> Tensor:
    """Multiples of linear heads that come nearest to what normalised ones make of all tokens, ``[h]``.

    Args:
        w_hdD: The heads, times the weight of their norm.
        cross_hdD: ``Σ y xᵀ`` of what they make.
        stats: Of the inputs.
    """
    made_h = (w_hdD * cross_hdD / stats.tokens).sum((1, 2))
    energy_h = (w_hdD * (w_hdD @ stats.second_moment_DD)).sum((1, 2))
    # A head that is zero is no multiple of anything.
    return torch.where(energy_h > 0, made_h / energy_h, 0.0)


@dataclass(frozen=True)
class Components:
    """Principal components of the keys of all heads, at each frequency.

    Attributes:
        axes_FGG: Columns are components: ``k_g = Σ_c axes[g, c] κ_c / sqrt(a_g)``, unitary, complex.
        energy_FG: Logit energy ``λ`` of each component, descending.
        weight_FG: Query energy ``a_g`` of each kv head's group.
        rho_HF: ``E[e^{i ω_f Δ}]`` for each query head.
        frequencies_F: Radians per position.
        distances_T: Attention probability by distance, all heads together.
    """

    axes_FGG: Tensor
    energy_FG: Tensor
    weight_FG: Tensor
    rho_HF: Tensor
    frequencies_F: Tensor
    distances_T: Tensor


def _complex_rows(w_hdD: Tensor, bias_hd: Tensor | None = None) -> Tensor:
    if bias_hd is not None:
        w_hdD = torch.cat([w_hdD, bias_hd[..., None]], dim=-1)
    re, im = w_hdD.chunk(2, dim=1)
    return torch.complex(re, im)


def _real_rows(w_hFD: Tensor) -> Tensor:
    return torch.cat([w_hFD.real, w_hFD.imag], dim=1)


def key_components(w: AttentionWeights, spec: AttentionSpec, stats: CalibrationStats) -> Components:
    """Eigenvectors, at each frequency, of the keys' second moment over heads, weighted by query energy.

    Args:
        w: The layer, float64.
        spec: Its description.
        stats: Second moments of its inputs and attended distances.
    """
    assert stats.distances_HT is not None
    second = (stats.second_moment_DD if w.q_bias_Hd is None else stats.affine_moment).to(torch.complex128)
    k_FGD = _complex_rows(w.k_GdD, w.k_bias_Gd).transpose(0, 1)
    moment_FGG = k_FGD @ second @ k_FGD.mH
    q_HFD = _complex_rows(w.q_HdD, w.q_bias_Hd)
    some = max(1, _HEAD_BYTES * len(q_HFD) // (q_HFD.numel() * q_HFD.itemsize))
    energies = [torch.einsum("hfD,DE,hfE->hf", q_hFD, second, q_hFD.conj()) for q_hFD in q_HFD.split(some)]
    q_energy_HF = torch.cat(energies).real
    weight_FG = q_energy_HF.unflatten(0, (spec.num_kv_heads, spec.group_size)).sum(1).T.clamp_min(1e-30)
    root_FG = weight_FG.sqrt()
    weighted = root_FG[:, :, None] * moment_FGG * root_FG[:, None, :]
    energy_FG, axes_FGG = eigh(weighted)
    frequencies = torch.tensor(spec.frequencies, dtype=torch.float64, device=second.device)
    return Components(
        axes_FGG=axes_FGG,
        energy_FG=energy_FG.clamp_min(0),
        weight_FG=weight_FG,
        rho_HF=expected_rotation(frequencies, stats.distances_HT),
        frequencies_F=frequencies,
        distances_T=stats.distances_HT.sum(0),
    )


def dropping_cost(c: Components) -> Tensor:
    """Logit energy that is lost where a component gives its rotation up, ``[F, G]``: ``λ (1 - |ρ_f|²)``."""
    return _constant_cost(c)[:, None] * c.energy_FG


def _constant_cost(c: Components) -> Tensor:
    return 1 - expected_rotation(c.frequencies_F, c.distances_T[None])[0].abs().square()


def rung_gains(c: Components, rungs_J: Tensor) -> Tensor:
    """What keeping a component at a rung saves, ``[J, F, G]``; negative where a constant would be better.

    ``λ ((1 - |ρ_f|²) - E|e^{i ω_f Δ} - e^{i ω_j Δ}|²)``
    """
    weight_T = c.distances_T / c.distances_T.sum()
    turn_TJ, turn_TF = (rotations(f, len(weight_T)) for f in (rungs_J, c.frequencies_F))
    mismatch_JF = 2 - 2 * ((turn_TJ * weight_T[:, None]).mH @ turn_TF).real
    return (_constant_cost(c) - mismatch_JF)[..., None] * c.energy_FG


def costliest(c: Components, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` components that cost most to give up, wherever they lie, each at its own frequency.

    Returns:
        ``[J, 2]`` of (frequency, component), fastest first, and the frequencies ``[J]``.
    """
    cost_Fc = dropping_cost(c)
    heads = cost_Fc.shape[1]
    # A stable sort: equal costs must not depend on the machine.
    chosen_J = cost_Fc.flatten().argsort(descending=True, stable=True)[:count].sort().values
    at_J2 = torch.stack([chosen_J // heads, chosen_J % heads], dim=1)
    return at_J2, c.frequencies_F[at_J2[:, 0]]


def on_ladder(c: Components, rungs_J: Tensor) -> tuple[Tensor, Tensor]:
    """The best component for each rung: ``[J, 2]`` of (frequency, component), and the rungs."""
    return assign_rungs(rung_gains(c, rungs_J)), rungs_J


def rope_cost(c: Components, rungs_J: Tensor) -> float:
    """Energy of the logits that is lost with the best components on these rungs, all heads together."""
    gain_JFG = rung_gains(c, rungs_J)
    at = assign_rungs(gain_JFG)
    kept = gain_JFG[torch.arange(len(at), device=at.device), at[:, 0], at[:, 1]].clamp_min(0).sum()
    return float(dropping_cost(c).sum() - kept)


def assign_rungs(gain_JFG: Tensor) -> Tensor:
    """One component for every rung, the largest gain first: ``[J, 2]`` of (frequency, component)."""
    left_Jc = gain_JFG.flatten(1).clone()
    chosen_J = torch.zeros(len(left_Jc), dtype=torch.int64, device=left_Jc.device)
    for _ in range(len(left_Jc)):
        rung, component = divmod(int(left_Jc.argmax()), left_Jc.shape[1])
        chosen_J[rung] = component
        left_Jc[rung], left_Jc[:, component] = -torch.inf, -torch.inf
    heads = gain_JFG.shape[2]
    return torch.stack([chosen_J // heads, chosen_J % heads], dim=1)


def position_aware_split(
    w: AttentionWeights, spec: AttentionSpec, c: Components, at_J2: Tensor, rungs_J: Tensor
) -> RopeSplit:
    """Split a layer's keys: the chosen components rotate, the rest takes its constant.

    Args:
        w: The layer, float64.
        spec: Its description.
        c: Its components.
        at_J2: (frequency, component) on each rung.
        rungs_J: Frequencies of the shared key.
    """
    G, s, d = spec.num_kv_heads, spec.group_size, spec.head_dim
    k_GFD, q_HFD = _complex_rows(w.k_GdD, w.k_bias_Gd), _complex_rows(w.q_HdD, w.q_bias_Hd)
    at_F, at_c = at_J2.unbind(1)
    # κ = Σ_g conj(v_g) sqrt(a_g) k_g, read back as v_g / sqrt(a_g).
    axis_JG = c.axes_FGG[at_F, :, at_c]
    root_JG = c.weight_FG[at_F].sqrt()
    kappa_JD = torch.einsum("jg,gjD->jD", axis_JG.conj() * root_JG, k_GFD[:, at_F])
    read_JG = axis_JG / root_JG
    size = root_JG.square().mean(1, keepdim=True).sqrt()
    kappa_JD, read_JG = kappa_JD / size, read_JG * size
    q_rope_HRD = _real_rows(q_HFD[:, at_F] * read_JG.conj().T.repeat_interleave(s, dim=0)[..., None])
    residual_GFD = k_GFD.clone()
    for j, f in enumerate(at_F.tolist()):
        residual_GFD[:, f] -= read_JG[j][:, None] * kappa_JD[j]
    split = RopeSplit(
        q_nope_HND=_real_rows(c.rho_HF[..., None] * q_HFD),
        q_rope_HRD=q_rope_HRD,
        k_nope_CD=_real_rows(residual_GFD).flatten(0, 1),
        read_UNC=torch.eye(G * d, dtype=torch.float64, device=k_GFD.device).view(G, d, G * d),
        k_rope_PRD=_real_rows(kappa_JD[None]),
        frequencies_PF=rungs_J[None],
        kept_pairs=tuple(sorted(at_F.tolist())),
    )
    return split if w.q_bias_Hd is None else _without_ones(split)


def unrotated_split(w: AttentionWeights, rungs_J: Tensor) -> RopeSplit:
    """Keys that do not rotate, beside a roped key that is nothing.

    Args:
        w: The layer, float64.
        rungs_J: Frequencies that the roped key would have.
    """
    heads, d, hidden = w.q_HdD.shape
    G, R = len(w.k_GdD), 2 * len(rungs_J)
    none = w.k_GdD.new_zeros
    biased = w.q_bias_Hd is not None
    return RopeSplit(
        q_nope_HND=w.q_HdD,
        q_rope_HRD=none(heads, R, hidden),
        k_nope_CD=w.k_GdD.flatten(0, 1),
        read_UNC=torch.eye(G * d, dtype=w.k_GdD.dtype, device=w.k_GdD.device).view(G, d, G * d),
        k_rope_PRD=none(1, R, hidden),
        frequencies_PF=rungs_J.to(w.k_GdD.device)[None],
        kept_pairs=(),
        q_nope_bias_HN=w.q_bias_Hd,
        q_rope_bias_HR=none(heads, R) if biased else None,
        k_rope_bias_PR=none(1, R) if biased else None,
    )


def _without_ones(split: RopeSplit) -> RopeSplit:
    """Biases back out of the weights; that of an un-roped key is the same for all keys and drops out of the softmax."""
    return replace(
        split,
        q_nope_HND=split.q_nope_HND[..., :-1],
        q_rope_HRD=split.q_rope_HRD[..., :-1],
        k_nope_CD=split.k_nope_CD[:, :-1],
        k_rope_PRD=split.k_rope_PRD[..., :-1],
        q_nope_bias_HN=split.q_nope_HND[..., -1],
        q_rope_bias_HR=split.q_rope_HRD[..., -1],
        k_rope_bias_PR=split.k_rope_PRD[..., -1],
    )
