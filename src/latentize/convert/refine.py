"""Refinement: a few steps of gradient descent on one layer's output, with the closed form as the start.

The layer's inputs are those that it will see, made by the converted layers before it; its target is what brings the
residual stream back to the source's. So a layer also repairs what earlier ones lost. No labels are used.

N sequences, T tokens, D hidden.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from latentize.attention.latent import LatentWeights
from latentize.attention.module import LatentAttention
from latentize.convert.descent import Descent, Schedule

__all__ = ["Refined", "Refinement", "descend", "expand_heads", "refine", "refined", "trainable"]


@dataclass(frozen=True, kw_only=True)
class Refinement(Schedule):
    """How a layer is refined.

    Attributes:
        probe: Tokens that are not learnt from and tell whether it helped; at most an eighth of all.
        enough: Relative error at which nothing is left to gain.
    """

    steps: int = 280
    rate: float = 0.045
    probe: int = 4096
    enough: float = 1e-6


class Refined(NamedTuple):
    """A refined layer.

    Attributes:
        weights: float32; those of the start where no step was an improvement.
        before, after: Relative error of the layer's output on tokens that were not learnt from.
    """

    weights: LatentWeights
    before: float
    after: float


def expand_heads(w: LatentWeights) -> LatentWeights:
    """Every head its own up-projections, as formats that do not share them store it; refinement may part them."""
    share = w.q_nope_HND.shape[0] // w.k_up_UNr.shape[0]
    return replace(
        w, k_up_UNr=w.k_up_UNr.repeat_interleave(share, dim=0), v_up_UVr=w.v_up_UVr.repeat_interleave(share, dim=0)
    )


def trainable(w: LatentWeights) -> LatentAttention:
    """A float32 module that starts at ``w`` and shares nothing with it."""
    return copy.deepcopy(LatentAttention.from_weights(w.to(torch.float32))).requires_grad_(True)


def refined(attention: LatentAttention, start: LatentWeights) -> LatentWeights:
    """The weights of a trained module, with the frequencies of ``start`` in their full precision."""
    w = attention.weights()
    detached = {n: t.detach().clone() for n, t in vars(w).items() if isinstance(t, Tensor)}
    return replace(w, **{**detached, "frequencies_PF": start.frequencies_PF})


def refine(
    w: LatentWeights,
    inputs: Callable[[Tensor], Tensor],
    target_NTD: Tensor,
    how: Refinement,
    *,
    positions_NT: Tensor | None = None,
    autocast: bool = False,
    added: Callable[[Tensor], Tensor] = lambda made_BTD: made_BTD,
) -> Refined:
    """Minimise ``‖added(attn(x)) - target‖²`` relative to the target's variance.

    Args:
        w: The start.
        inputs: From sequence numbers to normalised inputs of the layer, ``[B, T, D]``.
        target_NTD: What its attention should add to the residual stream.
        how: Steps and rates.
        positions_NT: Where in a context the tokens are; by default each sequence is at its start.
        autocast: Multiply in bfloat16.
        added: From what the attention makes to what the residual stream gets of it.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    start = w.to(torch.float32)
    attention = trainable(start)

    def made(rows: Tensor) -> Tensor:
        made_BTD = attention(inputs(rows), None if positions_NT is None else positions_NT[rows])[0]
        return added(made_BTD.float())

    before, after = descend(list(attention.parameters()), made, target_NTD, how, autocast=autocast)
    return Refined(refined(attention, w), before, after) if after < before else Refined(start, before, before)


def descend(
    parameters: Sequence[nn.Parameter],
    made: Callable[[Tensor], Tensor],
    target_NTD: Tensor,
    how: Refinement,
    *,
    autocast: bool = False,
) -> tuple[float, float]:
    """Train parameters in place so that ``made`` comes near the target, relative to the target's variance.

    Args:
        parameters: What is trained.
        made: From sequence numbers to what should be the target there, ``[B, T, D]``.
        target_NTD: What it should be.
        how: Steps and rates.
        autocast: Multiply in bfloat16.

    Returns:
        Relative error on tokens that are not learnt from, before and after; twice the same where no step was taken.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    descent = Descent(parameters, how)
    scale = 1 / max(float(target_NTD.float().var()), 1e-30)

    def error(rows: Tensor) -> Tensor:
        with torch.autocast(target_NTD.device.type, torch.bfloat16, enabled=autocast):
            made_BTD = made(rows)
            return (made_BTD.float() - target_NTD[rows].float()).square().mean() * scale

    count, length = target_NTD.shape[:2]
    learnt = count - min(max(1, how.probe // length), count // 8)
    probe = torch.arange(learnt, count) if learnt < count else torch.arange(count)
    with torch.no_grad():
        before = float(error(probe))
    if before < how.enough:
        return before, before
    for step, rows in enumerate(how.batches(learnt, length)):
        with torch.enable_grad():
            loss = error(rows)
        if not math.isfinite(float(loss.detach())):
            raise FloatingPointError(f"refinement diverged at step {step}")
        descent.step(loss)
    with torch.no_grad():
        return before, float(error(probe))
