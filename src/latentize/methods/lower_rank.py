"""A latent of fewer values in place of the one that a model was trained with, in closed form (docs/lower-rank.md).

Keys and values are linear in the normalised latent ``n = y / rms(y)``. What they are used for says which directions of
it matter, a low rank of that says which to keep, and the norm that follows a smaller latent is made to follow the
larger one's.

n tokens, H heads, r kv_lora_rank, s the lower one, N qk_nope_head_dim, V v_head_dim, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from latentize.methods.linalg import eigh

__all__ = ["LatentMoments", "Lowered", "lower"]

# Of the mean eigenvalue, added to what is inverted.
_DAMPING = 1e-5
# Energies and roots of what is always zero, which is divided by.
_LEAST = 1e-200
# Scales of a latent's directions that keep its norm near the larger one's: steps, and how far they may part.
_STEPS, _SPREAD = 300, 100.0
# Of epsilon: below it a latent's own size changes its norm by less than a hundredth.
_LINEAR = 0.02
# Latents that are kept to fit the norm on.
_KEPT_TOKENS = 32_768


@dataclass
class LatentMoments:
    """What calibration text says of a layer's latent. float64.

    Attributes:
        eps: Of the latent's norm.
        tokens: How many were counted.
        n_r: ``Σ n`` of the normalised latent, without the norm's weight.
        nn_rr: ``Σ n nᵀ``.
        qq_HNN: ``Σ q qᵀ`` of the un-roped queries.
        kept: Latents before the norm, float32, of the first tokens.
    """

    eps: float
    tokens: int = 0
    n_r: Tensor | float = 0.0
    nn_rr: Tensor | float = 0.0
    qq_HNN: Tensor | float = 0.0
    kept: list[Tensor] = field(default_factory=list)

    def add(self, y_nr: Tensor, q_nHN: Tensor) -> None:
        """The tokens of one batch: latents before their norm, and queries."""
        y_nr, q_HnN = y_nr.float(), q_nHN.float().transpose(0, 1)
        n_nr = _normalised(y_nr, self.eps)
        if self.tokens < _KEPT_TOKENS:
            self.kept.append(y_nr[: _KEPT_TOKENS - self.tokens].clone())
        self.tokens += len(y_nr)
        self.n_r = self.n_r + n_nr.double().sum(0)
        self.nn_rr = self.nn_rr + (n_nr.T @ n_nr).double()
        self.qq_HNN = self.qq_HNN + (q_HnN.mT @ q_HnN).double()

    @property
    def y_nr(self) -> Tensor:
        """Latents that the norm is fitted on, float64."""
        return torch.cat(self.kept).double()


@dataclass(frozen=True)
class Lowered:
    """A layer's attention of a lower rank.

    Attributes:
        tensors: What changes, by name within the attention; float32.
        lost: Share of the weighted energy of keys and values that is outside of what is kept.
        norm_spread: Standard deviation over tokens of the new norm over the old one, relative to its mean.
        linear_norm: Whether latents are so far below the norm's epsilon that it only scales them.
    """

    tensors: dict[str, Tensor]
    lost: float
    norm_spread: float
    linear_norm: bool

    def describe(self) -> dict[str, Any]:
        """What a report shows of a layer."""
        return {"energy_lost": self.lost, "norm_spread": self.norm_spread, "linear_norm": self.linear_norm}


def _normalised(y_nr: Tensor, eps: float) -> Tensor:
    return y_nr * torch.rsqrt(y_nr.square().mean(-1, keepdim=True) + eps)


def _importance(kv_b_Hdr: Tensor, o_DHV: Tensor, moments: LatentMoments, scale: float) -> Tensor:
    """``[r, r]``, what an error of the normalised latent costs, to second order.

    An error of a value goes through ``W_O``. One of a key moves logits, by the query, and so mixes in other values: as
    much as values differ. How the two compare depends on how errors of different tokens go together; each is measured
    by what it would cost to lose all.
    """
    nope = moments.qq_HNN.shape[-1]  # type: ignore[union-attr]
    mean_r = moments.n_r / moments.tokens
    spread_rr = moments.nn_rr / moments.tokens - torch.outer(mean_r, mean_r)  # type: ignore[arg-type]
    k_HNr, v_HVr = kv_b_Hdr[:, :nope], kv_b_Hdr[:, nope:]
    o_HVV = torch.einsum("dhv,dhw->hvw", o_DHV, o_DHV)
    v_cost_Hrr = v_HVr.mT @ o_HVV @ v_HVr
    differ_H = (v_cost_Hrr * spread_rr).sum((-2, -1)).clamp_min(0)
    queries_HNN = moments.qq_HNN / moments.tokens * (scale**2 * differ_H)[:, None, None]  # type: ignore[operator]
    costs = v_cost_Hrr.sum(0), (k_HNr.mT @ queries_HNN @ k_HNr).sum(0)
    first, second = (cost_rr / (cost_rr * spread_rr).sum().clamp_min(1e-300) for cost_rr in costs)
    return first + second


def _scales(w_ns: Tensor, y_nr: Tensor, eps: float) -> Tensor:
    """``a_s ≥ 0`` so that ``mean_s(a w²)`` is near ``mean_r(y²)``, token by token, relative to ``mean_r(y²) + eps``.

    Non-negative least squares by multiplicative steps (Lee and Seung, 2001), which cannot make it worse, from the best
    single scale; where nothing is left out that is one, and exact.
    """
    wanted_n = y_nr.square().mean(-1)
    weight_n = 1 / (wanted_n + eps)
    f_ns = w_ns.square() / w_ns.shape[1] * weight_n[:, None]
    t_n = wanted_n * weight_n
    all_n = f_ns.sum(-1)
    if not bool(all_n.any()):
        # Latents that are zero are so at any scale.
        return torch.ones_like(f_ns[0])
    single = (all_n @ t_n) / (all_n @ all_n)
    a_s = single.expand(f_ns.shape[1]).clone()
    to_s, gram_ss = f_ns.T @ t_n, f_ns.T @ f_ns
    for _ in range(_STEPS):
        a_s = a_s * (to_s / (gram_ss @ a_s).clamp_min(1e-300))
        a_s = a_s.clamp(single / _SPREAD, single * _SPREAD)
    return a_s


def lower(tensors: Mapping[str, Tensor], moments: LatentMoments, rank: int, *, scale: float) -> Lowered:
    """A layer's attention with a latent of ``rank`` values.

    Args:
        tensors: Of the attention, by name within it.
        moments: What calibration text has made of it.
        rank: Values of the new latent.
        scale: Factor on the logits.
    """
    down, weight_r, kv_b = (
        tensors[name].double() for name in ("kv_a_proj_with_mqa.weight", "kv_a_layernorm.weight", "kv_b_proj.weight")
    )
    full, heads = len(weight_r), moments.qq_HNN.shape[0]  # type: ignore[union-attr]
    kv_b_or = kv_b * weight_r
    o_DHV = tensors["o_proj.weight"].double().unflatten(1, (heads, -1))
    cost_rr = _importance(kv_b_or.unflatten(0, (heads, -1)), o_DHV, moments, scale)
    # Directions that carry most of the cost: a truncated eigendecomposition between roots of the second moment.
    values_r, vectors_rr = eigh(moments.nn_rr / moments.tokens)  # type: ignore[arg-type]
    root_r = (values_r.clamp_min(0) + _DAMPING * values_r.mean()).clamp_min(_LEAST).sqrt()
    root_rr, inverse_rr = (vectors_rr * root_r) @ vectors_rr.T, (vectors_rr / root_r) @ vectors_rr.T
    energy_r, axes_rr = eigh(root_rr @ cost_rr @ root_rr)
    axes_rs = axes_rr[:, :rank]
    # Coordinates of what the kept directions tell of the whole latent: as long as that, as far as they can know.
    up_rs, triangle_ss = torch.linalg.qr(root_rr @ axes_rs)
    basis_rs = inverse_rr @ axes_rs @ triangle_ss.mT
    # Where they are uncorrelated each has a scale of its own.
    y_nr = moments.y_nr
    _, turn_ss = eigh(basis_rs.T @ (y_nr.T @ y_nr) @ basis_rs)
    basis_rs, up_rs = basis_rs @ turn_ss, up_rs @ turn_ss
    scales_s = _scales(y_nr @ basis_rs, y_nr, moments.eps).sqrt()
    basis_rs, up_rs = basis_rs * scales_s, up_rs / scales_s
    up_rs, spread = _after_norm(basis_rs, up_rs, y_nr, moments.eps)
    level = weight_r.square().mean().sqrt().clamp_min(_LEAST)
    made = {
        "kv_a_proj_with_mqa.weight": torch.cat([basis_rs.T @ down[:full], down[full:]]),
        "kv_a_layernorm.weight": level.expand(rank).clone(),
        "kv_b_proj.weight": kv_b_or @ up_rs / level,
    }
    if "kv_a_proj_with_mqa.bias" in tensors:
        bias = tensors["kv_a_proj_with_mqa.bias"].double()
        made["kv_a_proj_with_mqa.bias"] = torch.cat([basis_rs.T @ bias[:full], bias[full:]])
    energy_r = energy_r.clamp_min(0)
    lost = float(energy_r[rank:].sum() / energy_r.sum().clamp_min(1e-300))
    linear = bool(y_nr.square().mean(-1).max() < _LINEAR * moments.eps)
    return Lowered({name: t.float() for name, t in made.items()}, lost, spread, linear)


def _after_norm(basis_rs: Tensor, up_rs: Tensor, y_nr: Tensor, eps: float) -> tuple[Tensor, float]:
    """The up-projection that serves the new latent as its norm leaves it, and the spread of the two norms' quotient.

    Least squares on the old latent, as a correction of what is given, so that what is right already stays.
    """
    n_nr, w_ns = _normalised(y_nr, eps), y_nr @ basis_rs
    m_ns = _normalised(w_ns, eps)
    ratio_n = ((w_ns.square().mean(-1) + eps) / (y_nr.square().mean(-1) + eps)).sqrt()
    up_rs = up_rs * ratio_n.mean()
    second_ss = m_ns.T @ m_ns
    rest_rs = n_nr.T @ m_ns - up_rs @ second_ss
    damped_ss = second_ss.clone()
    damped_ss.diagonal().add_((_DAMPING * second_ss.diagonal().mean()).clamp_min(_LEAST))
    up_rs = up_rs + torch.linalg.solve(damped_ss, rest_rs, left=False)
    return up_rs, float(ratio_n.std() / ratio_n.mean())
