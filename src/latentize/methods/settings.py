"""Every number that decides a conversion, and which of them a budget allows.

A setting is a method with all its numbers. A budget allows several; the pipeline tries them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from latentize.attention.spec import AttentionSpec
from latentize.errors import OptionError, UnsupportedModelError
from latentize.methods.statistics import Needed
from latentize.recipe import Recipe

__all__ = ["Setting", "pooled_heads", "settings"]

# Candidates under a budget: sizes of the roped key, largest first, and block sizes, smallest first.
_ROPE_SIZES = 3
_FREQFOLDS = 3
# Roped keys that the calibrated method tries, in units of a head, and how far apart rungs may lie.
_ROPE_SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0, 1.25, 1.5, 2.0)
_STRIDES = (1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)


@dataclass(frozen=True)
class Setting:
    """Everything that decides a layer's conversion, but its weights.

    Attributes:
        method: ``calibrated``, ``transmla``, ``mha2mla`` or ``care``.
        kv_lora_rank: Size of the latent.
        qk_rope_head_dim: Size of a roped key.
        rope_heads: Roped keys: one, or one a kv head.
        freqfold: ``transmla``, ``care``.
        selection, svd: ``mha2mla``.
        damping: ``care``.
        stride: ``calibrated``: rungs of the ladder lie this many of the source's apart. Without one, each layer keeps
            the frequencies that serve it best, which only the native format holds.
        linear: ``calibrated``: biases and per-head norms are replaced by the nearest linear projections.
    """

    method: str
    kv_lora_rank: int
    qk_rope_head_dim: int
    rope_heads: int = 1
    freqfold: int | None = None
    selection: str | None = None
    svd: str | None = None
    damping: float | None = None
    stride: float | None = None
    linear: bool = False

    @property
    def cache_values(self) -> int:
        return self.kv_lora_rank + self.rope_heads * self.qk_rope_head_dim

    def on_source_frequencies(self, spec: AttentionSpec) -> bool:
        """Whether all that rotates does so as something in the source did, up to biases and norms kept as they are."""
        whole = self.stride is None or (
            spec.rope.is_plain
            and float(self.stride).is_integer()
            and self.stride * self.qk_rope_head_dim <= spec.rope.rotary_dim
        )
        return whole and self.linear == spec.qk_norm

    def needs(self, spec: AttentionSpec) -> Needed:
        """Statistics that the method looks at."""
        calibrated = self.method == "calibrated"
        return Needed(
            norms=self.selection == "2-norm", distances=calibrated, cross=calibrated and self.linear and spec.qk_norm
        )

    def rope_theta(self, spec: AttentionSpec) -> float:
        """Base of the ladder that rotates the shared key, ``θ^(σ R / d)``, where ``d`` of a head rotate."""
        if self.stride is None:
            return spec.rope.theta
        return spec.rope.theta ** (self.stride * self.qk_rope_head_dim / spec.rope.rotary_dim)

    def approximations(self, spec: AttentionSpec) -> list[str]:
        """What of the source was replaced by the nearest that the format holds, before anything was compressed."""
        found = []
        if self.linear and spec.qk_norm:
            found.append("normalisation of queries and keys is replaced by its best linear fit (approximate)")
        if self.linear and (spec.qkv_bias or spec.o_bias):
            found.append("biases are replaced by their best linear fit (approximate)")
        if self.stride is not None and not spec.rope.is_plain:
            found.append(f"'{spec.rope.rope_type}' RoPE is replaced by the nearest plain ladder (approximate)")
        return found

    def describe(self) -> dict[str, Any]:
        """The entries that mean something for this method."""
        return {k: v for k, v in asdict(self).items() if v is not None and v is not False}


def settings(recipe: Recipe, spec: AttentionSpec) -> list[Setting]:
    """All settings that a recipe allows for a layer; more than one where something is left open.

    Raises:
        OptionError: no setting fits the budget, or explicit sizes are out of range.
        UnsupportedModelError: the method cannot treat this attention.
    """
    if recipe.kv_lora_rank is not None and recipe.sizes is None:
        raise OptionError(
            "kv_lora_rank and qk_rope_head_dim belong together",
            where="--kv-lora-rank",
            fix="give --qk-rope-head-dim, too; only a model that has latent attention already keeps its own",
        )
    if recipe.method == "calibrated":
        return _calibrated(recipe, spec)
    found = list(_mha2mla(recipe, spec) if recipe.method == "mha2mla" else _shared_key(recipe, spec))
    if not spec.rotates_whole and recipe.method in ("transmla", "care"):
        raise UnsupportedModelError(
            f"'{recipe.method}' takes RoPE to cover whole heads",
            code="LZ209",
            where="config.json, partial_rotary_factor",
            fix="use --method calibrated",
        )
    if not found and recipe.freqfold is not None:
        raise OptionError(
            f"blocks of {recipe.freqfold} frequencies fit no roped key of this budget",
            code="LZ304",
            where="--freqfold",
            fix=f"it should divide {spec.head_dim // 2} and be a multiple of head size / roped key size",
        )
    if not found:
        raise OptionError(
            f"no split into latent and roped key fits {_budget(recipe, spec)} values per token and layer",
            code="LZ304",
            where="--keep",
            fix="keep more, or give --kv-lora-rank and --qk-rope-head-dim",
        )
    if spec.qk_norm:
        # A normalised key is exact only where no part of it is compressed.
        whole = spec.num_kv_heads * spec.head_dim
        found = [s for s in found if s.rope_heads * s.qk_rope_head_dim == whole and s.rope_heads == spec.num_kv_heads]
    if not found:
        raise UnsupportedModelError(
            f"'{recipe.method}' cannot compress keys that are normalised per head (qk-norm)",
            code="LZ210",
            where="config.json, model_type",
            fix="only --method mha2mla --keep 100% (exact, nothing saved) treats such a model yet",
        )
    return found


def _budget(recipe: Recipe, spec: AttentionSpec) -> int:
    # A share like 1/8 of an odd size is rounded down; the epsilon forgives binary fractions.
    return math.floor(recipe.budget * spec.cache_values + 1e-9)


def _sizes(recipe: Recipe, spec: AttentionSpec, rope_heads: int) -> Iterator[tuple[int, int]]:
    """``(kv_lora_rank, qk_rope_head_dim)`` that use the budget, roped keys of ``d``, ``d/2``, ``d/4``, … each."""
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
        rank = min(_budget(recipe, spec) - rope_heads * rope, spec.hidden_size)
        if rank >= 1:
            fitting.append((rank, rope))
        rope //= 2
    yield from fitting[:_ROPE_SIZES]


def _mha2mla(recipe: Recipe, spec: AttentionSpec) -> Iterator[Setting]:
    for rank, rope in _sizes(recipe, spec, spec.num_kv_heads):
        if recipe.selection == "uniform" and (spec.head_dim // 2) % (spec.head_dim // rope):
            continue
        if recipe.svd == "split" and rank < 2 and rope < spec.head_dim:
            continue
        yield Setting("mha2mla", rank, rope, spec.num_kv_heads, selection=recipe.selection, svd=recipe.svd)


def _shared_key(recipe: Recipe, spec: AttentionSpec) -> Iterator[Setting]:
    """RoRoPE settings: block sizes are multiples of ``collapse`` that divide the pairs (TransMLA's own search)."""
    pairs = spec.head_dim // 2
    damping = recipe.damping if recipe.method == "care" else None
    for rank, rope in _sizes(recipe, spec, rope_heads=1):
        collapse = spec.head_dim // rope
        folds = [collapse << n for n in range(pairs.bit_length()) if pairs % (collapse << n) == 0]
        folds = folds[:_FREQFOLDS] if recipe.freqfold is None else [f for f in folds if f == recipe.freqfold]
        for fold in folds:
            yield Setting(recipe.method, rank, rope, freqfold=fold, damping=damping)


def _calibrated(recipe: Recipe, spec: AttentionSpec) -> list[Setting]:
    """Ladders for formats with one base for all layers; free frequencies for the others.

    Raises:
        OptionError: no split fits the budget, or explicit sizes are out of range.
    """
    not_linear = spec.qkv_bias or spec.o_bias or spec.qk_norm
    found = []
    for rank, rope in _calibrated_sizes(recipe, spec):
        # A roped key larger than a head's has rungs between the source's frequencies.
        widest = spec.rope.rotary_dim / rope
        for stride in (*(s for s in _STRIDES if s < widest), widest):
            found.append(Setting("calibrated", rank, rope, stride=stride, linear=not_linear))
        found.append(Setting("calibrated", rank, rope, linear=spec.qk_norm))
        # Where every layer may choose, an even choice is one, and refinement often makes more of it.
        even = Setting("calibrated", rank, rope, stride=widest, linear=spec.qk_norm)
        if even not in found and even.on_source_frequencies(spec):
            found.append(even)
    if not found:
        raise OptionError(
            f"no split into latent and roped key fits {_budget(recipe, spec)} values per token and layer",
            code="LZ304",
            where="--keep",
            fix="keep more, or give --kv-lora-rank and --qk-rope-head-dim",
        )
    return found


def _calibrated_sizes(recipe: Recipe, spec: AttentionSpec) -> Iterator[tuple[int, int]]:
    """``(kv_lora_rank, qk_rope_head_dim)``: at least half of the budget is latent where anything is compressed."""
    full, hidden = spec.cache_values, spec.hidden_size
    if recipe.sizes is not None:
        rank, rope = recipe.sizes
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
    budget = _budget(recipe, spec)
    tried = set()
    for share in _ROPE_SHARES:
        rope = max(2, 2 * round(share * spec.rope.rotary_dim / 2))
        rank = min(budget - rope, full - rope, hidden)
        # Between an eighth and a half of what is kept; but all that rotates of a head may be enough.
        wide = 8 * rope >= min(budget, 8 * spec.rope.rotary_dim)
        if rank >= max(1, rope) and wide and rope not in tried:
            tried.add(rope)
            yield rank, rope
    if not tried and budget >= 4:
        rope = 2 * max(1, budget // 8)
        yield min(budget - rope, hidden), rope


def pooled_heads(recipe: Recipe, spec: AttentionSpec) -> int:
    """kv heads for ``--to gqa`` or ``mqa`` within the budget.

    Raises:
        OptionError: pooling whole heads cannot reach the budget, or nothing would change.
    """
    if recipe.to == "mqa":
        heads = 1
    else:
        fitting = [g for g in range(1, spec.num_kv_heads) if spec.num_kv_heads % g == 0]
        fitting = [g for g in fitting if g / spec.num_kv_heads <= recipe.budget + 1e-9]
        heads = max(fitting, default=0)
    if recipe.keep is not None and heads and heads / spec.num_kv_heads > recipe.keep + 1e-9:
        heads = 0
    if heads == 0 or heads == spec.num_kv_heads:
        raise OptionError(
            f"pooling {spec.num_kv_heads} kv heads cannot give {recipe.budget:.1%} of the cache",
            code="LZ304",
            where=f"--to {recipe.to} --keep",
            fix=f"the least that heads can be pooled to is {1 / spec.num_kv_heads:.1%}; latent attention goes lower",
        )
    return heads
