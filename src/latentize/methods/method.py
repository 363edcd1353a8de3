"""What a method of conversion is: a way to split the keys, and a way to compress what lost its rotation.

A new one is a subclass of :class:`Method` in a file of its own, named in :mod:`latentize.methods.registry` and in
``recipe.Method``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import ClassVar

from torch import Tensor

from latentize.attention.grouped import AttentionWeights
from latentize.attention.spec import AttentionSpec
from latentize.errors import OptionError, UnsupportedModelError
from latentize.methods.low_rank import Factors
from latentize.methods.rope_split import RopeSplit
from latentize.methods.setting import Setting
from latentize.methods.statistics import CalibrationStats, Needed
from latentize.recipe import Recipe

__all__ = ["Method", "budget_of", "fractions_of_a_head", "normed_whole"]

# Sizes of the roped key that a published method tries, largest first.
_ROPE_SIZES = 3


class Method(ABC):
    """Grouped attention to latent attention, one layer at a time and in closed form.

    Attributes:
        name: As in ``--method``.
    """

    name: ClassVar[str]

    @abstractmethod
    def candidates(self, recipe: Recipe, spec: AttentionSpec) -> Iterable[Setting]:
        """Settings that a recipe allows for a layer.

        Raises:
            OptionError: explicit sizes are out of range.
            UnsupportedModelError: the method cannot treat this attention.
        """

    @abstractmethod
    def split(self, w: AttentionWeights, spec: AttentionSpec, stats: CalibrationStats, setting: Setting) -> RopeSplit:
        """Which part of the keys keeps its rotation; ``w`` is float64."""

    @abstractmethod
    def compress(self, k_CD: Tensor, v_ED: Tensor, stats: CalibrationStats, setting: Setting) -> Factors:
        """Un-roped key components and values, all heads stacked, by one latent."""

    def needs(self, setting: Setting, spec: AttentionSpec) -> Needed:
        """Statistics that it looks at beyond second moments: none."""
        return Needed()

    def settings(self, recipe: Recipe, spec: AttentionSpec) -> list[Setting]:
        """:meth:`candidates`, of which there is one at least.

        Raises:
            OptionError: no setting fits the budget, or explicit sizes are out of range.
            UnsupportedModelError: the method cannot treat this attention.
        """
        found = list(self.candidates(recipe, spec))
        if found:
            return found
        blocks = f", each in whole blocks of {recipe.block}," if recipe.block > 1 else ""
        raise OptionError(
            f"no split into latent and roped key{blocks} fits {budget_of(recipe, spec)} values per token and layer",
            code="LZ304",
            where="--keep",
            fix="keep more, or give --kv-lora-rank and --qk-rope-head-dim",
        )


def budget_of(recipe: Recipe, spec: AttentionSpec) -> int:
    """Cached values of a token in a layer, at most."""
    # A share like 1/8 of an odd size is rounded down; the epsilon forgives binary fractions.
    return math.floor(recipe.budget * spec.cache_values + 1e-9)


def fractions_of_a_head(recipe: Recipe, spec: AttentionSpec, rope_heads: int) -> Iterator[tuple[int, int]]:
    """``(kv_lora_rank, qk_rope_head_dim)`` that use the budget, roped keys of ``d``, ``d/2``, ``d/4``, … each.

    Args:
        recipe: Says how much to keep, or both sizes.
        spec: The layer.
        rope_heads: Roped keys that are cached.

    Raises:
        OptionError: LZ303, sizes that were given are out of range.
    """
    full = spec.cache_values
    if recipe.sizes is not None:
        rank, rope = recipe.sizes
        if rope > spec.head_dim or spec.head_dim % rope:
            raise OptionError(
                f"a roped key of {rope} does not divide heads of {spec.head_dim}",
                code="LZ303",
                where="--qk-rope-head-dim",
            )
        largest = min(full - rope_heads * rope, spec.hidden_size)
        if rank > largest:
            raise OptionError(
                f"a latent of {rank} is larger than all it is made from ({largest})",
                code="LZ303",
                where="--kv-lora-rank",
            )
        yield rank, rope
        return
    fitting = []
    rope = spec.head_dim
    while rope >= 2 and rope % 2 == 0:
        # Nothing that is linear in the hidden state has a higher rank than it.
        rank = min(budget_of(recipe, spec) - rope_heads * rope, spec.hidden_size)
        if rank >= 1:
            fitting.append((rank, rope))
        rope //= 2
    yield from fitting[:_ROPE_SIZES]


def normed_whole(found: list[Setting], spec: AttentionSpec, method: str) -> list[Setting]:
    """Those settings that leave keys whole where each head normalises them: compressed ones would not be exact.

    Raises:
        UnsupportedModelError: LZ210, there is none.
    """
    if not spec.qk_norm or not found:
        return found
    if spec.v_norm:
        raise UnsupportedModelError(
            f"'{method}' cannot compress values that are normalised per head",
            code="LZ210",
            where="config.json, model_type",
            fix="--method calibrated keeps their norms",
        )
    if spec.norm_after_rope:
        raise UnsupportedModelError(
            f"'{method}' has no place for norms of queries and keys after RoPE",
            code="LZ210",
            where="config.json, model_type",
            fix="--method calibrated keeps or fits them",
        )
    whole = spec.num_kv_heads * spec.head_dim
    found = [s for s in found if s.rope_heads * s.qk_rope_head_dim == whole and s.rope_heads == spec.num_kv_heads]
    if found:
        return found
    raise UnsupportedModelError(
        f"'{method}' cannot compress keys that are normalised per head (qk-norm)",
        code="LZ210",
        where="config.json, model_type",
        fix="--method calibrated keeps or fits the norms; mha2mla with --keep 100% is exact, and saves nothing",
    )
