"""Sizes that an engine serves fast: ``convert --for``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from latentize.attention.spec import AttentionSpec, LatentSpec
from latentize.engines.contracts import Served, contract, machine_of, served, sizes_of, usual_cache
from latentize.methods.method import budget_of
from latentize.methods.registry import settings
from latentize.methods.setting import Setting
from latentize.recipe import Recipe

__all__ = ["Fit", "fit", "fitting_settings"]

# Sizes that are tried where a method's own are not served as well: of latents, of roped keys, and of un-roped keys and
# values once they are padded with zeros; and what the number of heads is made a multiple of.
_RANKS, _ROPES, _PADDED = range(16, 1025, 16), (32, 48, 64, 96, 128), (64, 96, 128, 192, 256)
_HEADS = (8, 16, 32, 64, 128)
# Times as many, at most: each costs what a real one costs, wherever it is attended.
_MORE_HEADS = 1.5

# Of the values that were asked for; what is further off is said.
_NEAR = 0.9


@dataclass(frozen=True)
class Fit:
    """How an engine serves some sizes.

    Attributes:
        where: As asked for.
        sizes: Of the model, padded.
        before: Heads, and un-roped and value dimensions of each, before they are.
        phases: What becomes of prefill and decode.
    """

    where: str
    sizes: LatentSpec
    before: tuple[int, int, int]
    phases: tuple[Served, ...]

    @property
    def standing(self) -> tuple[int, int]:
        """Phases that are refused, and that are slow: the fewer, the better."""
        return sum(p.refused is not None for p in self.phases), sum(not p.fast for p in self.phases)

    @property
    def padded(self) -> tuple[int, int, int]:
        """The same with zeros."""
        return self.sizes.num_heads, self.sizes.qk_nope_head_dim, self.sizes.v_head_dim

    @property
    def zeros(self) -> int:
        """Weights of a layer that are padded."""
        return self._weights(*self.padded) - self._weights(*self.before)

    def _weights(self, heads: int, nope: int, value: int) -> int:
        """Of queries, the up-projection and the output."""
        s = self.sizes
        return heads * ((nope + value) * (s.hidden_size + s.kv_lora_rank) + s.qk_rope_head_dim * s.hidden_size)

    def notes(self, budget: int | None) -> list[str]:
        """What a report says of it, where so many cached values were asked for, or ``None``, certain sizes."""
        engine, _, _ = self.where.partition("@")
        said, s = [], self.sizes
        for phase in self.phases:
            if phase.refused is not None or phase.backend is None:
                said.append(f"{phase.phase} is refused: {phase.refused}; kernels are for {' / '.join(phase.made_for)}")
            else:
                speed = "made for these sizes" if phase.fast else "made for any sizes, slower"
                said.append(f"{phase.phase} by {phase.backend.name}, {speed}")
        notes = [f"in {engine} {contract(engine).version} ({self.where}): " + "; ".join(said)]
        values = s.kv_lora_rank + s.qk_rope_head_dim
        if budget is not None and not _NEAR <= values / budget <= 1:
            notes.append(f"{values} cached values instead of {budget}: the nearest sizes that are served as well")
        if self.zeros:
            names = ("heads", "un-roped keys of each head", "values of each head")
            sizes = zip(names, self.before, self.padded, strict=True)
            padded = ", ".join(f"{name} from {old} to {new}" for name, old, new in sizes if new > old)
            notes.append(
                f"{padded}: padded with zeros, {self.zeros:,} more weights and multiplications a token in a "
                "layer, nothing in the cache"
            )
        return notes


def fit(recipe: Recipe, spec: AttentionSpec, rank: int, rope: int, tensor_parallel: int = 1) -> Fit:
    """How the engine of a recipe serves a latent and a roped key of these sizes, padded with as few zeros as serve it
    best; on so many ranks, which share the heads."""
    assert recipe.serve_on is not None
    engine, _, hardware = recipe.serve_on.partition("@")
    machine, own = machine_of(engine, hardware or None), (spec.num_heads, spec.head_dim, spec.head_dim)
    cache = recipe.cache_for or usual_cache(engine, recipe.dtype)
    plain = LatentSpec(spec.hidden_size, own[0], rank, rope, *own[1:], rope_heads=1, up_heads=own[0], softmax_scale=1.0)

    def made(heads: int, nope: int, value: int) -> Fit:
        sizes = replace(plain, num_heads=heads, up_heads=heads, qk_nope_head_dim=nope, v_head_dim=value)
        phases = served(engine, machine, sizes_of(sizes, tensor_parallel), cache=cache, dtype=recipe.dtype)
        return Fit(recipe.serve_on or "", sizes, own, tuple(phases))

    def best(heads: Iterable[int]) -> Fit:
        dims = (spec.head_dim, *(size for size in _PADDED if size > spec.head_dim))
        return min((made(*sizes) for sizes in product(heads, dims, dims)), key=lambda f: (f.standing, f.zeros))

    found = best(own[:1])
    if not any(found.standing):
        return found
    # Heads cost most, and few kernels count them.
    more = {-(-own[0] // step) * step for step in _HEADS if own[0] % step}
    several = sorted(heads for heads in more if heads % tensor_parallel == 0 and heads <= _MORE_HEADS * own[0])
    return min([found, *([best(several)] if several else [])], key=lambda f: (f.standing, f.zeros))


def fitting_settings(recipe: Recipe, spec: AttentionSpec) -> list[Setting]:
    """Settings that a recipe allows, of those its engine serves best; sizes nearest to the budget where it has others.

    Raises:
        OptionError: no such engine or machine, or no setting fits the budget.
    """
    allowed = settings(recipe, spec)
    ranked = [(fit(recipe, spec, s.kv_lora_rank, s.qk_rope_head_dim).standing, s) for s in allowed]
    best = min(rank for rank, _ in ranked)
    if recipe.sizes is None:
        budget = budget_of(recipe, spec)
        others = sorted(_grid(recipe, spec), key=lambda sizes: (abs(sum(sizes) - budget), -sizes[1]))
        found = min(((fit(recipe, spec, *sizes).standing, n, sizes) for n, sizes in enumerate(others)), default=None)
        if found is not None and found[0] < best:
            _, _, (rank, rope) = found
            sized = recipe.model_copy(update={"keep": None, "kv_lora_rank": rank, "qk_rope_head_dim": rope})
            return settings(sized, spec)
    return [setting for rank, setting in ranked if rank == best]


def _grid(recipe: Recipe, spec: AttentionSpec) -> Iterator[tuple[int, int]]:
    """Sizes that are smaller than the source's cache."""
    full, block = spec.cache_values, recipe.block
    for rank, rope in product(_RANKS, _ROPES):
        fits = rope <= full // 2 and rank <= min(full - rope, spec.hidden_size) and rank + rope < full
        if fits and rank % block == rope % block == 0:
            yield rank, rope
