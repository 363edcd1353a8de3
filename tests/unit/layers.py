"""One random attention layer in float64, with inputs that are neither white nor centred."""

from __future__ import annotations

import torch
from torch import Tensor

from latentize.attention.grouped import AttentionWeights
from latentize.attention.spec import AttentionSpec, RopeSpec
from latentize.methods.statistics import CalibrationStats

D = 40


def attention_spec(kv_heads: int = 2, heads: int = 4, head_dim: int = 16, **changes) -> AttentionSpec:
    return AttentionSpec(
        hidden_size=D,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope=RopeSpec(50.0, head_dim),
        **changes,
    )


def random_attention(spec: AttentionSpec, *, biases: bool = False, seed: int = 0) -> AttentionWeights:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) / D**0.5

    H, G, d = spec.num_heads, spec.num_kv_heads, spec.head_dim
    return AttentionWeights(
        q_HdD=2 * draw(H, d, D),
        k_GdD=2 * draw(G, d, D),
        v_GdD=draw(G, d, D),
        o_DHd=draw(D, H, d),
        q_bias_Hd=3 * draw(H, d) if biases else None,
        k_bias_Gd=3 * draw(G, d) if biases else None,
        v_bias_Gd=3 * draw(G, d) if biases else None,
    )


def inputs(batch: int = 3, length: int = 50, seed: int = 1) -> Tensor:
    """``[B, T, D]``: some directions strong, some weak, a mean that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(D, D, generator=generator, dtype=torch.float64) / D**0.5
    scale = torch.logspace(0.5, -1.0, D, dtype=torch.float64)
    x = torch.randn(batch, length, D, generator=generator, dtype=torch.float64) * scale
    return x @ mix + 0.2


def stats_of(w: AttentionWeights, x: Tensor | None = None) -> CalibrationStats:
    """Statistics in float64, written out; the streaming ones are held against float32 by their own tests."""
    x_nD = (inputs() if x is None else x).flatten(0, 1)

    def norms(w_hdD: Tensor, bias_hd: Tensor | None) -> Tensor:
        y_nhd = torch.einsum("nD,hdD->nhd", x_nD, w_hdD)
        y_nhd = y_nhd if bias_hd is None else y_nhd + bias_hd
        half = y_nhd.shape[-1] // 2
        return (y_nhd[..., :half] ** 2 + y_nhd[..., half:] ** 2).sqrt().sum(0)

    return CalibrationStats(
        tokens=len(x_nD),
        x_D=x_nD.sum(0),
        xx_DD=torch.einsum("nD,nE->DE", x_nD, x_nD),
        q_norm_HF=norms(w.q_HdD, w.q_bias_Hd),
        k_norm_GF=norms(w.k_GdD, w.k_bias_Gd),
    )
