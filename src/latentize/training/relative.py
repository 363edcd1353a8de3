"""Errors of the residual stream, relative to the size of each token.

N sequences, T tokens, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentize.modeling.layer import Stream
from latentize.processes import ALONE, Team

__all__ = ["stream_error", "token_energy"]

# Share of the median energy that a token is taken to have at least: one of nothing would weigh more than all others.
_LEAST_ENERGY = 1e-3


def token_energy(source_NTD: Tensor, made_NTD: Tensor) -> Tensor:
    """What a token's squared error is relative to, ``[N, T]``: the larger of its squared norms in both models.

    The source's alone would do, were it not for tokens that became massive in the converted model only: their relative
    error would be all of the loss, and they seldom can be brought back.

    Args:
        source_NTD, made_NTD: Residual streams of the source and of what it has become so far.
    """
    energies_NT = [torch.stack([x_TD.square().sum(-1) for x_TD in x_NTD]) for x_NTD in (source_NTD, made_NTD)]
    energy_NT = torch.maximum(*energies_NT)
    return energy_NT.clamp_min(max(_LEAST_ENERGY * float(energy_NT.median()), 1e-30))


def stream_error(text: Stream, reference: Stream, team: Team = ALONE) -> float:
    """Mean relative error of a token, ``‖h - h_source‖² / max(‖h‖², ‖h_source‖²)``; of a team's texts together."""
    energy_NT = token_energy(reference.hidden_NTD, text.hidden_NTD)
    pairs = zip(text.hidden_NTD, reference.hidden_NTD, energy_NT, strict=True)
    error = sum(float(((h - r).square().sum(-1) / e).mean()) for h, r, e in pairs)
    # One may have a sequence more than another.
    return team.mean(error) / team.mean(len(energy_NT))
