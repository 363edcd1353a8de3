"""Attention in blocks, which training uses on a CPU, against PyTorch's own."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch.nn import functional as F

from latentize.attention.module import causal_blocks, prefill
from latentize.attention.projections import Up


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


@pytest.mark.parametrize(
    ("dtype", "heads", "tokens", "expected"),
    [
        (torch.float32, 2, 512, True),
        (torch.float32, 2, 1025, False),
        (torch.float32, 36, 512, False),
        (torch.bfloat16, 2, 1025, True),
    ],
)
@pytest.mark.parametrize("learns", [True, False])
def test_when_training_attends_in_blocks(
    dtype: torch.dtype, heads: int, tokens: int, expected: bool, learns: bool
) -> None:
    """In float32 in short sequences and for few scores only, as all layers that learn keep theirs; else never."""
    q = torch.randn(1, heads, tokens, 4, dtype=dtype, requires_grad=learns)
    rope, latent = torch.randn(1, heads, tokens, 2, dtype=dtype), torch.randn(1, 1, tokens, 4, dtype=dtype)
    up = Up(torch.randn(heads, 4, 4, dtype=dtype), torch.randn(heads, 4, 4, dtype=dtype), 0.5)
    with patch("latentize.attention.module.causal_blocks", wraps=causal_blocks) as blocks:
        prefill(q, rope, latent, rope[:, :1], up)
    assert blocks.called == (expected and learns)
