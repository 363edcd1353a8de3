"""The optimiser that refinement and polish share: Adam with steps relative to each tensor.

A full step moves the entries of a tensor by about ``rate`` times their root mean square. So one rate serves tensors of
any scale, and those of a factorisation, whose scales are arbitrary; and a step costs in proportion to what is trained,
at any width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor, nn

__all__ = ["Decay", "Descent", "Muon", "Schedule"]

_BETAS, _MOMENTUM = (0.9, 0.99), 0.9
Decay = Literal["linear", "cosine", "1-sqrt"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How many steps, how long, and on how much text.

    Attributes:
        steps: Steps.
        tokens: Calibration tokens a step, rounded to whole sequences.
        rate: Size of a full step, relative to each tensor.
        warmup: Steps of linear warm-up; then a decay to zero.
        decay: Its shape: a straight line, half a cosine, or ``1 - sqrt`` of what has passed.
        seed: Order of the sequences.
    """

    steps: int
    tokens: int = 1024
    rate: float
    warmup: int = 5
    decay: Decay = "linear"
    seed: int = 0

    def suited(self, length: int) -> Self:
        """The same text in steps of at least one whole sequence; the rate goes with the root of a step's tokens.

        Args:
            length: Tokens of a sequence.
        """
        share = max(length / self.tokens, 1.0)
        tokens, steps = round(self.tokens * share), max(1, round(self.steps / share))
        return replace(self, tokens=tokens, steps=steps, rate=self.rate * share**0.5)

    def sequences(self, length: int) -> int:
        """Sequences a step."""
        return max(1, self.tokens // length)

    def factor(self, step: int) -> float:
        """Share of the full rate at ``step``."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        left = (self.steps - step) / max(1, self.steps - self.warmup)
        if self.decay == "linear":
            return left
        return 0.5 - 0.5 * math.cos(math.pi * left) if self.decay == "cosine" else 1 - math.sqrt(1 - left)

    def batches(self, count: int, length: int) -> Iterator[Tensor]:
        """For each step the numbers of its sequences: shuffled epochs of whole batches.

        Args:
            count: Sequences that there are.
            length: Tokens of each.
        """
        generator, size, step = torch.Generator().manual_seed(self.seed), min(self.sequences(length), count), 0
        while True:
            order = torch.randperm(count, generator=generator)
            for rows in order[: count - count % size].split(size):
                if step == self.steps:
                    return
                yield rows
                step += 1


class Descent:
    """Adam with relative steps.

    Args:
        parameters: What to train.
        schedule: How large each step is.

    Attributes:
        taken: Steps so far.
        optimisers: What steps; groups have the ``size`` that their steps are relative to.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], schedule: Schedule) -> None:
        self.parameters = [p for p in parameters if p.numel()]
        self._schedule, self.taken = schedule, 0
        self.optimisers = self._optimisers()

    def _optimisers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam([_by_entries(p) for p in self.parameters], lr=0.0, betas=_BETAS, fused=True)]

    def step(self, output: Tensor, gradient: Tensor | None = None) -> None:
        """One step down: ``output`` is a loss, or comes with the gradient of a loss by it."""
        gradients = torch.autograd.grad(output, self.parameters, gradient)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.follow()

    def follow(self) -> None:
        """One step down the gradients that the parameters have."""
        size = self._schedule.rate * self._schedule.factor(self.taken)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = size * group["size"]
            optimiser.step()
        self.taken += 1


class Muon(Descent):
    """Muon (Jordan et al., 2024) for matrices, Adam for the few vectors, both with relative steps.

    A matrix moves by ``rate`` times its root mean square singular value, in all directions alike. Each step
    orthogonalises every matrix, for the price of some four tokens a row: for long training, not for short.
    """

    def _optimisers(self) -> list[torch.optim.Optimizer]:
        matrices = [_by_directions(p) for p in self.parameters if p.ndim == 2]
        vectors = [_by_entries(p) for p in self.parameters if p.ndim != 2]
        found: list[torch.optim.Optimizer] = []
        if matrices:
            found.append(torch.optim.Muon(matrices, lr=0.0, weight_decay=0.0, momentum=_MOMENTUM))
        if vectors:
            found.append(torch.optim.Adam(vectors, lr=0.0, betas=(0.9, 0.95)))
        return found


def _whole(parameter: nn.Parameter) -> Tensor:
    """One that is sharded is measured as a whole."""
    p = parameter.detach()
    return getattr(p, "full_tensor", lambda: p)()


def _by_entries(parameter: nn.Parameter) -> dict:
    return {"params": [parameter], "size": float(_whole(parameter).square().mean().sqrt())}


def _by_directions(parameter: nn.Parameter) -> dict:
    p = _whole(parameter)
    rows, columns = p.shape
    # torch's Muon enlarges the steps of tall matrices; here all have the size that is asked for.
    tall = max(1.0, rows / columns) ** 0.5
    return {"params": [parameter], "size": float(p.norm()) / min(rows, columns) ** 0.5 / tall}
