"""CARE (arXiv 2603.17946): RoRoPE as in TransMLA, and an SVD of weights whitened by their inputs.

D hidden, C un-roped key components, E = G d value components, r kv_lora_rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentize.methods.linalg import eigh
from latentize.methods.low_rank import Factors, truncated_svd
from latentize.methods.mha2mla import joint_svd
from latentize.methods.setting import Setting
from latentize.methods.statistics import CalibrationStats
from latentize.methods.transmla import TransMla
from latentize.recipe import Recipe

__all__ = ["Care", "whitened_svd"]


class Care(TransMla):
    """One shared roped key by RoRoPE; whitened SVD."""

    name = "care"

    def _damping(self, recipe: Recipe) -> float:
        return recipe.damping

    def compress(self, k_CD: Tensor, v_ED: Tensor, stats: CalibrationStats, setting: Setting) -> Factors:
        return whitened_svd(k_CD, v_ED, stats, setting.kv_lora_rank, damping=setting.damping or 0.0)


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
    up_or, vT_rD, energy_o = truncated_svd(torch.cat([k_CD, v_ED]) @ square_root, rank)
    return Factors(vT_rD @ inverse_root, up_or[: len(k_CD)], up_or[len(k_CD) :], energy_o)
