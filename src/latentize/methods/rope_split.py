"""Which part of the keys keeps its rotation.

RoPE stands between a low-rank key and its cache: a rotated key is not linear in a latent. So every conversion
first splits the keys into roped components, cached as they are, and un-roped ones, which may be compressed.

D hidden, H query heads, G kv heads, s = H / G, d head size, C un-roped components of all kv heads together,
N un-roped query size, P roped keys, R size of a roped key, F = R / 2 pairs, U = G readers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from latentize.attention.grouped import AttentionWeights
from latentize.attention.spec import AttentionSpec
from latentize.methods.linalg import eigh
from latentize.methods.statistics import CalibrationStats

__all__ = ["RopeSplit", "Selection", "rorope", "select_pairs", "split_per_head"]

Selection = Literal["high", "low", "uniform", "2-norm"]


@dataclass(frozen=True)
class RopeSplit:
    """Keys and queries, split. A logit is the same sum as before, but for rotations that were dropped:

    ``q_nope · (read · k_nope) + q_rope · k_rope``.

    Attributes:
        q_nope_HND, q_rope_HRD: Query projections.
        k_nope_CD: All un-roped key components, a matrix to be compressed.
        read_UNC: How kv head ``u`` reads its un-roped key from them.
        k_rope_PRD: Roped keys, "half" layout.
        frequencies_PF: Radians per position.
        kept_pairs: Frequencies of the source that the roped pairs come from, by number, fastest first.
        q_nope_bias_HN, q_rope_bias_HR, k_rope_bias_PR: Biases, or ``None``. A bias on un-roped keys adds the
            same to every logit of a query, and softmax ignores it.
    """

    q_nope_HND: Tensor
    q_rope_HRD: Tensor
    k_nope_CD: Tensor
    read_UNC: Tensor
    k_rope_PRD: Tensor
    frequencies_PF: Tensor
    kept_pairs: tuple[int, ...]
    q_nope_bias_HN: Tensor | None = None
    q_rope_bias_HR: Tensor | None = None
    k_rope_bias_PR: Tensor | None = None


def select_pairs(
    selection: Selection, spec: AttentionSpec, rope_dim: int, stats: CalibrationStats | None = None
) -> Tensor:
    """Pairs of each kv head that keep RoPE (MHA2MLA, arXiv 2502.14837, section 3.1).

    Args:
        selection: ``high`` takes the fastest, ``low`` the slowest, ``uniform`` every (d / rope_dim)-th, ``2-norm``
            those of the largest ``Σ_{h in group} E‖q_{h,f}‖ · E‖k_f‖``.
        spec: The layer.
        rope_dim: Dimensions ``R`` that keep RoPE in each kv head.
        stats: Needed for ``2-norm``.

    Returns:
        Pair numbers ``[G, R / 2]``, ascending.
    """
    pairs, wanted = spec.head_dim // 2, rope_dim // 2
    if selection == "2-norm":
        if stats is None or stats.q_norm_HF is None or stats.k_norm_GF is None:
            raise ValueError("2-norm selection needs calibration statistics")
        q_GF = stats.q_norm_HF.unflatten(0, (spec.num_kv_heads, spec.group_size)).sum(1)
        score_GF = q_GF * stats.k_norm_GF
        return score_GF.topk(wanted, dim=-1).indices.sort(-1).values
    chosen = {
        "high": torch.arange(wanted),
        "low": torch.arange(pairs - wanted, pairs),
        "uniform": torch.arange(wanted) * (spec.head_dim // rope_dim),
    }[selection]
    return chosen.expand(spec.num_kv_heads, -1)


def split_per_head(w: AttentionWeights, spec: AttentionSpec, pairs_GF: Tensor) -> RopeSplit:
    """Each kv head keeps RoPE on its own pairs, in its own roped key; a group's queries follow their head."""
    G, s, d = spec.num_kv_heads, spec.group_size, spec.head_dim
    pairs_GF = pairs_GF.to(w.k_GdD.device)
    kept_Gd = torch.zeros(G, d // 2, dtype=torch.bool, device=pairs_GF.device).scatter_(1, pairs_GF, True).repeat(1, 2)
    rope_GR = torch.cat([pairs_GF, pairs_GF + d // 2], dim=1)
    nope_GN = (~kept_Gd).nonzero()[:, 1].view(G, -1)

    def take(w_GdX: Tensor, index_Gi: Tensor) -> Tensor:
        return torch.stack([head[index] for head, index in zip(w_GdX, index_Gi, strict=True)])

    def take_queries(q_HdX: Tensor | None, index_Gi: Tensor) -> Tensor | None:
        return None if q_HdX is None else take(q_HdX, index_Gi.repeat_interleave(s, dim=0))

    N = nope_GN.shape[1]
    # Head u reads its N rows out of the G · N that are stacked.
    read_UNC = torch.eye(G * N, dtype=w.k_GdD.dtype, device=w.k_GdD.device).view(G, N, G * N)
    frequencies = torch.tensor(spec.frequencies, dtype=torch.float64, device=pairs_GF.device)
    q_nope, q_rope = take_queries(w.q_HdD, nope_GN), take_queries(w.q_HdD, rope_GR)
    assert q_nope is not None and q_rope is not None
    return RopeSplit(
        q_nope_HND=q_nope,
        q_rope_HRD=q_rope,
        k_nope_CD=take(w.k_GdD, nope_GN).flatten(0, 1),
        read_UNC=read_UNC,
        k_rope_PRD=take(w.k_GdD, rope_GR),
        frequencies_PF=frequencies[pairs_GF],
        kept_pairs=tuple(sorted(pairs_GF.flatten().tolist())),
        q_nope_bias_HN=take_queries(w.q_bias_Hd, nope_GN),
        q_rope_bias_HR=take_queries(w.q_bias_Hd, rope_GR),
        k_rope_bias_PR=None if w.k_bias_Gd is None else take(w.k_bias_Gd, rope_GR),
    )


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
