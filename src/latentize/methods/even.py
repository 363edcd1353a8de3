"""Axes and scales of a layer's rows for caches that treat all values alike.

A cache of one width rounds a token's values with one step, or with one for each block, whatever they are worth. What
can be chosen is what the values are: a linear latent may be changed by any matrix that has an inverse, a roped key's
pairs by a factor each, and the matrices that read them undo it.

An error ``δ`` in a row costs ``½ δᵀ F δ`` nats to second order, ``F = E[g gᵀ]`` the Fisher information. In axes ``A c``
that are turned at random afterwards every value of a token is as large as the others, and so is its error, so that a
latent costs in proportion to

    ``E[|A c|² |A⁻ᵀ g|²]``.

Where both factors are the same for all tokens, ``AᵀA`` is the geometric mean of the inverse of ``E[c cᵀ]`` and of ``F``
(Pusz & Woronowicz, 1975), and the cost ``(Σ √λ)² / r`` instead of ``Σ λ``, ``λ`` the eigenvalues of ``F^½ C F^½``: what
counts more is stored larger. They are not the same, so that each moment is weighted by the other factor, a few times.

Pairs of a roped key cannot be mixed, so a step follows from the largest value of its block.

n tokens, r kv_lora_rank, P roped keys, R qk_rope_head_dim, F = R / 2 pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latentize.attention.latent import LatentWeights
from latentize.methods.linalg import eigh
from latentize.methods.rate import RowSamples

__all__ = ["CACHES", "ROUNDS", "EvenCache", "suited"]

# How often moments are weighted anew.
ROUNDS = 6
# Added to a moment's diagonal, relative to its mean.
_DAMPING = 1e-4
# Steps towards the factors of pairs, in their logarithms, and tokens that they are found on.
_STEPS, _RATE, _PAIR_TOKENS = 150, 0.05, 4096


@dataclass(frozen=True)
class EvenCache:
    """How a cache rounds.

    Attributes:
        block: Values of a row that share a step, both halves alike; 0 is a half of a row. 1 is none: a value has an
            exponent of its own.
        largest: What a value may be at most, where nothing scales it; else 0.
    """

    block: int
    largest: float = 0.0


# llama.cpp's; e4m3 without a scale, as vLLM has it; and those of ``LatentCache``.
CACHES = {
    "q4_0": EvenCache(32),
    "q8_0": EvenCache(32),
    "fp8": EvenCache(1, largest=448.0),
    "int8": EvenCache(0),
    "int4": EvenCache(0),
}
# Without a scale, of how many times a value's usual size there is to be room.
_ROOM = 28.0


def suited(w: LatentWeights, rows: RowSamples, cache: EvenCache, seed: int) -> LatentWeights:
    """The same layer, with rows in axes and scales that suit a cache.

    Args:
        w: The layer, whose latent is linear.
        rows: Of some tokens, with gradients.
        cache: What will hold them.
        seed: Of the axes.
    """
    generator = torch.Generator().manual_seed(seed)
    c_nr = rows.c_nr.double()
    turn_rr = torch.linalg.qr(torch.randn(w.spec.kv_lora_rank, w.spec.kv_lora_rank, generator=generator).double())[0]
    half_rr, back_rr = _axes(c_nr, rows.by_c_nr.double())
    size = _size(c_nr @ half_rr.mT @ turn_rr.mT, cache)
    to_rr, from_rr = size * turn_rr @ half_rr, back_rr @ turn_rr.mT / size
    to_rr, from_rr = to_rr.to(w.kv_a_rD), from_rr.to(w.kv_a_rD)
    w = replace(w, kv_a_rD=to_rr @ w.kv_a_rD, k_up_UNr=w.k_up_UNr @ from_rr, v_up_UVr=w.v_up_UVr @ from_rr)
    # A norm of the key would take its factors back.
    return w if w.k_norm_R is not None else _scaled(w, rows, cache)


def _scaled(w: LatentWeights, rows: RowSamples, cache: EvenCache) -> LatentWeights:
    """Factors on the pairs of roped keys, and their inverses on those of the queries."""
    keys = zip(rows.k_rope_nPR.unbind(1), rows.by_k_rope_nPR.unbind(1), strict=True)
    found = [_pair_factors(k_nR, by_nR, cache) for k_nR, by_nR in keys]
    factor_PR = torch.stack(found).repeat(1, 2).to(w.k_rope_PRD)
    factor_HR = factor_PR.repeat_interleave(w.spec.num_heads // len(factor_PR), dim=0)
    q_bias_HR, k_bias_PR = w.q_rope_bias_HR, w.k_rope_bias_PR
    return replace(
        w,
        k_rope_PRD=w.k_rope_PRD * factor_PR[..., None],
        k_rope_bias_PR=None if k_bias_PR is None else k_bias_PR * factor_PR,
        q_rope_HRD=w.q_rope_HRD / factor_HR[..., None],
        q_rope_bias_HR=None if q_bias_HR is None else q_bias_HR / factor_HR,
    )


def _axes(c_nr: Tensor, by_nr: Tensor) -> tuple[Tensor, Tensor]:
    """``A``, symmetric, and its inverse."""
    of_c_n1 = of_by_n1 = torch.ones_like(c_nr[:, :1])
    half_rr = back_rr = torch.eye(c_nr.shape[1]).to(c_nr)
    for _ in range(ROUNDS):
        moment_rr, information_rr = (_damped((x * by).mT @ x) for x, by in ((c_nr, of_c_n1), (by_nr, of_by_n1)))
        root_rr, inverse_rr = _power(moment_rr, 0.5), _power(moment_rr, -0.5)
        mean_rr = inverse_rr @ _power(root_rr @ information_rr @ root_rr, 0.5) @ inverse_rr
        half_rr, back_rr = _power(mean_rr, 0.5), _power(mean_rr, -0.5)
        of_by_n1, of_c_n1 = ((x @ m).square().sum(1, keepdim=True) for x, m in ((c_nr, half_rr), (by_nr, back_rr)))
        of_by_n1, of_c_n1 = (x / x.mean().clamp_min(1e-30) for x in (of_by_n1, of_c_n1))
    return half_rr, back_rr


def _damped(moment: Tensor) -> Tensor:
    """With what keeps it from being singular; of what is nothing, the identity."""
    diagonal = moment.diagonal()
    mean = float(diagonal.mean())
    return moment + (_DAMPING * mean if mean > 0 else 1.0) * torch.eye(len(moment)).to(moment)


def _power(positive: Tensor, exponent: float) -> Tensor:
    value, vector = eigh(positive)
    value = value.clamp_min(1e-12 * float(value.max()))
    return (vector * value.pow(exponent)) @ vector.mT


def _size(x: Tensor, cache: EvenCache) -> float:
    """A power of two that values are multiplied by: one where scales do that."""
    usual = float(x.square().mean().sqrt())
    if not cache.largest or not 0 < usual < math.inf:
        return 1.0
    # Room for twice the largest that was seen.
    wanted = min(cache.largest / _ROOM, cache.largest * usual / (2 * float(x.abs().max())))
    return 2.0 ** math.floor(math.log2(wanted / usual))


@torch.enable_grad()
def _pair_factors(k_nR: Tensor, by_nR: Tensor, cache: EvenCache) -> Tensor:
    """On the pairs of a roped key, ``[F]`` float64: least of ``E[Σ_blocks max(s² k²) Σ g² / s²]``."""
    few = slice(None, None, max(1, len(k_nR) // _PAIR_TOKENS))
    k_n2F, by_n2F = (x[few].detach().double().unflatten(1, (2, -1)) for x in (k_nR, by_nR))
    pairs = k_n2F.shape[2]
    if cache.block == 1:
        return torch.full((pairs,), _size(k_n2F, cache), dtype=torch.float64)
    top_nF, by_nF = k_n2F.abs().amax(1), by_n2F.square().sum(1)
    # Without a gradient nothing is known, and nothing is changed.
    if not (float(top_nF.max()) > 0 and float(by_nF.max()) > 0):
        return torch.ones(pairs, dtype=torch.float64)
    # Where pairs lie side by side.
    block = pairs if not cache.block or pairs % (cache.block // 2) else cache.block // 2
    log_F = torch.zeros(pairs, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([log_F], lr=_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, _STEPS)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        step_nb = (top_nF * log_F.exp()).unflatten(1, (-1, block)).amax(2)
        price_nb = (by_nF / (2 * log_F).exp()).unflatten(1, (-1, block)).sum(2)
        cost = (step_nb.square() * price_nb).sum(1).mean()
        cost.log().backward()
        optimizer.step()
        schedule.step()
    found_F = log_F.detach()
    # One factor for all is none.
    return (found_F - found_F.mean()).exp()
