"""latentize's own method: position-aware choice of what rotates, balanced PCA for the rest; made to be refined.

The mathematics of the choice is in :mod:`latentize.methods.position`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from latentize.attention.grouped import AttentionWeights
from latentize.attention.spec import AttentionSpec
from latentize.errors import OptionError
from latentize.methods.low_rank import Factors
from latentize.methods.method import Method, budget_of
from latentize.methods.mha2mla import split_per_head
from latentize.methods.norms import linear_heads
from latentize.methods.position import (
    Components,
    costliest,
    dropping_cost,
    key_components,
    ladder,
    on_ladder,
    position_aware_split,
    rope_cost,
    unrotated_split,
)
from latentize.methods.rope_split import RopeSplit
from latentize.methods.setting import Setting
from latentize.methods.statistics import CalibrationStats, Needed
from latentize.methods.transmla import balanced_pca
from latentize.recipe import Recipe

__all__ = ["Calibrated", "ladder_costs"]

# Roped keys that the calibrated method tries, in units of a head, and how far apart rungs may lie.
_ROPE_SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0, 1.25, 1.5, 2.0)
_STRIDES = (1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)


class Calibrated(Method):
    """One shared roped key of what is the most expensive to stop rotating, on a ladder or at each layer's own."""

    name = "calibrated"

    def candidates(self, recipe: Recipe, spec: AttentionSpec) -> Iterator[Setting]:
        """Ladders for formats with one base for all layers; free frequencies for the others.

        Raises:
            OptionError: rows in codes, of a model whose rows cannot be coded.
        """
        if recipe.bytes is not None:
            spec.require_codes()
        if recipe.whole:
            keys, values = spec.num_kv_heads, spec.num_kv_heads * spec.head_dim
            yield Setting(self.name, min(values, spec.hidden_size), spec.head_dim, keys, whole=True)
            return
        not_linear = spec.qkv_bias or spec.o_bias or spec.qk_norm
        for rank, rope in _sizes(recipe, spec):
            # A roped key larger than a head's has rungs between the source's frequencies.
            widest = spec.rope.rotary_dim / rope
            strides = (*(s for s in _STRIDES if s < widest), widest) if spec.rotates else ()
            found = [Setting(self.name, rank, rope, stride=stride, linear=not_linear) for stride in strides]
            free = _with_norms(Setting(self.name, rank, rope, linear=spec.qk_norm), recipe, spec)
            found.append(free)
            # Where every layer may choose, an even choice is one, and refinement often makes more of it.
            even = replace(free, stride=widest)
            if found[1:] and even not in found and even.on_source_frequencies(spec):
                found.append(even)
            yield from found

    def needs(self, setting: Setting, spec: AttentionSpec) -> Needed:
        if setting.whole:
            return Needed()
        return Needed(distances=True, cross=spec.qk_norm)

    def split(self, w: AttentionWeights, spec: AttentionSpec, stats: CalibrationStats, setting: Setting) -> RopeSplit:
        if setting.whole:
            return split_per_head(w, spec, torch.arange(spec.head_dim // 2).expand(spec.num_kv_heads, -1))
        if setting.stride is not None and not spec.rotates:
            # A ladder that all layers share would turn what should not turn: its key stays empty here.
            rungs_J = ladder(spec.rope.theta, spec.rope.rotary_dim, setting.qk_rope_head_dim, setting.stride)
            return unrotated_split(w, rungs_J)
        components = key_components(w, spec, stats)
        at_J2, rungs_J = _rungs(setting, spec, components)
        split = position_aware_split(w, spec, components, at_J2, rungs_J)
        return replace(split, rope_cost_F=_per_head(spec) * dropping_cost(components).sum(1))

    def compress(self, k_CD: Tensor, v_ED: Tensor, stats: CalibrationStats, setting: Setting) -> Factors:
        return balanced_pca(k_CD, v_ED, stats, setting.kv_lora_rank)


def _with_norms(setting: Setting, recipe: Recipe, spec: AttentionSpec) -> Setting:
    """The same with the norms of keys kept, where there are any that can be: their factors are cached, too.

    A bias of an un-roped key would be no longer the same for all keys, and rows in codes have no factors.
    """
    if not spec.qk_norm or spec.qkv_bias or recipe.bytes is not None:
        return setting
    rank, rope, block = setting.kv_lora_rank, setting.qk_rope_head_dim, recipe.block
    if recipe.sizes is None:
        rank = min(rank, (budget_of(recipe, spec) - rope - spec.key_norms) // block * block)
    return replace(setting, kv_lora_rank=rank, linear=False, key_scales=spec.key_norms) if rank > 0 else setting


def _sizes(recipe: Recipe, spec: AttentionSpec) -> Iterator[tuple[int, int]]:
    """``(kv_lora_rank, qk_rope_head_dim)``: at least half of the budget is latent where anything is compressed."""
    full, hidden, block = spec.cache_values, spec.hidden_size, recipe.block
    if recipe.sizes is not None:
        rank, rope = recipe.sizes
        if rank % block or rope % block:
            raise OptionError(
                f"{rank} + {rope} values are no whole blocks of {block}, which '{recipe.cache_for}' rounds together",
                code="LZ303",
                where="--kv-lora-rank",
                fix=f"multiples of {block}",
            )
        if rope > full // 2:
            raise OptionError(
                f"the keys have {full // 2} values, fewer than {rope}", code="LZ303", where="--qk-rope-head-dim"
            )
        if rank > min(full - rope, hidden):
            raise OptionError(
                f"a latent of {rank} is larger than all it is made from ({min(full - rope, hidden)})",
                code="LZ303",
                where="--kv-lora-rank",
            )
        yield rank, rope
        return
    budget = budget_of(recipe, spec)
    if not spec.rotates:
        # Of keys that do not turn the latent holds all that is worth it; the smallest that are apart are left.
        rope = max(2, block)
        yield min(budget - rope, full - rope, hidden) // block * block, rope
        return
    tried = set()
    for share in _ROPE_SHARES:
        rope = max(2, 2 * round(share * spec.rope.rotary_dim / 2))
        rope = rope if block == 1 else block * max(1, round(rope / block))
        rank = min(budget - rope, full - rope, hidden) // block * block
        # Between an eighth and a half of what is kept; but all that rotates of a head may be enough.
        wide = 8 * rope >= min(budget, 8 * spec.rope.rotary_dim)
        if rank >= max(1, rope) and wide and rope not in tried:
            tried.add(rope)
            yield rank, rope
    if not tried and budget >= 4 and block == 1:
        rope = 2 * max(1, budget // 8)
        yield min(budget - rope, hidden), rope


def _per_head(spec: AttentionSpec) -> float:
    """From energies of all heads' products of queries and keys to a head's mean squared logit."""
    return spec.softmax_scale**2 / spec.num_heads


def ladder_costs(
    w: AttentionWeights, spec: AttentionSpec, stats: CalibrationStats, candidates: list[Setting]
) -> list[float]:
    """Mean squared error of a head's logits that each candidate's choice of roped components leaves.

    Args:
        w: The layer.
        spec: Its description.
        stats: Statistics of its inputs.
        candidates: Of the calibrated method.
    """
    w = linear_heads(w.to(torch.float64), stats, candidates[0])
    components = key_components(w, spec, stats)
    if not spec.rotates:
        return [0.0] * len(candidates)
    return [_per_head(spec) * rope_cost(components, _rungs(setting, spec, components)[1]) for setting in candidates]


def _rungs(setting: Setting, spec: AttentionSpec, components: Components) -> tuple[Tensor, Tensor]:
    """What rotates, and at which frequencies."""
    size = setting.qk_rope_head_dim
    if setting.stride is None:
        return costliest(components, size // 2)
    rungs_J = ladder(spec.rope.theta, spec.rope.rotary_dim, size, setting.stride)
    return on_ladder(components, rungs_J.to(components.frequencies_F.device))
