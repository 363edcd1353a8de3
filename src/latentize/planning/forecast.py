"""What a conversion will take, from a model's description alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from latentize.conversion.effort import effort_of
from latentize.conversion.footprint import latent_footprint
from latentize.conversion.latent import format_of, sized_one_by_one
from latentize.conversion.limits import expected_peak
from latentize.conversion.texts import sequences_to_generate
from latentize.conversion.work import Rates, latent_work
from latentize.families import ModelSpec
from latentize.methods.registry import settings
from latentize.modeling.precision import Precision
from latentize.modeling.source import is_large
from latentize.planning.devices import Machine
from latentize.recipe import Recipe

__all__ = ["Forecast", "forecast", "published_rates"]

# Bytes of a stored number.
_STORED = 2
# Shares of what a vendor states for large products in 16 bits and for its memory that a conversion of layer after layer
# reaches, taken, not measured: in bfloat16, in float32, in float64, in attention, in copies.
_REACHED = (0.3, 0.1, 0.02, 0.15, 0.6)
# Bytes a second that a GPU hands to others, taken: in a node of eight a quarter of what NVLink 4 has in one direction,
# between nodes a quarter of 400 Gbit/s of InfiniBand for each GPU.
_NODE, _SENT, _SENT_BETWEEN = 8, 112e9, 12.5e9


@dataclass(frozen=True)
class Forecast:
    """A conversion that has not been done.

    Attributes:
        seconds: How long it takes.
        peak_bytes: The most memory that its process has; on a CPU.
        flop: Multiplications and additions.
        stages: Seconds of each.
    """

    seconds: float
    peak_bytes: int
    flop: float
    stages: dict[str, float]

    def describe(self) -> dict[str, Any]:
        """As ``latentize plan --json`` prints it."""
        return asdict(self)


class _AsPublished:
    """The tensors that a model's description names, 16 bits an entry."""

    def __init__(self, spec: ModelSpec) -> None:
        self._shapes = spec.tensor_shapes()

    def names(self) -> Iterator[str]:
        return iter(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def size(self, name: str) -> int:
        return _STORED * math.prod(self._shapes[name])


def forecast(spec: ModelSpec, recipe: Recipe, rates: Rates, *, faster: bool, processes: int = 1) -> Forecast:
    """Time and memory of a conversion.

    Args:
        spec: The model.
        recipe: What is to be done.
        rates: What the machine reaches.
        faster: Whether it multiplies bfloat16 faster than float32.
        processes: That share the conversion, each on a machine of its own, or a GPU.

    Raises:
        LatentizeError: the recipe is not possible for this model.
    """
    kind, candidates, _ = format_of(recipe, spec, settings(recipe, spec.attention))
    stored = _AsPublished(spec)
    large = is_large(sum(math.prod(stored.shape(name)) for name in stored.names()))
    effort = effort_of(recipe, spec, large=large)
    common: dict[str, Any] = {
        "written": sequences_to_generate(recipe, large=large) * recipe.sequence_length,
        "one_by_one": sized_one_by_one(kind, recipe),
        "precision": Precision(faster, large, recipe.hurries),
    }
    memory = latent_footprint(spec, stored, recipe, candidates, effort, item=_STORED, **common)
    work = latent_work(spec, recipe, candidates, effort, **common, processes=processes)
    stages = {stage: done.seconds(rates) for stage, done in work.items()}
    peak = expected_peak(memory, keeps_freed=not large)
    return Forecast(sum(stages.values()), peak, sum(done.flop for done in work.values()), stages)


def published_rates(machine: Machine, processes: int = 1) -> Rates:
    """What a machine may be expected to reach of what its vendor states.

    Args:
        machine: Its arithmetic is known.
        processes: On as many of them; sums over more than a node are as slow as what is between nodes.
    """
    assert machine.flops_per_second is not None
    narrow, wide, double, attended, copied = _REACHED
    flops = machine.flops_per_second
    moved = machine.bytes_per_second or flops
    sent = _SENT if processes <= _NODE else _SENT_BETWEEN
    return Rates(narrow * flops, wide * flops, double * flops, attended * flops, copied * moved, sent)
