"""Refinement: a few steps of gradient descent on one layer's output, with the closed form as the start.

The layer's inputs are those that it will see, made by the converted layers before it; its target is what brings the
residual stream back to the source's. So a layer also repairs what earlier ones lost. No labels are used.

Errors are relative to each token's own size, as the next norm sees them. In models that were trained for long a few
tokens carry nearly all energy of the residual stream ("massive activations", arXiv 2402.17762): an error over the whole
stream would be about those and nothing else.

N sequences, T tokens, D hidden.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from latentize.attention.latent import LatentWeights
from latentize.modeling.attention import LatentAttention
from latentize.processes import ALONE, Team
from latentize.training.descent import WHOLE, Heads, Schedule, descent

__all__ = [
    "Refined",
    "Refinement",
    "descend",
    "expand_heads",
    "refine",
    "refined",
    "solved_tokens",
    "stacked_heads",
    "trainable",
]

# Tokens that suffice to solve for the output projection, and what is added to the diagonal, relative to its mean.
_SOLVED_TOKENS, _DAMPING = 32_768, 1e-2
# Share of an error that a layer is taken to have made itself at least.
_LEAST_OWN = 0.1


@dataclass(frozen=True, kw_only=True)
class Refinement(Schedule):
    """How a layer is refined.

    A step is as large as there is something to repair: the rate is multiplied by the root of the relative error that
    refinement starts from, less what the layer's inputs had before.

    Attributes:
        probe: Tokens that are not learnt from and tell whether it helped; at most an eighth of all.
        enough: Relative error at which nothing is left to gain.
    """

    steps: int = 512
    rate: float = 0.085
    adam: float = 3.4
    probe: int = 4096
    enough: float = 1e-6

    def shared(self, length: int, team: Team) -> Self:
        whole = super().shared(length, team)
        return replace(whole, probe=whole.probe // team.size)


class Refined(NamedTuple):
    """A refined layer.

    Attributes:
        weights: float32; those of the start where no step was an improvement.
        before, after: Relative error of the layer's output on tokens that were not learnt from.
    """

    weights: LatentWeights
    before: float
    after: float


def solved_tokens(how: Schedule, team: Team = ALONE) -> int:
    """On how many tokens, at most, the output projection is solved for: as many as the steps read.

    On few it learns them by heart, which adds up over the layers; and steps are what costs, not solving.

    Args:
        how: Steps, or each process's share of them.
        team: The processes; the tokens are each one's.
    """
    return max(_SOLVED_TOKENS // team.size, how.steps * how.tokens)


def expand_heads(w: LatentWeights) -> LatentWeights:
    """Every head its own up-projections, as formats that do not share them store it; refinement may part them."""
    share = w.q_nope_HND.shape[0] // w.k_up_UNr.shape[0]
    shared = {"k_up_UNr": w.k_up_UNr, "v_up_UVr": w.v_up_UVr, "v_up_bias_UV": w.v_up_bias_UV}
    return replace(w, **{name: t.repeat_interleave(share, dim=0) for name, t in shared.items() if t is not None})


def trainable(w: LatentWeights) -> LatentAttention:
    """A float32 module that starts at ``w`` and shares nothing with it."""
    return copy.deepcopy(LatentAttention.from_weights(w.to(torch.float32))).requires_grad_(True)


def stacked_heads(attention: LatentAttention) -> list[Heads]:
    """What each of its parameters consists of."""
    s = attention.spec
    several = {
        "q_proj.weight": Heads(s.num_heads),
        "k_rope_proj.weight": Heads(s.rope_heads),
        "kv_b_proj.weight": Heads(s.up_heads),
        "o_proj.weight": Heads(s.num_heads, axis=1),
        "q_maps": Heads(s.num_heads),
        "q_mirrors": Heads(s.num_heads),
        "head_gate.weight": Heads(s.num_heads),
        "k_norm_proj.weight": Heads(s.key_scales),
    }
    return [several.get(name, WHOLE) for name, _ in attention.named_parameters()]


def refined(attention: LatentAttention, start: LatentWeights) -> LatentWeights:
    """The weights of a trained module, with the frequencies of ``start`` in their full precision."""
    w = attention.weights()
    detached = {n: t.detach().clone() for n, t in vars(w).items() if isinstance(t, Tensor)}
    return replace(w, **{**detached, "frequencies_PF": start.frequencies_PF})


def refine(
    w: LatentWeights,
    inputs: Callable[[Tensor], Tensor],
    target_NTD: Tensor,
    energy_NT: Tensor,
    how: Refinement,
    *,
    inherited: float = 0.0,
    positions_NT: Tensor | None = None,
    autocast: bool = False,
    added: Callable[[Tensor], Tensor] = lambda made_BTD: made_BTD,
    factor: float | None = 1.0,
    team: Team = ALONE,
) -> Refined:
    """Minimise ``‖added(attn(x)) - target‖²`` of every token relative to its energy.

    Steps first; then the output projection, which the error is quadratic in, is solved for.

    Args:
        w: The start.
        inputs: From sequence numbers to normalised inputs of the layer, ``[B, T, D]``.
        target_NTD: What its attention should add to the residual stream.
        energy_NT: From :func:`token_energy`.
        how: Steps and rates.
        inherited: Relative error that was there before the layer, which it can repair but little of.
        positions_NT: Where in a context the tokens are; by default each sequence is at its start.
        autocast: Multiply in bfloat16.
        added: From what the attention makes to what the residual stream gets of it.
        factor: What ``added`` multiplies by; ``None`` where it is not linear, and nothing is solved for.
        team: Processes that each have such sequences of their own; ``how`` is each one's share.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    start = w.to(torch.float32)
    attention = trainable(start)

    def made(rows: Tensor) -> Tensor:
        made_BTD = attention(inputs(rows), None if positions_NT is None else positions_NT[rows])[0]
        return added(made_BTD.float())

    parameters = list(attention.parameters())
    options: dict[str, Any] = {"inherited": inherited, "autocast": autocast, "heads": stacked_heads(attention)}
    options["team"] = team
    before, after = descend(parameters, made, target_NTD, energy_NT, how, **options)
    if not after < before:
        return Refined(start, before, before)
    found = Refined(refined(attention, w), before, after)
    if factor is None:
        return found

    def read(rows: Tensor) -> tuple[Tensor, Tensor]:
        """What the output projection reads, and what it still lacks."""
        positions_BT = None if positions_NT is None else positions_NT[rows]
        x_BTI = attention.read(inputs(rows), positions_BT)
        made_BTD = added(nn.functional.linear(x_BTI, attention.o_proj.weight, attention.o_proj.bias).float())
        return x_BTI.float(), (target_NTD[rows] - made_BTD) / factor

    with torch.no_grad():
        count, length = target_NTD.shape[:2]
        most = max(1, solved_tokens(how, team) // length)
        rows = torch.arange(min(_learnt(count, length, how), most))
        attention.o_proj.weight += _correction(read, rows.split(how.sequences(length)), energy_NT, autocast, team)
    solved = descend(parameters, made, target_NTD, energy_NT, replace(how, steps=0), **options)[1]
    return Refined(refined(attention, w), before, solved) if solved < after else found


def _correction(
    read: Callable[[Tensor], tuple[Tensor, Tensor]],
    parts: Iterable[Tensor],
    energy_NT: Tensor,
    autocast: bool,
    team: Team = ALONE,
) -> Tensor:
    """What to add to a linear projection: weighted least squares, ``[D, I]`` float32.

    Args:
        read: From sequence numbers to inputs ``[B, T, I]`` and what the output lacks ``[B, T, D]``.
        parts: Sequence numbers.
        energy_NT: What a token's squared error is relative to.
        autocast: Whether inputs may be made in bfloat16.
        team: Processes that each have sequences of their own.
    """
    gram_II, cross_ID = torch.zeros(()).double(), torch.zeros(()).double()
    for rows in parts:
        with torch.autocast(energy_NT.device.type, torch.bfloat16, enabled=autocast):
            x_BTI, lacking_BTD = read(rows)
        x_nI = x_BTI.flatten(0, 1)
        weighted_nI = x_nI / energy_NT[rows].flatten()[:, None]
        gram_II = gram_II + (weighted_nI.T @ x_nI).double()
        cross_ID = cross_ID + (weighted_nI.T @ lacking_BTD.flatten(0, 1)).double()
    team.add_up([gram_II, cross_ID])
    # Of inputs that are zero nothing can be made, and nothing is.
    damping = (_DAMPING * gram_II.diagonal().mean()).clamp_min(1e-30)
    gram_II.diagonal().add_(damping)
    return torch.linalg.solve(gram_II, cross_ID).T.float()


def _learnt(count: int, length: int, how: Refinement) -> int:
    """Of so many sequences, how many are learnt from; the rest tells whether it helped."""
    return count - min(max(1, how.probe // length), count // 8)


def descend(
    parameters: Sequence[nn.Parameter],
    made: Callable[[Tensor], Tensor],
    target_NTD: Tensor,
    energy_NT: Tensor,
    how: Refinement,
    *,
    inherited: float = 0.0,
    autocast: bool = False,
    heads: Sequence[Heads] | None = None,
    team: Team = ALONE,
) -> tuple[float, float]:
    """Train parameters in place so that ``made`` comes near the target, each token relative to its energy.

    Args:
        parameters: What is trained.
        made: From sequence numbers to what should be the target there, ``[B, T, D]``.
        target_NTD: What it should be.
        energy_NT: What a token's squared error is relative to.
        how: Steps and rates.
        inherited: Relative error that was there before.
        autocast: Multiply in bfloat16.
        heads: What each parameter consists of; by default each is one matrix.
        team: Processes that each have such sequences of their own; ``how`` is each one's share.

    Returns:
        Mean relative error of tokens that are not learnt from, before and after; twice the same where no step was
        taken.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """

    def error(rows: Tensor) -> Tensor:
        with torch.autocast(target_NTD.device.type, torch.bfloat16, enabled=autocast):
            made_BTD = made(rows)
        squares_BT = (made_BTD.float() - target_NTD[rows].float()).square().sum(-1)
        return (squares_BT / energy_NT[rows]).mean()

    def measured(rows: Tensor) -> float:
        # In parts: only a step may be as large as a step.
        with torch.no_grad():
            sums = [float(error(part)) * len(part) for part in rows.split(how.sequences(length))]
        return team.mean(sum(sums) / len(rows))

    count, length = target_NTD.shape[:2]
    learnt = _learnt(count, length, how)
    probe = torch.arange(learnt, count) if learnt < count else torch.arange(count)
    before = measured(probe)
    if how.steps == 0 or before < how.enough:
        return before, before
    # A step is as large as there is something to repair: one that suits a bad start would ruin a good one.
    own = min(1.0, max(before - inherited, _LEAST_OWN * before))
    steps = descent(parameters, replace(how, rate=how.rate * own**0.5), heads=heads, team=team)
    for step, rows in enumerate(how.batches(learnt, length)):
        with torch.enable_grad():
            loss = error(rows)
        if not math.isfinite(float(loss.detach())):
            raise FloatingPointError(f"refinement diverged at step {step}")
        steps.step(loss)
    return before, measured(probe)
