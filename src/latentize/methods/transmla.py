"""TransMLA (arXiv 2502.07864): RoRoPE with folded frequencies into one shared roped key, balanced PCA for the rest.

D hidden, H query heads, G kv heads, s = H / G, d head size, C un-roped components of all kv heads together,
N un-roped query size, P roped keys, R size of a roped key, F = R / 2 pairs, U = G readers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from latentize.attention.grouped import AttentionWeights
from latentize.attention.spec import AttentionSpec
from latentize.errors import OptionError, UnsupportedModelError
from latentize.methods.linalg import eigh
from latentize.methods.low_rank import Factors
from latentize.methods.method import Method, fractions_of_a_head, normed_whole
from latentize.methods.rope_split import RopeSplit
from latentize.methods.setting import Setting
from latentize.methods.statistics import CalibrationStats
from latentize.recipe import Recipe

__all__ = ["TransMla", "balanced_pca", "key_balance", "rorope"]

# Block sizes that are tried, smallest first.
_FREQFOLDS = 3
# A mean norm, relative to that of the other side, which is no more than rounding.
_NOTHING = 1e-12


class TransMla(Method):
    """One shared roped key by RoRoPE; principal components of keys and values, brought to one scale."""

    name = "transmla"

    def candidates(self, recipe: Recipe, spec: AttentionSpec) -> list[Setting]:
        found = list(self._folded(recipe, spec))
        if not spec.rotates_whole:
            raise UnsupportedModelError(
                f"'{self.name}' takes RoPE to cover whole heads",
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
        return normed_whole(found, spec, self.name)

    def _folded(self, recipe: Recipe, spec: AttentionSpec) -> Iterator[Setting]:
        """Block sizes are multiples of ``collapse`` that divide the pairs (TransMLA's own search)."""
        pairs = spec.head_dim // 2
        for rank, rope in fractions_of_a_head(recipe, spec, rope_heads=1):
            collapse = spec.head_dim // rope
            folds = [collapse << n for n in range(pairs.bit_length()) if pairs % (collapse << n) == 0]
            folds = folds[:_FREQFOLDS] if recipe.freqfold is None else [f for f in folds if f == recipe.freqfold]
            for fold in folds:
                yield Setting(self.name, rank, rope, freqfold=fold, damping=self._damping(recipe))

    def _damping(self, recipe: Recipe) -> float | None:
        return None

    def split(self, w: AttentionWeights, spec: AttentionSpec, stats: CalibrationStats, setting: Setting) -> RopeSplit:
        assert setting.freqfold is not None
        return rorope(w, spec, stats, rope_dim=setting.qk_rope_head_dim, freqfold=setting.freqfold)

    def compress(self, k_CD: Tensor, v_ED: Tensor, stats: CalibrationStats, setting: Setting) -> Factors:
        return balanced_pca(k_CD, v_ED, stats, setting.kv_lora_rank)


def rorope(
    w: AttentionWeights, spec: AttentionSpec, stats: CalibrationStats, *, rope_dim: int, freqfold: int
) -> RopeSplit:
    """RoRoPE with frequency folding: one shared roped key (TransMLA, arXiv 2502.07864, section 4.2).

    Each block of ``freqfold`` neighbouring frequencies of all kv heads is rotated onto the principal axes of its
    keys, real and imaginary parts alike, so that few components carry most of it. With ``collapse = d / R``, the
    leading ``freqfold / collapse`` components of a block keep RoPE, at every ``collapse``-th frequency; the rest lose
    it. The rotation leaves logits alone where a block has one frequency; folding treats neighbours as equal.

    Args:
        w: The layer's weights, float64.
        spec: The layer.
        stats: Second moments of its inputs.
        rope_dim: Size ``R`` of the shared key, a divisor of ``d``.
        freqfold: Frequencies in a block: a multiple of ``d / R`` that divides ``d / 2``.

    Raises:
        ValueError: ``rope_dim`` or ``freqfold`` do not divide as they should.
    """
    G, s, d = spec.num_kv_heads, spec.group_size, spec.head_dim
    collapse, pairs = d // rope_dim, d // 2
    if d % rope_dim or freqfold % collapse or pairs % freqfold:
        raise ValueError(f"rope_dim {rope_dim} and freqfold {freqfold} do not fit a head of {d}")
    blocks, keep = pairs // freqfold, freqfold // collapse
    # Channels of block b: (kv head, frequency in the block), as rows; 2 for real and imaginary part.
    k_2bcD = w.k_GdD.view(G, 2, blocks, freqfold, -1).permute(1, 2, 0, 3, 4).flatten(2, 3)
    k_bias_2bc = None
    if w.k_bias_Gd is not None:
        k_bias_2bc = w.k_bias_Gd.view(G, 2, blocks, freqfold).permute(1, 2, 0, 3).flatten(2, 3)
    moment_bcc = stats.moment_of(k_2bcD, k_bias_2bc).sum(0)
    axes_bcj = eigh(moment_bcc)[1]
    turned_2bjD = axes_bcj.mT @ k_2bcD
    leading = torch.arange(freqfold * G, device=w.k_GdD.device) < keep
    # (rung, part) order of the shared key: rung = block, component; halves are the two parts.
    k_rope_RD = turned_2bjD[:, :, leading].flatten(1, 2).flatten(0, 1)
    k_nope_CD = turned_2bjD[:, :, ~leading].flatten(0, 2)
    # A query of kv head g has channels only at (g, ·): its coordinates on the new axes.
    axes_bGfj = axes_bcj.unflatten(1, (G, freqfold))
    read_UNC = _read_nope(axes_bGfj[..., ~leading])
    q_H2bfD = w.q_HdD.unflatten(1, (2, blocks, freqfold))
    q_rope_HRD = _rope_queries(q_H2bfD, axes_bGfj[..., leading], s)
    q_rope_bias = k_rope_bias = None
    if w.q_bias_Hd is not None and k_bias_2bc is not None:
        q_bias_H2bf1 = w.q_bias_Hd.unflatten(1, (2, blocks, freqfold))[..., None]
        q_rope_bias = _rope_queries(q_bias_H2bf1, axes_bGfj[..., leading], s)[..., 0]
        k_rope_bias = (axes_bcj.mT @ k_bias_2bc[..., None])[:, :, leading].flatten()[None]
    frequencies = torch.tensor(spec.frequencies, dtype=torch.float64, device=w.k_GdD.device)[::collapse]
    return RopeSplit(
        q_nope_HND=w.q_HdD,
        q_rope_HRD=q_rope_HRD,
        k_nope_CD=k_nope_CD,
        read_UNC=read_UNC,
        k_rope_PRD=k_rope_RD[None],
        frequencies_PF=frequencies[None],
        kept_pairs=tuple(range(0, pairs, collapse)),
        q_nope_bias_HN=w.q_bias_Hd,
        q_rope_bias_HR=q_rope_bias,
        k_rope_bias_PR=k_rope_bias,
    )


def _rope_queries(q_H2bfX: Tensor, lead_bGfj: Tensor, s: int) -> Tensor:
    """Queries on the leading axes, in the order of the shared key: ``[H, R, X]``."""
    q_Gs2bfX = q_H2bfX.unflatten(0, (-1, s))
    turned = torch.einsum("bGfj,GszbfX->GszbjX", lead_bGfj, q_Gs2bfX)
    return turned.flatten(2, 4).flatten(0, 1)


def _read_nope(rest_bGfj: Tensor) -> Tensor:
    """How each kv head reads an un-roped key of the original ``d`` channels from the shared components."""
    blocks, G, freqfold, left = rest_bGfj.shape
    read = rest_bGfj.new_zeros(G, 2, blocks, freqfold, 2, blocks, left)
    for block in range(blocks):
        for part in range(2):
            read[:, part, block, :, part, block] = rest_bGfj[block]
    return read.flatten(4).flatten(1, 3)


def key_balance(k_CD: Tensor, v_ED: Tensor, stats: CalibrationStats) -> float:
    """``ρ``: mean norm of the key components over that of the value components (TransMLA, section 4.3).

    Where either is nothing there is nothing to balance, and it is one.
    """
    norm_k = stats.moment_of(k_CD).diagonal().clamp_min(0).sqrt().mean()
    norm_v = stats.moment_of(v_ED).diagonal().clamp_min(0).sqrt().mean()
    smaller, larger = sorted((float(norm_k), float(norm_v)))
    return 1.0 if smaller <= _NOTHING * larger else float(norm_k / norm_v)


def balanced_pca(k_CD: Tensor, v_ED: Tensor, stats: CalibrationStats, rank: int) -> Factors:
    """PCA of the stacked outputs ``[k / ρ; v]`` (TransMLA, arXiv 2502.07864, section 4.3).

    Its damping, a multiple of the identity, does not move eigenvectors and so is left out.
    """
    rho = key_balance(k_CD, v_ED, stats) if len(k_CD) else 1.0
    w_oD = torch.cat([k_CD / rho, v_ED])
    energy_o, axes_oo = eigh(stats.moment_of(w_oD))
    axes_or = axes_oo[:, :rank]
    return Factors(axes_or.T @ w_oD, rho * axes_or[: len(k_CD)], axes_or[len(k_CD) :], energy_o.clamp_min(0))
