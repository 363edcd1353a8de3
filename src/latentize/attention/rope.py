"""Rotary position embedding (Su et al., arXiv 2104.09864), in the two layouts that checkpoints use.

A pair of dimensions is one complex number, and position ``t`` multiplies it by ``e^{i w t}``. Llama puts the two
halves of pair ``f`` at ``f`` and ``f + F`` ("half"), DeepSeek and GPT-J at ``2 f`` and ``2 f + 1`` ("interleaved").

B batch, h heads, T tokens, F pairs, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Beyond", "half_to_interleaved", "rope_angles", "rotate_half", "rotate_interleaved", "table_places"]


@dataclass(frozen=True)
class Beyond:
    """What texts longer than a model's frequencies are for do to them (LongRoPE, dynamic NTK's scaling).

    Attributes:
        length: Tokens of the longest text that the usual ones are for.
        by_hF: What becomes of each, as of :class:`~latentize.attention.spec.RopeSpec`.
        stretch: As there.
    """

    length: int
    by_hF: Tensor
    stretch: float = 0.0

    def frequencies(self, usual_hF: Tensor, positions_BT: Tensor) -> Tensor:
        """The frequencies, ``[h, F]``, where these are the positions: the last one decides for all."""
        tokens = positions_BT.max() + 1
        by_hF = self.by_hF.to(usual_hF)
        if not self.stretch:
            return torch.where(tokens > self.length, by_hF, usual_hF)
        s = (self.stretch * tokens / self.length - self.stretch + 1).to(usual_hF.dtype).clamp_min(1)
        return usual_hF * s**by_hF


def table_places(frequencies_PF: Tensor, table: tuple[float, ...]) -> Tensor:
    """Where each frequency is in a table, ``[P, F]``.

    Raises:
        ValueError: one is not.
    """
    table_f = torch.tensor(table, dtype=torch.float64, device=frequencies_PF.device)
    gap_PFf = (frequencies_PF.double()[..., None] - table_f).abs()
    if (gap_PFf.amin(-1) > 1e-6 * frequencies_PF.double()).any():
        raise ValueError("a frequency is not in the table")
    return gap_PFf.argmin(-1)


def rope_angles(frequencies_hF: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle of every pair at every position.

    Args:
        frequencies_hF: Radians per position, one row for each head that has its own ladder (one row serves all).
        positions_BT: Token positions.

    Returns:
        Two float32 (or wider) tensors ``[B, h, T, F]``.
    """
    angle_BhTF = positions_BT[:, None, :, None].to(frequencies_hF.dtype) * frequencies_hF[None, :, None, :]
    return angle_BhTF.cos(), angle_BhTF.sin()


def rotate_half(x_BhTd: Tensor, cos_BhTF: Tensor, sin_BhTF: Tensor) -> Tensor:
    """Rotate the first ``2 F`` dimensions, "half" layout; what is beyond them passes (partial RoPE)."""
    pairs = cos_BhTF.shape[-1]
    cos, sin = cos_BhTF.to(x_BhTd.dtype), sin_BhTF.to(x_BhTd.dtype)
    re, im, rest = x_BhTd.split([pairs, pairs, x_BhTd.shape[-1] - 2 * pairs], dim=-1)
    return torch.cat([re * cos - im * sin, im * cos + re * sin, rest], dim=-1)


def rotate_interleaved(x_BhTd: Tensor, cos_BhTF: Tensor, sin_BhTF: Tensor) -> Tensor:
    """Rotate the first ``2 F`` dimensions, "interleaved" layout; what is beyond them passes."""
    pairs = cos_BhTF.shape[-1]
    cos, sin = cos_BhTF.to(x_BhTd.dtype), sin_BhTF.to(x_BhTd.dtype)
    roped, rest = x_BhTd[..., : 2 * pairs], x_BhTd[..., 2 * pairs :]
    re, im = roped[..., 0::2], roped[..., 1::2]
    turned = torch.stack([re * cos - im * sin, im * cos + re * sin], dim=-1).flatten(-2)
    return torch.cat([turned, rest], dim=-1)


def half_to_interleaved(dim: int) -> Tensor:
    """Row order that turns weights for the "half" layout into weights for the "interleaved" one.

    ``w[half_to_interleaved(dim)]`` is interleaved; ``argsort`` of it is the way back.
    """
    return torch.arange(dim).view(2, dim // 2).T.flatten()
