"""What conversion needs to know of a layer's inputs, gathered as they stream by.

All linear statistics of queries, keys and values follow from one matrix, ``E[x xᵀ]`` of the normalised hidden
state; only the mean *norms* that MHA2MLA ranks by need the tokens themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latentize.attention.grouped import AttentionWeights, grown, queries_keys, turned_queries, turning_at
from latentize.attention.rope import rope_angles, rotate_half
from latentize.attention.spec import AttentionSpec
from latentize.methods.distances import attended_distances
from latentize.processes import Team

__all__ = ["CalibrationStats", "Needed", "gather"]

_TENSORS = ("x_D", "xx_DD", "q_norm_HF", "k_norm_GF", "distances_HT", "qx_HdD", "kx_GdD")


@dataclass
class CalibrationStats:
    """Sums over the tokens of one layer, in float64. Adding two gives the statistics of both.

    Attributes:
        tokens: How many were seen.
        x_D: ``Σ x``.
        xx_DD: ``Σ x xᵀ``.
        q_norm_HF: ``Σ ‖q_f‖`` of every pair of every query head, before RoPE; where it was asked for.
        k_norm_GF: ``Σ ‖k_f‖``, likewise.
        distances_HT: Attention probability by distance, see :func:`attended_distances`; where it was asked for.
        qx_HdD, kx_GdD: ``Σ q xᵀ`` and ``Σ k xᵀ`` of queries and keys before RoPE; where they are not linear in ``x``.
    """

    tokens: int
    x_D: Tensor
    xx_DD: Tensor
    q_norm_HF: Tensor | None = None
    k_norm_GF: Tensor | None = None
    distances_HT: Tensor | None = None
    qx_HdD: Tensor | None = None
    kx_GdD: Tensor | None = None

    @classmethod
    def of(cls, x_BTD: Tensor, w: AttentionWeights | None = None) -> CalibrationStats:
        """Statistics of one batch of inputs; with the layer's weights also the mean norms of its pairs."""
        x_nD = x_BTD.flatten(0, 1).float()
        # Products of one batch in the input's precision, sums over batches in float64.
        return cls(
            tokens=x_nD.shape[0],
            x_D=x_nD.double().sum(0),
            xx_DD=(x_nD.T @ x_nD).double(),
            q_norm_HF=None if w is None else _pair_norms(x_nD, w.q_HdD, w.q_bias_Hd),
            k_norm_GF=None if w is None else _pair_norms(x_nD, w.k_GdD, w.k_bias_Gd),
        )

    def __add__(self, other: CalibrationStats) -> CalibrationStats:
        mine, yours = self._present(), other._present()
        # Distances may be gathered on a part of the text only; every other sum belongs to all tokens.
        if mine.keys() - {"distances_HT"} != yours.keys() - {"distances_HT"}:
            raise ValueError("statistics of different kinds cannot be added")
        sums = {**mine, **yours, **{n: mine[n] + yours[n] for n in mine.keys() & yours.keys()}}
        return CalibrationStats(tokens=self.tokens + other.tokens, **sums)

    def over(self, team: Team) -> CalibrationStats:
        """Those of the texts of several processes together, each of which has the same kinds."""
        present, tokens = self._present(), torch.tensor(self.tokens, device=self.x_D.device)
        team.add_up([tokens, *present.values()])
        return CalibrationStats(tokens=int(tokens), **present)

    def _present(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in _TENSORS if getattr(self, name) is not None}

    @property
    def second_moment_DD(self) -> Tensor:
        """``E[x xᵀ]``."""
        return self.xx_DD / self.tokens

    @property
    def affine_moment(self) -> Tensor:
        """``E[(x, 1) (x, 1)ᵀ]``, ``[D + 1, D + 1]``: a bias is the weight of an input that is always one."""
        mean_1D = (self.x_D / self.tokens)[None]
        one = torch.ones(1, 1, dtype=mean_1D.dtype, device=mean_1D.device)
        return torch.cat([torch.cat([self.second_moment_DD, mean_1D.T], 1), torch.cat([mean_1D, one], 1)])

    def moment_of(self, w_oD: Tensor, bias_o: Tensor | None = None) -> Tensor:
        """``E[y yᵀ]`` of ``y = w x + bias``, not centred; leading dimensions of ``w`` are a batch."""
        moment_oo = w_oD @ self.second_moment_DD @ w_oD.mT
        if bias_o is None:
            return moment_oo
        mean_o = w_oD @ (self.x_D / self.tokens)
        cross_oo = mean_o[..., :, None] * bias_o[..., None, :]
        return moment_oo + cross_oo + cross_oo.mT + bias_o[..., :, None] * bias_o[..., None, :]


def _pair_norms(x_nD: Tensor, w_hdD: Tensor, bias_hd: Tensor | None) -> Tensor:
    """``Σ_tokens ‖(y_f, y_{f + d/2})‖`` of every head and pair, ``[h, d / 2]``."""
    y_nhd = torch.nn.functional.linear(x_nD, w_hdD.flatten(0, 1)).unflatten(-1, w_hdD.shape[:2])
    if bias_hd is not None:
        y_nhd = y_nhd + bias_hd
    re_nhF, im_nhF = y_nhd.chunk(2, dim=-1)
    return torch.hypot(re_nhF, im_nhF).double().sum(0)


@dataclass(frozen=True)
class Needed:
    """Statistics that a method needs beyond the second moment.

    Attributes:
        norms: Mean norms of query and key pairs.
        distances: Attended distances.
        cross: Cross moments of queries and keys with the input.
    """

    norms: bool = False
    distances: bool = False
    cross: bool = False


def gather(
    x_BTD: Tensor,
    w: AttentionWeights,
    spec: AttentionSpec,
    needed: Needed,
    positions_BT: Tensor | None = None,
    reach: int | None = None,
) -> CalibrationStats:
    """Statistics of one batch of sequences.

    Args:
        x_BTD: Normalised inputs of the layer, sequences from their start.
        w: The layer, float32.
        spec: Its description.
        needed: What to gather.
        positions_BT: Where in a context the tokens are; by default at its start.
        reach: Distances that are told apart; by default as many as tokens.
    """
    stats = CalibrationStats.of(x_BTD, w if needed.norms else None)
    if not (needed.distances or needed.cross):
        return stats
    q_BHTd, k_BGTd = queries_keys(x_BTD.float(), w, spec.norm_eps)
    if needed.cross:
        x_nD = x_BTD.flatten(0, 1).float()
        qx_HdD, kx_GdD = ((y.transpose(1, 2).flatten(0, 1).flatten(1).T @ x_nD).double() for y in (q_BHTd, k_BGTd))
        d = spec.head_dim
        stats = replace(stats, qx_HdD=qx_HdD.unflatten(0, (-1, d)), kx_GdD=kx_GdD.unflatten(0, (-1, d)))
    if needed.distances:
        in_order = torch.arange(x_BTD.shape[1], device=x_BTD.device)[None]
        positions = in_order if positions_BT is None else positions_BT
        frequencies = torch.tensor([turning_at(spec, positions)], dtype=torch.float64, device=x_BTD.device)
        cos, sin = rope_angles(frequencies, positions)
        q_BHTd, k_BGTd = turned_queries(q_BHTd, w, cos, sin), rotate_half(k_BGTd, cos, sin)
        q_BHTd = grown(q_BHTd, positions, spec.growth, spec.growth_length, spec.growth_first)
        attended = attended_distances(q_BHTd, k_BGTd, spec.softmax_scale, positions_BT=positions_BT, reach=reach)
        stats = replace(stats, distances_HT=attended)
    return stats
