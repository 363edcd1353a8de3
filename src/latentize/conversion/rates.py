"""What this machine reaches, measured in a moment."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch

from latentize.conversion.work import Rates
from latentize.families import ModelSpec
from latentize.machine import multiplies_bfloat16
from latentize.modeling.blocks import causal_blocks, suit_blocks

__all__ = ["rates_of"]

# Tokens of the products and of a sequence, bytes of the copy, and for how long each is repeated.
_TOKENS, _LENGTH, _COPIED, _SECONDS = 1024, 512, 1 << 25, 0.1


def rates_of(spec: ModelSpec, device: str) -> Rates:
    """Of products of the model's own sizes, and of a copy that caches do not hold.

    Args:
        spec: The model.
        device: Where layers run.
    """
    a = spec.attention
    return _measured(a.hidden_size, spec.intermediate_size, a.num_heads, a.head_dim, device)


@cache
def _measured(hidden: int, intermediate: int, heads: int, head_dim: int, device: str) -> Rates:
    def product(dtype: torch.dtype) -> float:
        x_nD = torch.ones(_TOKENS, hidden, dtype=dtype, device=device)
        w_ID = torch.ones(intermediate, hidden, dtype=dtype, device=device)
        return 2 * _TOKENS * hidden * intermediate / _seconds(lambda: x_nD @ w_ID.T, device)

    wide = product(torch.float32)
    narrow = product(torch.bfloat16) if multiplies_bfloat16(torch.device(device).type) else wide
    dtype = torch.bfloat16 if narrow > wide else torch.float32
    q, k, v = (torch.ones(1, heads, _LENGTH, head_dim, dtype=dtype, device=device) for _ in range(3))

    def attend() -> torch.Tensor:
        if suit_blocks(q, _LENGTH):
            return causal_blocks(q, k, v, head_dim**-0.5)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    # Rounded scores are for what is asked to be fast.
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=narrow > wide):
        attended = _seconds(attend, device)
    a, b = (torch.ones(_COPIED // 4, device=device) for _ in range(2))
    return Rates(
        narrow,
        wide,
        product(torch.float64),
        2 * heads * _LENGTH**2 * head_dim / attended,
        2 * _COPIED / _seconds(lambda: a.copy_(b), device),
    )


def _seconds(do: Callable[[], object], device: str) -> float:
    """Seconds of one of many repetitions, on average: what is kept up, not what is reached once."""
    do()
    started, times = time.perf_counter(), 0
    while times == 0 or time.perf_counter() - started < _SECONDS:
        do()
        times += 1
        if device != "cpu":
            torch.accelerator.synchronize()
    return (time.perf_counter() - started) / times
