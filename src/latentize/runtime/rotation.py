"""Latents are turned before they are rounded, which spreads outliers over all of their values."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["rotation", "rotation_on"]


@cache
def rotation(size: int) -> Tensor:
    """An orthogonal ``[n, n]`` that spreads every value over all: Hadamard's where there is one, else a random one."""
    if size & (size - 1) == 0:
        h = torch.ones(1, 1, dtype=torch.float64)
        while len(h) < size:
            h = torch.cat([torch.cat([h, h], dim=1), torch.cat([h, -h], dim=1)])
        return h / size**0.5
    generator = torch.Generator().manual_seed(size)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


@cache
def rotation_on(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """:func:`rotation`, once on each device: a captured graph must not copy from the host."""
    with torch.inference_mode(False):
        return rotation(size).to(device, dtype)
