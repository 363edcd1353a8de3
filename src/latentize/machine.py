"""What this machine has and can do."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from collections.abc import Iterator

import torch

__all__ = ["has_matrix_units", "keeping_freed_memory", "multiplies_bfloat16", "peak_rss_bytes"]

# Parameters of glibc's mallopt(3), what they are set to meanwhile, and what to afterwards (its defaults, but for the
# threshold of mmap, which is then no longer adapted: its upper bound).
_MALLOPT = {
    -1: ((1 << 31) - 1, 128 << 10),  # M_TRIM_THRESHOLD: free bytes at the heap's end that go back
    -2: (1 << 26, 0),  # M_TOP_PAD: bytes that the heap grows by beyond what is asked for
    -3: (32 << 20, 32 << 20),  # M_MMAP_THRESHOLD: bytes from which an allocation is a mapping of its own
    -4: (0, 65_536),  # M_MMAP_MAX: how many such there may be
}


def peak_rss_bytes() -> int:
    """The most memory that this process has had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextlib.contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Meanwhile, freed memory stays with the process, for the next tensor of its kind.

    glibc gives large blocks back at once, and gets them back zeroed, page by page: a third of the time of a
    conversion on a CPU. For work whose memory is small beside the machine's; elsewhere than on glibc nothing happens.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        set_option, trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):
        yield
        return
    for option, (meanwhile, _) in _MALLOPT.items():
        set_option(option, ctypes.c_int(meanwhile))
    try:
        yield
    finally:
        for option, (_, afterwards) in _MALLOPT.items():
            set_option(option, ctypes.c_int(afterwards))
        trim(ctypes.c_size_t(0))


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
