"""What this machine reaches, measured in a moment."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch

from latentize.families import ModelSpec
from latentize.machine import multiplies_bfloat16
from latentize.work import Rates

__all__ = ["rates_of"]

# Tokens of the products, bytes of the copy, and for how long each is repeated.
_TOKENS, _COPIED, _SECONDS = 1024, 1 << 24, 0.05


def rates_of(spec: ModelSpec, device: str) -> Rates:
    """Of products of the model's own sizes, and of a copy that caches do not hold.

    Args:
        spec: The model.
        device: Where layers run.
    """
    return _measured(spec.attention.hidden_size, spec.intermediate_size, device)


@cache
def _measured(hidden: int, intermediate: int, device: str) -> Rates:
    def product(dtype: torch.dtype) -> float:
        x_nD = torch.ones(_TOKENS, hidden, dtype=dtype, device=device)
        w_ID = torch.ones(intermediate, hidden, dtype=dtype, device=device)
        return 2 * _TOKENS * hidden * intermediate / _least(lambda: x_nD @ w_ID.T, device)

    wide = product(torch.float32)
    narrow = product(torch.bfloat16) if multiplies_bfloat16(torch.device(device).type) else wide
    a, b = (torch.ones(_COPIED // 4, device=device) for _ in range(2))
    return Rates(narrow, wide, product(torch.float64), 2 * _COPIED / _least(lambda: a.copy_(b), device))


def _least(do: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of some repetitions."""
    do()
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < end or best == float("inf"):
        started = time.perf_counter()
        do()
        if device != "cpu":
            torch.accelerator.synchronize()
        best = min(best, time.perf_counter() - started)
    return best
