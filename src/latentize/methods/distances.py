"""How far back a layer looks: attention probability as a function of distance.

Exact and in chunks of queries, so that memory grows with the length of the text and not with its square.

B batch, H query heads, G kv heads, T tokens, c queries in a chunk, L distances, d head size.
"""

from __future__ import annotations

from itertools import pairwise, product

import torch
from torch import Tensor

from latentize.attention.grouped import for_heads

__all__ = ["attended_distances", "expected_rotation", "rotations"]

# Few enough for a core's cache, and for most chunks not to look at what comes later.
_SCORES_AT_ONCE = 1 << 21


def attended_distances(
    q_BHTd: Tensor,
    k_BGTd: Tensor,
    scale: float,
    *,
    positions_BT: Tensor | None = None,
    reach: int | None = None,
) -> Tensor:
    """Attention probability that falls on each distance, summed over queries and batch.

    Args:
        q_BHTd: Queries, after RoPE.
        k_BGTd: Keys, after RoPE.
        scale: Softmax scale.
        positions_BT: Where the tokens are, rising; by default one after the other.
        reach: Distances that are told apart, ``L``; by default ``T``.

    Returns:
        ``[H, L]`` float64; entry ``Δ`` is ``Σ p(t, t - Δ)``. A row sums to ``B T``.
    """
    batch, heads, tokens, _ = q_BHTd.shape
    k_BHTd = for_heads(k_BGTd, heads)
    histogram_HL = q_BHTd.new_zeros(heads, reach or tokens, dtype=torch.float64)
    chunk = max(1, min(tokens, _SCORES_AT_ONCE // (batch * heads * tokens)))
    for start in range(0, tokens, chunk):
        end = min(tokens, start + chunk)
        score_BHcS = scale * (q_BHTd[:, :, start:end] @ k_BHTd[:, :, :end].mT)
        hidden = torch.ones(end - start, end, dtype=torch.bool, device=score_BHcS.device).triu(start + 1)
        p_BHcS = score_BHcS.masked_fill_(hidden, -torch.inf).softmax(-1)
        if positions_BT is None:
            _add(histogram_HL, p_BHcS.sum(0), start)
            continue
        for p_HcS, position_T in zip(p_BHcS, positions_BT.tolist(), strict=True):
            for (first, last), (near, far) in product(_runs(position_T[start:end]), _runs(position_T[:end])):
                apart = position_T[start + first] - position_T[near]
                _add(histogram_HL, p_HcS[:, first:last, near:far], apart)
    return histogram_HL


def _runs(positions: list[int]) -> list[tuple[int, int]]:
    """Where positions follow one after the other: first and one past the last index of each stretch."""
    cuts = [0, *(i for i in range(1, len(positions)) if positions[i] != positions[i - 1] + 1), len(positions)]
    return list(pairwise(cuts))


def _add(histogram_HL: Tensor, p_HcS: Tensor, apart: int) -> None:
    """Add probabilities of ``c`` queries and ``S`` keys in a row, the first of each ``apart``."""
    last = apart + p_HcS.shape[1] - 1
    if last < 0:
        return
    # Where a key comes after its query nothing is attended.
    by_distance_HL = _sum_diagonals(p_HcS)[:, -(last + 1) :]
    histogram_HL[:, last + 1 - by_distance_HL.shape[1] : last + 1] += by_distance_HL


def _sum_diagonals(p_HcS: Tensor) -> Tensor:
    """Sums of equal ``i - s``, query less key: ``[H, c + S - 1]``, from ``1 - S`` to ``c - 1``."""
    heads, rows, keys = p_HcS.shape
    # With the keys reversed a diagonal is a column of a view whose rows are one entry too short.
    width = keys + rows - 1
    padded = torch.nn.functional.pad(p_HcS.flip(-1), (0, rows - 1)).contiguous()
    skewed = padded.as_strided((heads, rows, width), (rows * width, width - 1, 1))
    return skewed.double().sum(1)


def rotations(frequencies_f: Tensor, distances: int) -> Tensor:
    """``e^{i ω Δ}`` for ``Δ = 0 … L - 1``, complex ``[L, f]``."""
    distance_L = torch.arange(distances, dtype=torch.float64, device=frequencies_f.device)
    angle_Lf = distance_L[:, None] * frequencies_f.double()
    # Several times faster than a complex exponential.
    return torch.complex(angle_Lf.cos(), angle_Lf.sin())


def expected_rotation(frequencies_f: Tensor, histogram_HL: Tensor) -> Tensor:
    """``ρ = E[e^{i ω Δ}]`` under the attended distances, complex ``[H, f]``.

    The constant that comes nearest to a rotation, in the mean square, over the distances that are looked at.
    """
    turn_Lf = rotations(frequencies_f, histogram_HL.shape[1])
    weight_HL = histogram_HL / histogram_HL.sum(-1, keepdim=True)
    return weight_HL.to(turn_Lf.dtype) @ turn_Lf
