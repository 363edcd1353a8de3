"""What was measured on, and how: copies for the bandwidth, CUDA graphs and events for the time."""

from __future__ import annotations

import datetime
import platform
import statistics
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

__all__ = ["captured", "copy_bandwidth", "describe", "milliseconds"]

_PACKAGES = ("latentize", "torch", "triton", "transformers", "flashinfer-python", "flash-mla")
_COPIED = 1 << 30
_WARMUP, _REPEATS = 3, 30


def describe(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, date and command."""
    found = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "host": f"{platform.machine()}, {platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "device": "none: interpreted on a CPU",
    }
    if device.type == "cuda":
        of = torch.cuda.get_device_properties(device)
        found |= {"device": of.name, "capability": f"{of.major}.{of.minor}", "processors": of.multi_processor_count}
        found |= {"memory_bytes": of.total_memory, "driver": _driver()}
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> int | None:
    # Private, and told only where it is.
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    return None if ask is None else ask()


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of the median of some copies that no cache holds."""
    source, target = (torch.zeros(_COPIED, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * _COPIED / (milliseconds(lambda: target.copy_(source)) / 1e3)


def captured(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """A call as a CUDA graph, so that what the host takes to launch it is not measured; and what it returned."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARMUP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph.replay, out


def milliseconds(run: Callable[[], Any], repeats: int = _REPEATS) -> float:
    """Median of calls, each between two events."""
    for _ in range(_WARMUP):
        run()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, stop in pairs:
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in pairs)
