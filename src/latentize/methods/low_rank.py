"""Compressing un-roped keys and values into one latent: ``[k_nope; v] ≈ up · down · x``.

D hidden, C un-roped key components, E = G d value components, r kv_lora_rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from latentize.methods.linalg import svd

__all__ = ["Factors", "truncated_svd"]


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


def truncated_svd(w_oD: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """``up = U_r Σ_r`` and ``down = V_rᵀ``, so that ``up down`` is the nearest matrix of that rank, and ``Σ²``."""
    u, sigma, vT = svd(w_oD)
    return u[:, :rank] * sigma[:rank], vT[:rank], sigma.square()
