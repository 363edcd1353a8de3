"""What a machine allows: memory and room on the disk are looked at before anything is done."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from latentize.checkpoint.places import require_folder
from latentize.conversion.footprint import Footprint
from latentize.errors import NumericsError, ResourceError
from latentize.machine import memory_room, rss_bytes
from latentize.recipe import Recipe

__all__ = ["MemoryNeed", "expected_peak", "finite_numbers", "require_disk", "require_memory", "within_memory"]

# A prediction of memory is taken at its word only this far: it was 21 % too large at most where it was measured
# (docs/memory.md). Between the two a conversion is tried.
_CERTAIN = 0.8
# Freed memory that stays with the process is faster, and lies in pieces: a tenth more was needed where it was measured,
# and it is kept only where there is room for much more.
_KEPT, _ROOM = 1.1, 1.8


@dataclass(frozen=True)
class MemoryNeed:
    """What a conversion is expected to take.

    Attributes:
        peak: Bytes that the process will have at most; ``None`` where that is not known.
        keeps_freed: Whether there is so much memory that what is freed need not go back.
    """

    peak: int | None
    keeps_freed: bool


def require_memory(predicted: Footprint, recipe: Recipe, *, large: bool, processes: int = 1) -> MemoryNeed:
    """Predict the peak of this process.

    Args:
        predicted: What the conversion takes beside what the process has.
        recipe: What is to be done.
        large: Whether the model is large beside the machine's memory: then there is none to keep.
        processes: Of this machine that take as much.

    Raises:
        ResourceError: memory will surely not suffice.
    """
    room, now = memory_room(), rss_bytes()
    together = processes * predicted.bytes
    if _CERTAIN * together > room.bytes:
        of_all = "process" if processes == 1 else f"first of {processes} processes"
        raise ResourceError(
            f"the conversion would take about {together / 1e9:.2f} GB beside the {now / 1e9:.2f} GB of the "
            f"{of_all}, {room.bytes / 1e9:.2f} GB are there; the largest part is {predicted.largest}",
            code="LZ422",
            where=room.bound,
            fix=_less_memory(predicted.largest, recipe),
        )
    keeps = not large and _ROOM * together < room.bytes / 2
    return MemoryNeed(expected_peak(predicted, keeps_freed=keeps), keeps)


def expected_peak(predicted: Footprint, *, keeps_freed: bool) -> int:
    """Bytes that this process will have at most.

    Args:
        predicted: What the conversion takes beside what the process has.
        keeps_freed: Whether what is freed does not go back.
    """
    return rss_bytes() + round(predicted.bytes * (_KEPT if keeps_freed else 1))


def _less_memory(largest: str, recipe: Recipe) -> str:
    """What makes the part of a conversion smaller that takes most."""
    fewer = f"give fewer --tokens (now {recipe.calibration_tokens}), "
    options = {
        "polishing": "give --no-polish, ",
        "refining layers": f"{fewer}or --fast, ",
        "converting layers": fewer if recipe.to == "mla" else "",
        # With sizes given only ladders are compared, on no more text than there is.
        "choosing sizes": fewer if recipe.sizes else "give --kv-lora-rank and --qk-rope-head-dim, ",
    }
    return f"{options.get(largest, '')}end other programs, or use a larger machine"


def require_disk(out: Path, needed: int) -> None:
    """That a folder can be made, and ``needed`` bytes be written to it.

    Raises:
        OutputError: nothing can be written there.
        ResourceError: there is not as much room.
    """
    parent = require_folder(out)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ResourceError(
            f"the output and what it is made of take about {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free",
            where=str(parent),
            fix="make room, or choose another disk",
        )


@contextlib.contextmanager
def finite_numbers(others: Sequence[str]) -> Iterator[None]:
    """Arithmetic that leaves the range of numbers is the model's fault, or that of what was done to it.

    Args:
        others: Options that do something else than what was asked for.
    """
    further = f"; if so, try {', or '.join(others)}" if others else ""
    try:
        yield
    except (ArithmeticError, torch.linalg.LinAlgError) as error:  # pyright: ignore[reportPrivateImportUsage]
        raise NumericsError(
            f"the conversion has left the range of numbers: {error}",
            where="the weights of the model, or the method",
            fix=f"does the model itself predict anything?{further}",
        ) from error


@contextlib.contextmanager
def within_memory() -> Iterator[None]:
    """What Python and PyTorch say where there is no more memory, said once."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # PyTorch's allocators have no class of their own on a CPU.
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise ResourceError(
            f"memory does not suffice: {(str(error) or 'the system gives no more').splitlines()[0]}",
            code="LZ422",
            where="this machine",
            fix="end other programs, give fewer --tokens or --no-polish, or use a larger machine",
        ) from error
