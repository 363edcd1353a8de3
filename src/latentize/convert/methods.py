"""From the weights of a grouped-attention layer to those of a latent one.

A method is a way to split the keys (:mod:`rope_split`) and a way to compress what lost its rotation
(:mod:`low_rank`). A setting is a method with all its numbers; a budget allows several, and the pipeline tries them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from latentize.attention.grouped import AttentionWeights
from latentize.attention.latent import LatentWeights
from latentize.calibrate.stats import CalibrationStats, Needed
from latentize.convert.low_rank import Factors, balanced_pca, joint_svd, split_svd, whitened_svd
from latentize.convert.position import (
    Components,
    dearest,
    dropping_cost,
    key_components,
    ladder,
    linearised,
    on_ladder,
    position_aware_split,
    rope_cost,
)
from latentize.convert.rope_split import RopeSplit, rorope, select_pairs, split_per_head
from latentize.errors import OptionError, UnsupportedModelError
from latentize.recipe import Recipe
from latentize.spec import AttentionSpec

__all__ = [
    "Conversion",
    "Setting",
    "conversion",
    "convert_layer",
    "ladder_costs",
    "linear_fit",
    "pooled_heads",
    "settings",
]

# Candidates under a budget: sizes of the roped key, largest first, and block sizes, smallest first.
_ROPE_SIZES = 3
_FREQFOLDS = 3
# Roped keys that the calibrated method tries, in units of a head, and how far apart rungs may lie.
_ROPE_SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0)
_STRIDES = (1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)
# Points of a spectrum that a report shows.
_SHOWN = 64


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
        whole = self.stride is None or (spec.rope.is_plain and float(self.stride).is_integer())
        return whole and self.linear == spec.qk_norm

    def needs(self, spec: AttentionSpec) -> Needed:
        """Statistics that the method looks at."""
        calibrated = self.method == "calibrated"
        return Needed(
            norms=self.selection == "2-norm", distances=calibrated, cross=calibrated and self.linear and spec.qk_norm
        )

    def rope_theta(self, spec: AttentionSpec) -> float:
        """Base of the ladder that rotates the shared key, ``θ^(σ R / d)``."""
        if self.stride is None:
            return spec.rope.theta
        return spec.rope.theta ** (self.stride * self.qk_rope_head_dim / spec.head_dim)

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
    if recipe.method == "calibrated":
        return _calibrated(recipe, spec)
    found = list(_mha2mla(recipe, spec) if recipe.method == "mha2mla" else _shared_key(recipe, spec))
    if not found and recipe.freqfold is not None:
        raise OptionError(
            f"blocks of {recipe.freqfold} frequencies fit no roped key of this budget",
            where="--freqfold",
            fix=f"it should divide {spec.head_dim // 2} and be a multiple of head size / roped key size",
        )
    if not found:
        raise OptionError(
            f"no split into latent and roped key fits {_budget(recipe, spec)} values per token and layer",
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
                f"a roped key of {rope} does not divide heads of {spec.head_dim}", where="--qk-rope-head-dim"
            )
        largest = min(full - rope_heads * rope, spec.hidden_size)
        if rank > largest:
            raise OptionError(
                f"a latent of {rank} is larger than all it is made from ({largest})",
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
        widest = max(1.0, spec.head_dim / rope)
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
            raise OptionError(f"the keys have {full // 2} values, fewer than {rope}", where="--qk-rope-head-dim")
        if rank > min(full - rope, hidden):
            raise OptionError(
                f"a latent of {rank} is larger than all it is made from ({min(full - rope, hidden)})",
                where="--kv-lora-rank",
            )
        yield rank, rope
        return
    budget = _budget(recipe, spec)
    tried = set()
    for share in _ROPE_SHARES:
        rope = max(2, 2 * round(share * spec.head_dim / 2))
        rank = min(budget - rope, full - rope, hidden)
        # Between an eighth and a half of what is kept; but a whole head is enough.
        wide = 8 * rope >= min(budget, 8 * spec.head_dim)
        if rank >= max(1, rope) and wide and rope not in tried:
            tried.add(rope)
            yield rank, rope
    if not tried and budget >= 4:
        rope = 2 * max(1, budget // 8)
        yield min(budget - rope, hidden), rope


@dataclass(frozen=True)
class Conversion:
    """A layer in closed form.

    Attributes:
        weights: float64. With nothing dropped and nothing compressed they compute what the source does.
        kept_pairs: Frequencies of the source that keep rotating, by number, fastest first; one entry a roped pair.
        rope_cost_F: Mean squared error of a head's logits if all components of a frequency lost their rotation;
            where distances were measured.
        energy_o: Of every direction that the latent could have, the kept ones first.
    """

    weights: LatentWeights
    kept_pairs: tuple[int, ...]
    rope_cost_F: Tensor | None
    energy_o: Tensor

    def describe(self) -> dict[str, Any]:
        """What a report shows of it, as plain values.

        ``spectrum`` is ``[number, share of all energy]`` of some directions, ``latent_energy`` the share kept.
        """
        share_o = self.energy_o / self.energy_o.sum().clamp_min(1e-300)
        rank = len(self.weights.kv_a_rD)
        some = range(0, len(share_o), -(-len(share_o) // _SHOWN))
        entries: dict[str, Any] = {
            "rope_kept": list(self.kept_pairs),
            "latent_energy": _rounded(float(share_o[:rank].sum())),
            "spectrum": [[i + 1, _rounded(float(share_o[i]))] for i in some],
        }
        if self.rope_cost_F is not None:
            entries["rope_cost"] = [_rounded(cost) for cost in self.rope_cost_F.tolist()]
        return entries


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def convert_layer(w: AttentionWeights, spec: AttentionSpec, stats: CalibrationStats, setting: Setting) -> LatentWeights:
    """The weights of :func:`conversion`."""
    return conversion(w, spec, stats, setting).weights


def conversion(w: AttentionWeights, spec: AttentionSpec, stats: CalibrationStats, setting: Setting) -> Conversion:
    """Convert one layer.

    Args:
        w: Its weights; factorised in float64 whatever they come in.
        spec: Its description.
        stats: Statistics of its inputs.
        setting: What to do.
    """
    w = w.to(torch.float64)
    if setting.linear:
        w = linearised(w, stats)
    split, components = _split(w, spec, stats, setting)
    v_ED = w.v_GdD.flatten(0, 1)
    factors = _compress(split, v_ED, stats, setting)
    o_bias = w.o_bias_D
    if w.v_bias_Gd is not None:
        # Probabilities sum to one: a constant on the values is a constant on the output.
        v_bias_Hd = w.v_bias_Gd.repeat_interleave(spec.group_size, dim=0)
        constant = torch.einsum("DHd,Hd->D", w.o_DHd, v_bias_Hd)
        o_bias = constant if o_bias is None else o_bias + constant
    weights = LatentWeights(
        q_nope_HND=split.q_nope_HND,
        q_rope_HRD=split.q_rope_HRD,
        kv_a_rD=factors.down_rD,
        k_rope_PRD=split.k_rope_PRD,
        k_up_UNr=split.read_UNC @ factors.k_up_Cr,
        v_up_UVr=factors.v_up_Er.unflatten(0, (spec.num_kv_heads, spec.head_dim)),
        o_DHV=w.o_DHd,
        frequencies_PF=split.frequencies_PF,
        softmax_scale=spec.softmax_scale,
        q_nope_bias_HN=split.q_nope_bias_HN,
        q_rope_bias_HR=split.q_rope_bias_HR,
        k_rope_bias_PR=split.k_rope_bias_PR,
        o_bias_D=o_bias,
        q_norm_R=w.q_norm_d,
        k_norm_R=w.k_norm_d,
        norm_eps=spec.norm_eps,
    )
    cost_F = None if components is None else _per_head(spec) * dropping_cost(components).sum(1)
    return Conversion(weights, split.kept_pairs, cost_F, factors.energy_o)


def _per_head(spec: AttentionSpec) -> float:
    """From energies of all heads' products of queries and keys to a head's mean squared logit."""
    return spec.softmax_scale**2 / spec.num_heads


def linear_fit(w: AttentionWeights, spec: AttentionSpec, stats: CalibrationStats) -> LatentWeights:
    """The layer without biases and per-head norms, and otherwise as it was: every key roped, no value compressed."""
    values = spec.num_kv_heads * spec.head_dim
    whole = Setting("mha2mla", min(values, spec.hidden_size), spec.head_dim, spec.num_kv_heads, selection="high")
    return convert_layer(linearised(w.to(torch.float64), stats), spec, stats, whole)


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
    w = w.to(torch.float64)
    if candidates[0].linear:
        w = linearised(w, stats)
    components = key_components(w, spec, stats)
    return [_per_head(spec) * rope_cost(components, _rungs(setting, spec, components)[1]) for setting in candidates]


def _rungs(setting: Setting, spec: AttentionSpec, components: Components) -> tuple[Tensor, Tensor]:
    """What rotates, and at which frequencies."""
    size = setting.qk_rope_head_dim
    if setting.stride is None:
        return dearest(components, size // 2)
    rungs_J = ladder(spec.rope.theta, spec.head_dim, size, setting.stride)
    return on_ladder(components, rungs_J.to(components.frequencies_F.device))


def _split(
    w: AttentionWeights, spec: AttentionSpec, stats: CalibrationStats, setting: Setting
) -> tuple[RopeSplit, Components | None]:
    """The keys, split, and the components that this was decided on, where there are some."""
    if setting.method == "calibrated":
        components = key_components(w, spec, stats)
        at_J2, rungs_J = _rungs(setting, spec, components)
        return position_aware_split(w, spec, components, at_J2, rungs_J), components
    if setting.method == "mha2mla":
        pairs = select_pairs(setting.selection or "2-norm", spec, setting.qk_rope_head_dim, stats)  # type: ignore[arg-type]
        return split_per_head(w, spec, pairs), None
    assert setting.freqfold is not None
    return rorope(w, spec, stats, rope_dim=setting.qk_rope_head_dim, freqfold=setting.freqfold), None


def _compress(split: RopeSplit, v_ED: torch.Tensor, stats: CalibrationStats, setting: Setting) -> Factors:
    k_CD, rank = split.k_nope_CD, setting.kv_lora_rank
    if setting.method in ("calibrated", "transmla"):
        return balanced_pca(k_CD, v_ED, stats, rank)
    if setting.method == "care":
        return whitened_svd(k_CD, v_ED, stats, rank, damping=setting.damping or 0.0)
    return split_svd(k_CD, v_ED, rank) if setting.svd == "split" else joint_svd(k_CD, v_ED, rank)


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
            where=f"--to {recipe.to} --keep",
            fix=f"the least that heads can be pooled to is {1 / spec.num_kv_heads:.1%}; latent attention goes lower",
        )
    return heads
