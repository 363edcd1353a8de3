"""How far back a layer looks: attention probability as a function of distance.

Exact and in chunks of queries, so that memory grows with the length of the text and not with its square.

B batch, H query heads, G kv heads, T tokens, c queries in a chunk, L distances, d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attended_distances", "expected_rotation"]

# Few enough for a core's cache, and for most chunks not to look at what comes later.
_SCORES_AT_ONCE = 1 << 21


def attended_distances(
    q_BHTd: Tensor,
    k_BGTd: Tensor,
    scale: float,
    *,
    window: int | None = None,
    positions_BT: Tensor | None = None,
    reach: int | None = None,
) -> Tensor:
    """Attention probability that falls on each distance, summed over queries and batch.

    Args:
        q_BHTd: Queries, after RoPE.
        k_BGTd: Keys, after RoPE.
        scale: Softmax scale.
        window: Tokens that a query sees, itself included; ``None`` is all.
        positions_BT: Where the tokens are, rising; by default one after the other.
        reach: Distances that are told apart, ``L``; by default ``T``.

    Returns:
        ``[H, L]`` float64; entry ``Δ`` is ``Σ p(t, t - Δ)``. A row sums to ``B T``.
    """
    batch, heads, tokens, _ = q_BHTd.shape
    k_BHTd = k_BGTd.repeat_interleave(heads // k_BGTd.shape[1], dim=1)
    histogram_HL = q_BHTd.new_zeros(heads, reach or tokens, dtype=torch.float64)
    chunk = max(1, min(tokens, _SCORES_AT_ONCE // (batch * heads * tokens)))
    for start in range(0, tokens, chunk):
        end = min(tokens, start + chunk)
        score_BHcS = scale * (q_BHTd[:, :, start:end] @ k_BHTd[:, :, :end].mT)
        hidden = torch.ones(end - start, end, dtype=torch.bool, device=score_BHcS.device).triu(start + 1)
        if window is not None:
            hidden |= torch.ones_like(hidden).tril(start - window)
        p_BHcS = score_BHcS.masked_fill_(hidden, -torch.inf).softmax(-1)
        if positions_BT is None:
            histogram_HL[:, :end] += _sum_diagonals(p_BHcS.sum(0))
            continue
        for p_HcS, position_T in zip(p_BHcS, positions_BT, strict=True):
            # Where a key comes after its query nothing is attended, so any distance will do.
            apart_cS = (position_T[start:end, None] - position_T[:end]).clamp_min(0)
            histogram_HL.index_add_(1, apart_cS.flatten(), p_HcS.flatten(1).double())
    return histogram_HL


def _sum_diagonals(p_HcS: Tensor) -> Tensor:
    """Sum where ``(start + i) - s`` is equal, ``start = S - c``: ``[H, S]`` by distance."""
    heads, rows, keys = p_HcS.shape
    # Reversed, distance Δ of row i is at column Δ + c - 1 - i: a diagonal, which a skewed view makes a column.
    padded = torch.nn.functional.pad(p_HcS.flip(-1), (0, rows)).contiguous()
    width = keys + rows
    skewed = padded.as_strided((heads, rows, keys), (rows * width, width - 1, 1), rows - 1)
    return skewed.double().sum(1)


def expected_rotation(frequencies_f: Tensor, histogram_HT: Tensor) -> Tensor:
    """``ρ = E[e^{i ω Δ}]`` under the attended distances, complex ``[H, f]``.

    The constant that comes nearest to a rotation, in the mean square, over the distances that are looked at.
    """
    distance_T = torch.arange(histogram_HT.shape[1], dtype=torch.float64, device=histogram_HT.device)
    turn_Tf = torch.exp(1j * distance_T[:, None] * frequencies_f.double())
    weight_HT = histogram_HT / histogram_HT.sum(-1, keepdim=True)
    return weight_HT.to(turn_Tf.dtype) @ turn_Tf
