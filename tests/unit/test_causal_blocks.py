"""Attention in blocks, which training uses on a CPU, against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from latentize.attention.module import causal_blocks


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 31, 64])
def test_values_and_gradients_against_pytorch(tokens: int) -> None:
    q, k, v = (torch.randn(2, 3, tokens, d, dtype=torch.float64, requires_grad=True) for d in (6, 6, 4))
    made = causal_blocks(q, k, v, 0.3)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(made)
    for one, other in zip(
        torch.autograd.grad(made, (q, k, v), weight), torch.autograd.grad(expected, (q, k, v), weight), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
