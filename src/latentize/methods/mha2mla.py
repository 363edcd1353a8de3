"""MHA2MLA (arXiv 2502.14837): some pairs of each kv head stay roped, the rest and the values go through an SVD.

D hidden, H query heads, G kv heads, s = H / G, d head size, C un-roped components of all kv heads together,
N un-roped query size, P roped keys, R size of a roped key, F = R / 2 pairs, U = G readers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from latentize.attention.grouped import AttentionWeights
from latentize.attention.spec import AttentionSpec
from latentize.methods.low_rank import Factors, truncated_svd
from latentize.methods.method import Method, fractions_of_a_head, normed_whole
from latentize.methods.rope_split import RopeSplit
from latentize.methods.setting import Setting
from latentize.methods.statistics import CalibrationStats, Needed
from latentize.recipe import Recipe, Selection

__all__ = ["Mha2Mla", "joint_svd", "select_pairs", "split_per_head", "split_svd"]


class Mha2Mla(Method):
    """One roped key for each kv head, of the pairs that count most; plain SVD."""

    name = "mha2mla"

    def candidates(self, recipe: Recipe, spec: AttentionSpec) -> list[Setting]:
        return normed_whole(list(self._sized(recipe, spec)), spec, self.name)

    def _sized(self, recipe: Recipe, spec: AttentionSpec) -> Iterator[Setting]:
        for rank, rope in fractions_of_a_head(recipe, spec, spec.num_kv_heads):
            if recipe.selection == "uniform" and (spec.head_dim // 2) % (spec.head_dim // rope):
                continue
            if recipe.svd == "split" and rank < 2 and rope < spec.head_dim:
                continue
            yield Setting(self.name, rank, rope, spec.num_kv_heads, selection=recipe.selection, svd=recipe.svd)

    def needs(self, setting: Setting, spec: AttentionSpec) -> Needed:
        return Needed(norms=setting.selection == "2-norm")

    def split(self, w: AttentionWeights, spec: AttentionSpec, stats: CalibrationStats, setting: Setting) -> RopeSplit:
        pairs_GF = select_pairs(setting.selection or "2-norm", spec, setting.qk_rope_head_dim, stats)
        return split_per_head(w, spec, pairs_GF)

    def compress(self, k_CD: Tensor, v_ED: Tensor, stats: CalibrationStats, setting: Setting) -> Factors:
        return (split_svd if setting.svd == "split" else joint_svd)(k_CD, v_ED, setting.kv_lora_rank)


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


def joint_svd(k_CD: Tensor, v_ED: Tensor, rank: int) -> Factors:
    """One SVD of the stacked weights ("SVD-joint")."""
    up_or, down_rD, energy_o = truncated_svd(torch.cat([k_CD, v_ED]), rank)
    return Factors(down_rD, up_or[: len(k_CD)], up_or[len(k_CD) :], energy_o)


def split_svd(k_CD: Tensor, v_ED: Tensor, rank: int) -> Factors:
    """One SVD for keys and one for values, half of the latent each ("SVD-split")."""
    k_rank = min(rank // 2, len(k_CD))
    k_up, k_down, k_energy = truncated_svd(k_CD, k_rank)
    v_up, v_down, v_energy = truncated_svd(v_ED, rank - k_rank)
    k_rank, v_rank = len(k_down), len(v_down)
    kept = torch.cat([k_energy[:k_rank], v_energy[:v_rank]]).sort(descending=True).values
    dropped = torch.cat([k_energy[k_rank:], v_energy[v_rank:]]).sort(descending=True).values
    return Factors(
        torch.cat([k_down, v_down]),
        torch.nn.functional.pad(k_up, (0, v_rank)),
        torch.nn.functional.pad(v_up, (k_rank, 0)),
        torch.cat([kept, dropped]),
    )
