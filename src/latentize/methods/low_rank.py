"""Compressing un-roped keys and values into one latent: ``[k_nope; v] ≈ up · down · x``.

D hidden, C un-roped key components, E = G d value components, r kv_lora_rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latentize.methods.linalg import eigh, svd
from latentize.methods.statistics import CalibrationStats

__all__ = ["Factors", "balanced_pca", "joint_svd", "key_balance", "split_svd", "whitened_svd"]


# A mean norm, relative to that of the other side, which is no more than rounding.
_NOTHING = 1e-12


@dataclass(frozen=True)
class Factors:
    """``k ≈ k_up down``, ``v ≈ v_up down``.

    Attributes:
        down_rD, k_up_Cr, v_up_Er: The factors.
        energy_o: Of every direction that there was, the kept ones first: eigenvalues, or squared singular values.
    """

    down_rD: Tensor
    k_up_Cr: Tensor
    v_up_Er: Tensor
    energy_o: Tensor


def _truncated_svd(w_oD: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """``up = U_r Σ_r`` and ``down = V_rᵀ``, so that ``up down`` is the nearest matrix of that rank, and ``Σ²``."""
    u, sigma, vT = svd(w_oD)
    return u[:, :rank] * sigma[:rank], vT[:rank], sigma.square()


def joint_svd(k_CD: Tensor, v_ED: Tensor, rank: int) -> Factors:
    """One SVD of the stacked weights (MHA2MLA, arXiv 2502.14837, "SVD-joint")."""
    up_or, down_rD, energy_o = _truncated_svd(torch.cat([k_CD, v_ED]), rank)
    return Factors(down_rD, up_or[: len(k_CD)], up_or[len(k_CD) :], energy_o)


def split_svd(k_CD: Tensor, v_ED: Tensor, rank: int) -> Factors:
    """One SVD for keys and one for values, half of the latent each (MHA2MLA, "SVD-split")."""
    k_rank = min(rank // 2, len(k_CD))
    k_up, k_down, k_energy = _truncated_svd(k_CD, k_rank)
    v_up, v_down, v_energy = _truncated_svd(v_ED, rank - k_rank)
    k_rank, v_rank = len(k_down), len(v_down)
    kept = torch.cat([k_energy[:k_rank], v_energy[:v_rank]]).sort(descending=True).values
    dropped = torch.cat([k_energy[k_rank:], v_energy[v_rank:]]).sort(descending=True).values
    return Factors(
        torch.cat([k_down, v_down]),
        torch.nn.functional.pad(k_up, (0, v_rank)),
        torch.nn.functional.pad(v_up, (k_rank, 0)),
        torch.cat([kept, dropped]),
    )


def key_balance(k_CD: Tensor, v_ED: Tensor, stats: CalibrationStats) -> float:
    """``ρ``: mean norm of the key components over that of the value components (TransMLA, section 4.3).

    Where either is nothing there is nothing to balance, and it is one.
    """
    norm_k = stats.moment_of(k_CD).diagonal().clamp_min(0).sqrt().mean()
    norm_v = stats.moment_of(v_ED).diagonal().clamp_min(0).sqrt().mean()
    smaller, larger = sorted((float(norm_k), float(norm_v)))
    return 1.0 if smaller <= _NOTHING * larger else float(norm_k / norm_v)


def balanced_pca(k_CD: Tensor, v_ED: Tensor, stats: CalibrationStats, rank: int) -> Factors:
    """PCA of the stacked outputs ``[k / ρ; v]`` (TransMLA, arXiv 2502.07864, section 4.3).

    Its damping, a multiple of the identity, does not move eigenvectors and so is left out.
    """
    rho = key_balance(k_CD, v_ED, stats) if len(k_CD) else 1.0
    w_oD = torch.cat([k_CD / rho, v_ED])
    energy_o, axes_oo = eigh(stats.moment_of(w_oD))
    axes_or = axes_oo[:, :rank]
    return Factors(axes_or.T @ w_oD, rho * axes_or[: len(k_CD)], axes_or[len(k_CD) :], energy_o.clamp_min(0))


def whitened_svd(k_CD: Tensor, v_ED: Tensor, stats: CalibrationStats, rank: int, *, damping: float = 0.01) -> Factors:
    """SVD of ``W C^{1/2}`` with ``C = E[x xᵀ]`` (CARE, arXiv 2603.17946, section 3).

    Minimises ``E‖(W - up down) x‖²`` over the damped ``C``: ``up = U_r Σ_r``, ``down = V_rᵀ C^{-1/2}``. Inputs that
    are always zero prefer no direction, and ``C`` is taken to be the identity.

    Args:
        k_CD, v_ED: The weights ``W``, stacked.
        stats: Where ``C`` comes from.
        rank: Size of the latent.
        damping: Added to the diagonal of ``C``, as a fraction of its mean.
    """
    second = stats.second_moment_DD
    if not bool(second.diagonal().any()):
        return joint_svd(k_CD, v_ED, rank)
    damped = second.clone()
    damped.diagonal().add_(damping * second.diagonal().mean())
    values, vectors = eigh(damped)
    root = values.clamp_min(1e-12 * float(values[0])).sqrt()
    square_root, inverse_root = (vectors * root) @ vectors.T, (vectors / root) @ vectors.T
    up_or, vT_rD, energy_o = _truncated_svd(torch.cat([k_CD, v_ED]) @ square_root, rank)
    return Factors(vT_rD @ inverse_root, up_or[: len(k_CD)], up_or[len(k_CD) :], energy_o)
