"""Refinement: a few steps of gradient descent on one layer's output, with the closed form as the start.

The layer's inputs are those that it will see, made by the converted layers before it; its target is what brings the
residual stream back to the source's. So a layer also repairs what earlier ones lost. No labels are used.

N sequences, T tokens, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latentize.attention.latent import LatentWeights, cache_rows, output, queries
from latentize.attention.module import prefill

__all__ = ["Refinement", "batches", "expand_heads", "refine", "trainable"]


@dataclass(frozen=True)
class Refinement:
    """How a layer is refined.

    Attributes:
        steps: Adam steps.
        batch: Sequences a step.
        rate: Step of each tensor, in units of its root mean square.
        warmup: Steps of linear warm-up; then a linear decay to zero.
        seed: Order of the sequences.
    """

    steps: int = 80
    batch: int = 8
    rate: float = 0.03
    warmup: int = 10
    seed: int = 0

    def factor(self, step: int) -> float:
        """Share of the full step at ``step``."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return (self.steps - step) / max(1, self.steps - self.warmup)


def trainable(w: LatentWeights) -> dict[str, Tensor]:
    """The projections of a layer, by field name."""
    return {n: t for n, t in vars(w).items() if isinstance(t, Tensor) and n != "frequencies_PF"}


def expand_heads(w: LatentWeights) -> LatentWeights:
    """Every head its own up-projections, as formats that do not share them store it; refinement may part them."""
    share = w.q_nope_HND.shape[0] // w.k_up_UNr.shape[0]
    return replace(
        w, k_up_UNr=w.k_up_UNr.repeat_interleave(share, dim=0), v_up_UVr=w.v_up_UVr.repeat_interleave(share, dim=0)
    )


def batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Endless shuffled batches of sequence numbers."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % min(size, count)].split(min(size, count))


def forward(x_BTD: Tensor, w: LatentWeights) -> Tensor:
    """The layer's output on whole sequences, by fused attention."""
    positions = torch.arange(x_BTD.shape[1], device=x_BTD.device)[None]
    q_nope, q_rope = queries(x_BTD, w, positions)
    c, k_rope = cache_rows(x_BTD, w, positions)
    return output(prefill(q_nope, q_rope, c, k_rope, w), w)


def refine(
    w: LatentWeights, x_NTD: Tensor, target_NTD: Tensor, how: Refinement, *, autocast: bool = False
) -> LatentWeights:
    """Minimise ``‖attn(x) - target‖²`` relative to the target's variance.

    Args:
        w: The start.
        x_NTD: Normalised inputs of the layer.
        target_NTD: What its attention should add to the residual stream.
        how: Steps and rates.
        autocast: Multiply in bfloat16.

    Returns:
        float32 weights.
    """
    parameters = {n: t.to(torch.float32).clone().requires_grad_(True) for n, t in trainable(w).items()}
    groups = [
        {"params": [t], "rms": float(t.detach().square().mean().sqrt())} for t in parameters.values() if t.numel()
    ]
    optimiser = torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
    w = replace(w, **parameters, frequencies_PF=w.frequencies_PF.to(torch.float32))
    scale = 1 / float(target_NTD.var())
    for step, rows in zip(range(how.steps), batches(len(x_NTD), how.batch, how.seed), strict=False):
        with torch.autocast(x_NTD.device.type, torch.bfloat16, enabled=autocast):
            made_BTD = forward(x_NTD[rows], w)
        loss = (made_BTD.float() - target_NTD[rows]).square().mean() * scale
        gradients = torch.autograd.grad(loss, [t for t in parameters.values() if t.numel()])
        if not math.isfinite(float(loss.detach())):
            raise FloatingPointError(f"refinement diverged at step {step}")
        for group, gradient in zip(optimiser.param_groups, gradients, strict=True):
            group["params"][0].grad = gradient
            group["lr"] = how.rate * how.factor(step) * group["rms"]
        optimiser.step()
    return replace(w, **{n: t.detach() for n, t in parameters.items()})
