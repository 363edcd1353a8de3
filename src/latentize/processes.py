"""One process or many that do a job together, as ``torchrun`` starts them.

All of them run the same code in the same order, each on its share of a text or of a list. What is decided by is summed
over all of them, or told by the first, so that none goes another way than the others.
"""

from __future__ import annotations

import atexit
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from latentize.errors import ResourceError

__all__ = ["ALONE", "Team", "own_device", "team", "together"]

T = TypeVar("T")
# Others wait while the first reads, proves and writes; one that has died is noticed at once all the same.
_PATIENCE = timedelta(days=1)


class Team:
    """Processes that share work. Every method is called by all of them.

    Attributes:
        rank, size: This process's number, and how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    @property
    def on_this_machine(self) -> int:
        """How many of them."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.size > 1 else 1

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """Of a list that all have, every n-th item, ``n`` being how many processes there are."""
        return items[self.rank :: self.size]

    def gathered(self, values: Sequence[float], count: int) -> list[float]:
        """One of each item of a list, where every process has those of :meth:`mine`."""
        found = torch.zeros(count, dtype=torch.float64)
        found[self.rank :: self.size] = torch.tensor(values, dtype=torch.float64)
        return self._summed(found).tolist()

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Sum each over the processes, in place; the same bits everywhere."""
        if self.size == 1:
            return
        by_kind: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_kind.setdefault(tensor.dtype, []).append(tensor)
        for some in by_kind.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in some])
            dist.all_reduce(flat)
            for tensor, part in zip(some, flat.split([tensor.numel() for tensor in some]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def collect(self, flat: Tensor, sizes: Sequence[int]) -> Tensor:
        """The sum over the processes of what each has for this one.

        Args:
            flat: What this process has for each, one after the other.
            sizes: How many numbers that is, the same everywhere.
        """
        if self.size == 1:
            return flat
        own = sizes[self.rank]
        found = flat.new_empty(self.size * own)
        dist.all_to_all_single(found, flat, [own] * self.size, list(sizes))
        return found.view(self.size, own).sum(0)

    def exchange(self, own: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """What each process has, to all.

        Args:
            own: Of this process, flat.
            sizes: How many numbers each has.
        """
        found = [own if rank == self.rank else own.new_empty(size) for rank, size in enumerate(sizes)]
        for rank, flat in enumerate(found if self.size > 1 else ()):
            if len(flat):
                dist.broadcast(flat, rank)
        return found

    def mean(self, value: float) -> float:
        """Over the processes."""
        return self._reduced(value, dist.ReduceOp.SUM) / self.size

    def most(self, value: float) -> float:
        """The largest that a process has."""
        return self._reduced(value, dist.ReduceOp.MAX)

    def _reduced(self, value: float, how: Any) -> float:
        return float(self._summed(torch.tensor(value, dtype=torch.float64), how)) if self.size > 1 else value

    def _summed(self, values: Tensor, how: Any = None) -> Tensor:
        if self.size == 1:
            return values
        held = values.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(held, dist.ReduceOp.SUM if how is None else how)
        return held

    def gather(self, value: T) -> list[T]:
        """What each process has, in order."""
        found: list[Any] = [value]
        if self.size > 1:
            found = [None] * self.size
            dist.all_gather_object(found, value)
        return found

    def told(self, value: T, device: str | torch.device = "cpu") -> T:
        """What the first process has, its tensors on a device."""
        return self.of(0, value, device)

    def of(self, item: int, value: T | None, device: str | torch.device = "cpu") -> T:
        """The same of the process that has an item of a list, by :meth:`mine`; others have nothing."""
        owner = item % self.size
        packed: list[bytes | None] = [None]
        if self.rank == owner and self.size > 1:
            stream = io.BytesIO()
            torch.save(value, stream)
            packed = [stream.getvalue()]
        if self.size > 1:
            dist.broadcast_object_list(packed, src=owner)
        if self.rank == owner:
            return cast("T", value)
        assert packed[0] is not None
        # Of our own making, from a process of the same job.
        return torch.load(io.BytesIO(packed[0]), map_location=device, weights_only=False)


ALONE = Team()


def team() -> Team:
    """Those that have joined; a single one by default."""
    return Team(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else ALONE


def own_device(device: str) -> str:
    """Of several GPUs each process of a machine takes its own."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" and several else device


@contextmanager
def together(device: str) -> Iterator[None]:
    """Join the processes that ``torchrun`` has started, if it was that, and stay with them for whatever comes next.

    Args:
        device: Where work is done.

    Raises:
        ResourceError: another process has ended before its time.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if not dist.is_initialized():
        on_gpu = torch.device(device).type == "cuda"
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_PATIENCE)
        atexit.register(dist.destroy_process_group)
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise ResourceError(
            "another process has ended, and this one cannot go on without it",
            code="LZ423",
            where=f"process {os.environ.get('RANK')} of {os.environ['WORLD_SIZE']}",
        ) from error
