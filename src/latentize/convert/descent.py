"""The optimiser that refinement and polish share: Muon for matrices, Adam for the few vectors.

Every step is relative: ``rate`` times the root mean square singular value of a matrix (the root mean square of a
vector), in all directions alike. So one rate serves tensors of any scale, and those of a factorisation, whose
scales are arbitrary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor, nn

__all__ = ["Decay", "Descent", "Schedule"]

_MOMENTUM = 0.9
# Hidden size that the numbers of a schedule are meant for, and how many times as many tokens a step has at most.
_NARROW, _WIDEST = 256, 4
_BETAS = (0.9, 0.95)
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

    def suited(self, hidden_size: int, length: int) -> Self:
        """The same text in steps that suit a model: more tokens each where a step itself costs more.

        Muon orthogonalises every matrix at each step, for the price of some four tokens a row. A step also takes a
        whole sequence at least. The rate goes with the root of the tokens, as the noise of their gradient does.

        Args:
            hidden_size: Width of the model.
            length: Tokens of a sequence.
        """
        share = max(min(_WIDEST, hidden_size / _NARROW), length / self.tokens, 1.0)
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
    """Muon (Jordan et al., 2024) with relative steps.

    Args:
        parameters: What to train.
        schedule: How large each step is.

    Attributes:
        taken: Steps so far.
        optimisers: Of matrices, and of the rest.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], schedule: Schedule) -> None:
        self.parameters = [p for p in parameters if p.numel()]
        self._schedule, self.taken = schedule, 0
        matrices = [_group(p) for p in self.parameters if p.ndim == 2]
        vectors = [_group(p) for p in self.parameters if p.ndim != 2]
        self.optimisers: list[torch.optim.Optimizer] = []
        if matrices:
            self.optimisers.append(torch.optim.Muon(matrices, lr=0.0, weight_decay=0.0, momentum=_MOMENTUM))
        if vectors:
            self.optimisers.append(torch.optim.Adam(vectors, lr=0.0, betas=_BETAS))

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


def _group(parameter: nn.Parameter) -> dict:
    p = parameter.detach()
    # One that is sharded is measured as a whole.
    p = getattr(p, "full_tensor", lambda: p)()
    if p.ndim != 2:
        return {"params": [parameter], "size": float(p.square().mean().sqrt())}
    rows, columns = p.shape
    # torch's Muon enlarges the steps of tall matrices; here all have the size that is asked for.
    tall = max(1.0, rows / columns) ** 0.5
    return {"params": [parameter], "size": float(p.norm()) / min(rows, columns) ** 0.5 / tall}
