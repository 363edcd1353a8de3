"""What this machine has and can do."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

__all__ = [
    "Room",
    "give_back_freed_memory",
    "has_matrix_units",
    "keeping_freed_memory",
    "memory_room",
    "multiplies_bfloat16",
    "peak_rss_bytes",
    "rss_bytes",
]

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
    # Linux counts the peak of whoever started the process towards `ru_maxrss`, but not towards this.
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rss_bytes() -> int:
    """The memory that this process has now, in bytes."""
    return psutil.Process().memory_info().rss


@dataclass(frozen=True)
class Room:
    """Memory that this process can still get.

    Attributes:
        bytes: How much.
        bound: What there is no more of, for people.
    """

    bytes: int
    bound: str


def memory_room(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Room:
    """The least of what the machine has (swap included), what a container may have, and ``ulimit -v``.

    Args:
        cgroups: Where the system shows control groups.
        own: Which of them this process is in.
    """
    rooms = [Room(psutil.virtual_memory().available + psutil.swap_memory().free, "this machine")]
    rooms += [Room(free, f"the control group {folder}") for folder, free in _cgroup_rooms(cgroups, own)]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        rooms.append(Room(limit - psutil.Process().memory_info().vms, "the limit of address space, ulimit -v"))
    least = min(rooms, key=lambda room: room.bytes)
    return Room(max(0, least.bytes), least.bound)


# Of both versions of control groups: the limit, what is used, and what of that is only cached files.
_CGROUP_FILES = (
    ("memory.max", "memory.current", ("inactive_file", "active_file")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
)


def _cgroup_rooms(cgroups: Path, own: Path) -> Iterator[tuple[Path, int]]:
    """Each group with a limit on memory that this process is in, and what it has left."""
    try:
        entries = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in entries:
        if controllers and "memory" not in controllers.split(","):
            continue
        top = cgroups / controllers if controllers else cgroups
        # Inside a container the path may be one of the host's, and the group itself is at the top.
        folder = top / path.lstrip("/")
        for group in (folder, *folder.parents):
            if (free := _left(group)) is not None:
                yield group, free
            if group == top:
                break


def _left(group: Path) -> int | None:
    for limit, used, cached in _CGROUP_FILES:
        try:
            most, now = int((group / limit).read_text()), int((group / used).read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            return most - now + sum(int(stat.get(name, 0)) for name in cached)
        # "max" is no number: there is no limit.
        except (OSError, ValueError):
            continue
    return None


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


def give_back_freed_memory() -> None:
    """Pages between what is in use go back to the system; glibc would keep them. Elsewhere nothing happens."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(ctypes.c_size_t(0))


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
