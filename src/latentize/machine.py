"""What this machine has and can do."""

from __future__ import annotations

import resource
import sys

import torch

__all__ = ["has_matrix_units", "multiplies_bfloat16", "peak_rss_bytes"]


def peak_rss_bytes() -> int:
    """The most memory that this process has had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def multiplies_bfloat16(device_type: str) -> bool:
    """Whether bfloat16 is faster there than float32; a CPU may only emulate it."""
    return device_type != "cpu" or _cpu_has("_is_avx512_bf16_supported") or has_matrix_units()


def has_matrix_units() -> bool:
    """Whether this CPU has instructions for whole tiles of bfloat16 (AMX)."""
    return _cpu_has("_is_amx_tile_supported")


def _cpu_has(probe: str) -> bool:
    # PyTorch has no public name for these; one that goes means no.
    supported = getattr(torch.cpu, probe, None)
    return bool(supported and supported())
