"""The optimiser of several processes does what that of one does."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tests.common import FP32, relative_error
from torch import Tensor, nn

from latentize.processes import Team
from latentize.training.descent import Heads, Muon, Schedule, _flop_of, _owners

SHAPES = {"whole": (24, 40), "heads below each other": (8 * 6, 16), "heads side by side": (16, 8 * 6), "small": (4, 4)}
HEADS = (Heads(), Heads(8), Heads(8, 1), Heads())


class Alone(Team):
    """One of several processes, of which the others do nothing."""

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        pass

    def collect(self, flat: Tensor, sizes: Sequence[int]) -> Tensor:
        return flat.split(list(sizes))[self.rank]

    def exchange(self, own: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        return [own if rank == self.rank else own.new_zeros(size) for rank, size in enumerate(sizes)]


def moved(team: Team, steps: int) -> list[Tensor]:
    """What so many steps add to matrices of ones; their gradients are the same in every process."""
    parameters = [nn.Parameter(torch.ones(shape)) for shape in SHAPES.values()]
    descent = Muon(parameters, Schedule(steps=steps, rate=0.1, warmup=1), heads=HEADS, team=team)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        descent.follow()
    return [parameter.detach() - 1 for parameter in parameters]


@pytest.mark.parametrize("processes", [2, 3, 20])
def test_each_matrix_is_orthogonalised_by_one_process(processes: int) -> None:
    parts = [moved(Alone(rank, processes), steps=3) for rank in range(processes)]
    for whole, *some in zip(moved(Team(), steps=3), *parts, strict=True):
        assert relative_error(torch.stack(some).sum(0), whole) <= FP32


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_matrices_are_shared_out_evenly(processes: int) -> None:
    shapes = ((9, 128, 576), (1, 192, 576), (9, 128, 192), (9, 576, 64))
    owners, load = _owners(shapes, processes), [0] * processes
    for (_, m, n), owner_K in zip(shapes, owners, strict=True):
        for owner in owner_K:
            load[owner] += _flop_of(m, n)
    largest = max(_flop_of(m, n) for _, m, n in shapes)
    assert max(load) <= sum(load) / processes + largest
    assert [len(owner_K) for owner_K in owners] == [9, 1, 9, 9]
