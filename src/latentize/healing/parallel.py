"""One process or many, as ``torchrun`` starts them: sharded (FSDP2) or replicated (DDP).

What is written, and what is measured in the end, is the first process's business.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor, nn

from latentize import processes
from latentize.errors import OptionError

__all__ = ["Parallel", "Team", "shard"]

Parallel = Literal["fsdp", "ddp"]


class Team(processes.Team):
    """The processes that heal together.

    Args:
        parallel: ``fsdp`` shards what is trained and its optimiser over the processes, ``ddp`` repeats it.
        device: Where to run; of several GPUs each process takes its own.

    Attributes:
        parallel, device: As given; of several GPUs this process's own.
    """

    def __init__(self, parallel: Parallel = "fsdp", device: str = "cpu") -> None:
        joined = processes.team()
        super().__init__(joined.rank, joined.size)
        self.parallel, self.device = parallel, processes.own_device(device)

    def wait(self) -> None:
        """Until all processes have come this far."""
        if self.size > 1:
            dist.barrier()

    def share(self, rows: Tensor) -> Tensor:
        """This process's part of a step's sequences.

        Raises:
            OptionError: they cannot be shared out evenly.
        """
        if len(rows) % self.size:
            raise OptionError(
                f"{len(rows)} sequences a step cannot be shared by {self.size} processes",
                where="--step-tokens",
                fix=f"a multiple of {self.size} sequences",
            )
        return rows.chunk(self.size)[self.rank]

    def averaged(self, values: Tensor) -> Tensor:
        """Each over the processes."""
        values = values.clone()
        self.add_up([values])
        return values / self.size

    def called(self, student: nn.Module) -> Any:
        """The module to call in training: the same one, or wrapped in DDP."""
        if self.size == 1 or self.parallel == "fsdp":
            return student
        return nn.parallel.DistributedDataParallel(student)

    @property
    def shards(self) -> bool:
        """Whether each process holds a part of the model only."""
        return self.size > 1 and self.parallel == "fsdp"


def shard(
    model: nn.Module, layers: Iterable[nn.Module], whole: nn.Module | None, device: str, *, rest: bool = True
) -> None:
    """FSDP2: give each process its part of every tensor, in place.

    Args:
        model: Without values, on ``meta``.
        layers: Its decoder layers, each in parts of its own.
        whole: The same model with its values, on the first process; nobody else has to read it.
        device: Where the parts go.
        rest: Whether what is around the layers is in parts, too; else each process has all of it, and it may be
            called apart from the model.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    layers = list(layers)
    for layer in layers:
        fully_shard(layer)
    if rest:
        fully_shard(model)
    parts = [model] if rest else layers
    assert all(isinstance(p, DTensor) for part in parts for p in part.parameters()), "FSDP has left something whole"
    model.to_empty(device=device)
    values = {} if whole is None else whole.state_dict()
    set_model_state_dict(model, values, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    own = {} if whole is None else dict(whole.named_buffers())
    # A state dict lacks those that are not persistent, such as the angles of RoPE.
    for name, buffer in model.named_buffers():
        if own:
            buffer.copy_(own[name])
        dist.broadcast(buffer, 0)
