"""The optimiser that refinement and polish share: Muon for matrices, Adam for the few vectors.

Every step is relative: ``rate`` times the root mean square singular value of a matrix (the root mean square of a
vector), in all directions alike. So one rate serves tensors of any scale, and those of a factorisation, whose
scales are arbitrary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

__all__ = ["Descent", "batches"]

_MOMENTUM = 0.9
_BETAS = (0.9, 0.95)


class Descent:
    """Muon (Jordan et al., 2024) with relative steps, linear warm-up and linear decay to zero.

    Args:
        parameters: What to train.
        rate: Size of a full step, relative to each tensor.
        steps: How many there will be.
        warmup: How many of them the warm-up takes.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, rate: float, steps: int, warmup: int) -> None:
        self.parameters = [p for p in parameters if p.numel()]
        self._rate, self._steps, self._warmup, self._step = rate, steps, warmup, 0
        matrices = [_group(p) for p in self.parameters if p.ndim == 2]
        vectors = [_group(p) for p in self.parameters if p.ndim != 2]
        self._optimisers: list[torch.optim.Optimizer] = []
        if matrices:
            self._optimisers.append(torch.optim.Muon(matrices, lr=0.0, weight_decay=0.0, momentum=_MOMENTUM))
        if vectors:
            self._optimisers.append(torch.optim.Adam(vectors, lr=0.0, betas=_BETAS))

    def factor(self, step: int) -> float:
        """Share of the full step at ``step``."""
        if step < self._warmup:
            return (step + 1) / self._warmup
        return (self._steps - step) / max(1, self._steps - self._warmup)

    def step(self, output: Tensor, gradient: Tensor | None = None) -> None:
        """One step down: ``output`` is a loss, or comes with the gradient of a loss by it."""
        gradients = torch.autograd.grad(output, self.parameters, gradient)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        size = self._rate * self.factor(self._step)
        for optimiser in self._optimisers:
            for group in optimiser.param_groups:
                group["lr"] = size * group["size"]
            optimiser.step()
        self._step += 1


def _group(parameter: nn.Parameter) -> dict:
    p = parameter.detach()
    if p.ndim != 2:
        return {"params": [parameter], "size": float(p.square().mean().sqrt())}
    rows, columns = p.shape
    # torch's Muon enlarges the steps of tall matrices; here all have the size that is asked for.
    tall = max(1.0, rows / columns) ** 0.5
    return {"params": [parameter], "size": float(p.norm()) / min(rows, columns) ** 0.5 / tall}


def batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Endless shuffled batches of sequence numbers."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % min(size, count)].split(min(size, count))
