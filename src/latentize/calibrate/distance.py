"""How far back a layer looks: attention probability as a function of distance.

Exact and in chunks of queries, so that memory grows with the length of the text and not with its square.

B batch, H query heads, G kv heads, T tokens, c queries in a chunk, d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attended_distances", "expected_rotation"]

# Few enough for a core's cache, and for most chunks not to look at what comes later.
_SCORES_AT_ONCE = 1 << 21


def attended_distances(q_BHTd: Tensor, k_BGTd: Tensor, scale: float, *, window: int | None = None) -> Tensor:
    """Attention probability that falls on each distance, summed over queries and batch.

    Args:
        q_BHTd: Queries, after RoPE.
        k_BGTd: Keys, after RoPE.
        scale: Softmax scale.
        window: Tokens that a query sees, itself included; ``None`` is all.

    Returns:
        ``[H, T]`` float64; entry ``Δ`` is ``Σ p(t, t - Δ)``. A row sums to ``B T``.
    """
    batch, heads, tokens, _ = q_BHTd.shape
    k_BHTd = k_BGTd.repeat_interleave(heads // k_BGTd.shape[1], dim=1)
    histogram_HT = q_BHTd.new_zeros(heads, tokens, dtype=torch.float64)
    chunk = max(1, min(tokens, _SCORES_AT_ONCE // (batch * heads * tokens)))
    for start in range(0, tokens, chunk):
        end = min(tokens, start + chunk)
        score_BHcS = scale * (q_BHTd[:, :, start:end] @ k_BHTd[:, :, :end].mT)
        hidden = torch.ones(end - start, end, dtype=torch.bool, device=score_BHcS.device).triu(start + 1)
        if window is not None:
            hidden |= torch.ones_like(hidden).tril(start - window)
        p_HcS = score_BHcS.masked_fill_(hidden, -torch.inf).softmax(-1).sum(0)
        histogram_HT[:, :end] += _sum_diagonals(p_HcS)
    return histogram_HT


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
