"""The optimiser that refinement and polish share: Muon where that is cheap, Adam elsewhere.

Every step is relative to each tensor: ``rate`` times the root mean square singular value of a matrix in all directions
alike (Muon), or times the root mean square of its entries (Adam). So one rate serves tensors of any scale, and those of
a factorisation, whose scales are arbitrary.

Projections of several heads are as many matrices to Muon. That repairs as much, and its work grows with the square of
the width, as that of a step does: heads become more, not larger.

K matrices in a stack, m rows, n columns.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from latentize.machine import multiplies_bfloat16
from latentize.processes import ALONE, Team
from latentize.recipe import Decay

__all__ = ["WHOLE", "Adam", "Descent", "Heads", "Muon", "Schedule", "descent", "orthogonalising"]

_BETAS, _MOMENTUM = (0.9, 0.99), 0.9
# Newton and Schulz' iteration as Muon has it: the quintic that leads small singular values up fastest.
_QUINTIC, _SMALLEST_NORM = (3.4445, -4.7750, 2.0315), 1e-7
# Products in which Muon orthogonalises a matrix, by Newton and Schulz' iteration, and the share of a step's own
# multiplications that this may come to. Counted so it looks dearer than it is: a share of one is measured as half of a
# step, whose attention is not counted.
_ITERATIONS, _SHARE = 5, 1.2


class Heads(NamedTuple):
    """How many matrices of the same shape a projection is.

    Attributes:
        count: How many, ``K``.
        axis: 0 where they lie below each other (what heads read), 1 where side by side (what is read from heads).
    """

    count: int = 1
    axis: int = 0

    def stack(self, matrix: Tensor) -> Tensor:
        """The matrices, ``[K, m, n]``: a view."""
        return matrix.unflatten(self.axis, (self.count, -1)).movedim(self.axis, 0)

    def join(self, stack_Kmn: Tensor) -> Tensor:
        """The projection again."""
        return stack_Kmn.movedim(0, self.axis).flatten(self.axis, self.axis + 1)


WHOLE = Heads()


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How many steps, how long, and on how much text.

    Attributes:
        steps: Steps.
        tokens: Calibration tokens a step, rounded to whole sequences.
        rate: Size of a full step, relative to each tensor.
        warmup: Steps of linear warm-up; then a decay to zero.
        decay: Its shape: a straight line, half a cosine, or ``1 - sqrt`` of what has passed.
        adam: Size of Adam's steps relative to Muon's that are as good here.
        seed: Order of the sequences.
    """

    steps: int
    tokens: int = 1024
    rate: float
    adam: float = 1.0
    warmup: int = 5
    decay: Decay = "linear"
    seed: int = 0

    def suited(self, length: int) -> Self:
        """The same text in steps of a sequence at least.

        The rate goes with the root of the tokens, as the noise of their gradient does.

        Args:
            length: Tokens of a sequence.
        """
        share = max(length / self.tokens, 1.0)
        tokens, steps = round(self.tokens * share), max(1, round(self.steps / share))
        return replace(self, tokens=tokens, steps=steps, rate=self.rate * share**0.5)

    def shared(self, length: int, team: Team) -> Self:
        """What each process of a team does of it: the same steps, each on its share of their text.

        Args:
            length: Tokens of a sequence, of which each has one at least.
            team: The processes.
        """
        whole = self.suited(team.size * length) if team.size > 1 else self
        return replace(whole, tokens=whole.tokens // team.size)

    def sequences(self, length: int) -> int:
        """Sequences a step."""
        return max(1, self.tokens // length)

    def factor(self, step: int) -> float:
        """Share of the full rate at ``step``."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        left = (self.steps - step) / max(1, self.steps - self.warmup)
        if self.decay == "linear":
            return left
        return 0.5 - 0.5 * math.cos(math.pi * left) if self.decay == "cosine" else 1 - math.sqrt(1 - left)

    def batches(self, count: int, length: int) -> Iterator[Tensor]:
        """For each step the numbers of its sequences: shuffled epochs of whole batches.

        Args:
            count: Sequences that there are.
            length: Tokens of each.
        """
        generator, size, step = torch.Generator().manual_seed(self.seed), min(self.sequences(length), count), 0
        while True:
            order = torch.randperm(count, generator=generator)
            for rows in order[: count - count % size].split(size):
                if step == self.steps:
                    return
                yield rows
                step += 1


class Descent(ABC):
    """Relative steps down a gradient.

    Args:
        parameters: What to train.
        schedule: How large each step is.
        shares: Of that, the part that each parameter takes; by default all take whole steps.
        heads: What each parameter consists of; by default each is one matrix.
        team: Processes that each have gradients of their own share of a step's text; steps follow the mean.

    Attributes:
        taken: Steps so far.
        optimisers: What steps; groups have the ``size`` that their steps are relative to.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        schedule: Schedule,
        shares: Sequence[float] | None = None,
        heads: Sequence[Heads] | None = None,
        team: Team = ALONE,
    ) -> None:
        self._team = team
        self.parameters = [p for p in parameters if p.numel()]
        self._heads = {} if heads is None else {id(p): each for p, each in zip(parameters, heads, strict=True)}
        self._schedule, self.taken = schedule, 0
        self.optimisers = self._optimisers()
        if shares is not None:
            share = {id(p): part for p, part in zip(parameters, shares, strict=True)}
            for group in (group for optimiser in self.optimisers for group in optimiser.param_groups):
                (parameter,) = group["params"]
                group["size"] *= share[id(parameter)]

    @abstractmethod
    def _optimisers(self) -> list[torch.optim.Optimizer]: ...

    @property
    def _summed(self) -> list[nn.Parameter]:
        """Parameters whose gradients an optimiser wants as those of all processes together."""
        return self.parameters

    def step(self, output: Tensor, gradient: Tensor | None = None) -> None:
        """One step down: ``output`` is a loss, or comes with the gradient of a loss by it."""
        self.gather(output, gradient)
        self.follow()

    def gather(self, output: Tensor, gradient: Tensor | None = None) -> None:
        """Add to the gradients that the next step follows; arguments as for :meth:`step`."""
        gradients = torch.autograd.grad(output, self.parameters, gradient)
        if self._team.size > 1:
            gradients = [found / self._team.size for found in gradients]
        for parameter, found in zip(self.parameters, gradients, strict=True):
            parameter.grad = found if parameter.grad is None else parameter.grad.add_(found)

    def follow(self) -> None:
        """One step down the gradients that the parameters have, which they have no longer then."""
        self._team.add_up([p.grad for p in self._summed if p.grad is not None])
        size = self._schedule.rate * self._schedule.factor(self.taken)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = size * group["size"]
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.taken += 1


class Adam(Descent):
    """Adam (Kingma and Ba, 2015): costs in proportion to what is trained, at any width."""

    def _optimisers(self) -> list[torch.optim.Optimizer]:
        groups = [_by_entries(p) for p in self.parameters]
        for group in groups:
            group["size"] *= self._schedule.adam
        return [torch.optim.Adam(groups, lr=0.0, betas=_BETAS, fused=True)]


class Muon(Descent):
    """Muon (Jordan et al., 2024) for matrices, those of each head by themselves; Adam for the few vectors."""

    @property
    def _summed(self) -> list[nn.Parameter]:
        # Those of a matrix go to the process that orthogonalises it, and nowhere else.
        return [p for p in self.parameters if p.ndim != 2]

    def _optimisers(self) -> list[torch.optim.Optimizer]:
        matrices = [_by_directions(p, self._heads.get(id(p), WHOLE)) for p in self.parameters if p.ndim == 2]
        vectors = [_by_entries(p) for p in self.parameters if p.ndim != 2]
        found: list[torch.optim.Optimizer] = []
        if matrices:
            found.append(_Orthogonal(matrices, self._heads, self._team))
        if vectors:
            found.append(torch.optim.Adam(vectors, lr=0.0, betas=(0.9, 0.95)))
        return found


class _Orthogonal(torch.optim.Optimizer):
    """Momentum (Nesterov), orthogonalised.

    ``torch.optim.Muon`` does the same, but in bfloat16 everywhere. Where that is emulated it takes a hundred times as
    long as float32, which is taken there instead. Several processes share the matrices of a step: each has the
    gradients and the momentum of some, orthogonalises those, and all take them from it.
    """

    def __init__(self, groups: list[dict], heads: Mapping[int, Heads], team: Team = ALONE) -> None:
        super().__init__(groups, {"lr": 0.0})
        # Not in the groups: those are kept on the disk, and heads are known from the model.
        self._heads, self._team = heads, team

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; gradients are there already, so that ``closure`` is not asked."""
        rated = [(p, group["lr"]) for group in self.param_groups for p in group["params"] if p.grad is not None]
        parameters = [parameter for parameter, _ in rated]
        heads = [self._heads.get(id(parameter), WHOLE) for parameter in parameters]
        if self._team.size == 1:
            steps = [_orthogonal(self._ahead(p, p.grad), each) for p, each in zip(parameters, heads, strict=True)]
        else:
            steps = self._shared(parameters, heads)
        for (parameter, rate), step in zip(rated, steps, strict=True):
            parameter.add_(step, alpha=-rate)

    def _ahead(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor:
        """The gradient with momentum; of a parameter, or of what a process has of it."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        return gradient.lerp(state["momentum_buffer"].lerp_(gradient, 1 - _MOMENTUM), _MOMENTUM)

    def _shared(self, parameters: Sequence[nn.Parameter], heads: Sequence[Heads]) -> list[Tensor]:
        """Steps of all, where every process makes a part and tells the others."""
        team, gradients = self._team, [p.grad for p in parameters if p.grad is not None]
        stacks = [each.stack(gradient) for gradient, each in zip(gradients, heads, strict=True)]
        parts = _parts(tuple((len(stack), stack.shape[1], stack.shape[2]) for stack in stacks), team.size)
        sizes = [sum(len(numbers) * stacks[at][0].numel() for at, numbers in some) for some in parts]
        flat = torch.cat([stacks[at][k].reshape(-1) for some in parts for at, numbers in some for k in numbers])
        mine, made = parts[team.rank], [torch.empty(0, device=flat.device, dtype=_dtype_of(flat))]
        for (at, _), gradient in zip(mine, _apart(team.collect(flat, sizes), mine, stacks), strict=True):
            made.append(_polar(self._ahead(parameters[at], gradient), torch.baddbmm).flatten())
        steps = [torch.empty(stack.shape, device=flat.device, dtype=_dtype_of(flat)) for stack in stacks]
        for some, told in zip(parts, team.exchange(torch.cat(made), sizes), strict=True):
            for (at, numbers), step in zip(some, _apart(told, some, stacks), strict=True):
                steps[at][numbers] = step
        return [each.join(stack) for stack, each in zip(steps, heads, strict=True)]


# Which matrices of which stacks, by their numbers.
_Part = list[tuple[int, list[int]]]


def _parts(shapes: tuple[tuple[int, int, int], ...], processes: int) -> list[_Part]:
    """What each process orthogonalises."""
    found: list[_Part] = [[] for _ in range(processes)]
    for at, owner_K in enumerate(_owners(shapes, processes)):
        for rank, some in enumerate(found):
            if numbers := [number for number, owner in enumerate(owner_K) if owner == rank]:
                some.append((at, numbers))
    return found


def _apart(flat: Tensor, part: _Part, stacks: Sequence[Tensor]) -> list[Tensor]:
    """The matrices of a part, ``[·, m, n]`` of each stack, that lie one after the other."""
    shapes = [(len(numbers), *stacks[at].shape[1:]) for at, numbers in part]
    return [one.view(shape) for one, shape in zip(flat.split([math.prod(s) for s in shapes]), shapes, strict=True)]


@lru_cache(maxsize=64)
def _owners(shapes: tuple[tuple[int, int, int], ...], processes: int) -> list[list[int]]:
    """Which process orthogonalises each matrix of each stack: the largest first, to whoever has least to do."""
    owners, load = [[0] * count for count, _, _ in shapes], [0] * processes
    units = [(_flop_of(m, n), at, number) for at, (count, m, n) in enumerate(shapes) for number in range(count)]
    for flop, at, number in sorted(units, key=lambda unit: (-unit[0], unit[1:])):
        owner = load.index(min(load))
        owners[at][number] = owner
        load[owner] += flop
    return owners


def _orthogonal(matrix: Tensor, heads: Heads) -> Tensor:
    """Nearly the orthogonal factors of polar decompositions: singular values between about 0.7 and 1.2."""
    if heads.count > 1:
        return heads.join(_polar(heads.stack(matrix), torch.baddbmm))
    return _polar(matrix, torch.addmm)


def _dtype_of(matrix: Tensor) -> torch.dtype:
    """The precision that matrices are orthogonalised in."""
    return torch.bfloat16 if multiplies_bfloat16(matrix.device.type) else torch.float32


def _polar(matrix: Tensor, multiply_add: Callable[..., Tensor]) -> Tensor:
    """Of one matrix, or of each in a stack."""
    a, b, c = _QUINTIC
    tall = matrix.shape[-2] > matrix.shape[-1]
    wide = matrix.mT if tall else matrix
    # Row by row: products of what lies otherwise take twice as long.
    wide = wide.to(_dtype_of(matrix)).contiguous()
    # The spectral norm is at most 1 from here on.
    wide = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=_SMALLEST_NORM)
    for _ in range(_ITERATIONS):
        gram = wide @ wide.mT
        wide = multiply_add(wide, multiply_add(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.mT if tall else wide


def descent(
    parameters: Sequence[nn.Parameter],
    schedule: Schedule,
    shares: Sequence[float] | None = None,
    heads: Sequence[Heads] | None = None,
    team: Team = ALONE,
) -> Descent:
    """Muon where orthogonalising costs little beside what a step multiplies, Adam elsewhere.

    Muon repairs more where much is to be repaired, and as much where little is.

    Args:
        parameters: What to train, each a factor in every token of a step.
        schedule: Its steps; of a team each process's share of them.
        shares, heads, team: As for :class:`Descent`.
    """
    of_each = [WHOLE] * len(parameters) if heads is None else heads
    stacks = [each.stack(p).shape for p, each in zip(parameters, of_each, strict=True) if p.ndim == 2]
    flop = orthogonalising([(k, m, n) for k, m, n in stacks], team.size * schedule.tokens)
    return (Adam if flop is None else Muon)(parameters, schedule, shares, heads, team)


def orthogonalising(shapes: Sequence[tuple[int, int, int]], tokens: int) -> int | None:
    """Multiplications and additions of a step of Muon, or ``None`` where Adam is taken instead.

    Args:
        shapes: Of the matrices, ``(K, m, n)``.
        tokens: Of a step, each multiplied with all of them.
    """
    flop = sum(count * _flop_of(m, n) for count, m, n in shapes)
    return flop if flop <= _SHARE * 6 * tokens * sum(map(math.prod, shapes)) else None


def _flop_of(m: int, n: int) -> int:
    """Multiplications and additions of orthogonalising a matrix."""
    m, n = sorted((m, n))
    return _ITERATIONS * (4 * m * m * n + 2 * m**3)


def _whole(parameter: nn.Parameter) -> Tensor:
    """One that is sharded is measured as a whole."""
    p = parameter.detach()
    return getattr(p, "full_tensor", lambda: p)()


def _by_entries(parameter: nn.Parameter) -> dict:
    return {"params": [parameter], "size": float(_whole(parameter).square().mean().sqrt())}


def _by_directions(parameter: nn.Parameter, heads: Heads) -> dict:
    stack_Kmn = heads.stack(_whole(parameter))
    directions = heads.count * min(stack_Kmn.shape[1:])
    return {"params": [parameter], "size": float(stack_Kmn.norm()) / directions**0.5}
