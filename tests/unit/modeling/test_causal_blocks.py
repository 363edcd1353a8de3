"""Attention in blocks, which training uses on a CPU, against PyTorch's own."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from tests.common import BF16, FP32, relative_error
from torch.nn import functional as F

from latentize.attention.masks import newest_mask
from latentize.attention.projections import Up
from latentize.modeling.blocks import causal_blocks, newest_blocks
from latentize.modeling.expanded import attend_expanded


@pytest.mark.parametrize("tokens", [1, 3, 64, 128, 129, 300])
def test_values_and_gradients_against_pytorch(tokens: int) -> None:
    """Of one block and of several, the last of which is smaller."""
    q, k, v = (torch.randn(2, 3, tokens, d, dtype=torch.float64, requires_grad=True) for d in (6, 6, 4))
    made = causal_blocks(q, k, v, 0.3)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(made)
    for one, other in zip(
        torch.autograd.grad(made, (q, k, v), weight), torch.autograd.grad(expected, (q, k, v), weight), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("learns", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradients_of_what_learns_alone(learns: tuple[bool, bool, bool]) -> None:
    q, k, v = (torch.randn(2, 3, 200, 4, dtype=torch.float64, requires_grad=each) for each in learns)
    found = torch.autograd.grad(causal_blocks(q, k, v, 0.3).sum(), [t for t in (q, k, v) if t.requires_grad])
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3).sum()
    for one, other in zip(found, torch.autograd.grad(expected, [t for t in (q, k, v) if t.requires_grad]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_within_autocast_all_products_are_in_its_precision() -> None:
    q, k, v = (torch.randn(1, 2, 200, 4, dtype=t, requires_grad=True) for t in (torch.bfloat16, *[torch.float32] * 2))
    with torch.autocast("cpu", torch.bfloat16):
        made = causal_blocks(q, k, v, 0.3)
    assert made.dtype == torch.bfloat16
    found = torch.autograd.grad(made.float().sum(), (q, k, v))
    assert [g.dtype for g in found] == [torch.bfloat16, torch.float32, torch.float32]
    with torch.no_grad():
        assert relative_error(made, causal_blocks(q.float(), k, v, 0.3)) < BF16


def _calls_blocks(dtype: torch.dtype, heads: int, tokens: int, *, learns: bool, fast: bool = False) -> bool:
    q = torch.randn(1, heads, tokens, 4, dtype=dtype, requires_grad=learns)
    rope, latent = torch.randn(1, heads, tokens, 2, dtype=dtype), torch.randn(1, 1, tokens, 4, dtype=dtype)
    up = Up(torch.randn(heads, 4, 4, dtype=dtype), torch.randn(heads, 4, 4, dtype=dtype), 0.5)
    with (
        patch("latentize.modeling.expanded.causal_blocks", wraps=causal_blocks) as blocks,
        torch.autocast("cpu", torch.bfloat16, enabled=fast),
    ):
        attend_expanded(q, rope, latent, rope[:, :1], up)
    return blocks.called


@pytest.mark.parametrize(
    ("dtype", "heads", "tokens", "expected"),
    [
        (torch.float32, 2, 512, True),
        (torch.float32, 2, 1025, False),
        (torch.float32, 36, 512, False),
        (torch.bfloat16, 2, 1025, True),
    ],
)
def test_when_training_attends_in_blocks(dtype: torch.dtype, heads: int, tokens: int, expected: bool) -> None:
    """In float32 in short sequences and for few scores only, as all layers that learn keep theirs."""
    assert _calls_blocks(dtype, heads, tokens, learns=True) == expected


@pytest.mark.parametrize(
    ("dtype", "heads", "fast", "expected"),
    [
        (torch.float32, 36, False, True),
        (torch.bfloat16, 2, False, False),
        (torch.bfloat16, 2, True, True),
    ],
)
def test_when_anything_else_attends_in_blocks(dtype: torch.dtype, heads: int, fast: bool, expected: bool) -> None:
    """Scores are of one block at a time; they are rounded to bfloat16 only where somebody asked for speed."""
    assert _calls_blocks(dtype, heads, 512, learns=False, fast=fast) == expected


@pytest.mark.parametrize(("tokens", "past"), [(300, 0), (3, 0), (5, 40), (150, 7), (1, 9)])
@pytest.mark.parametrize("newest", [1, 4])
@pytest.mark.parametrize("suits", [True, False])
def test_newest_blocks_are_attention_under_the_mask(tokens: int, past: int, newest: int, suits: bool) -> None:
    count = past + tokens
    stored, near = max(0, count - newest), min(count, tokens + newest - 1)
    q, k, v = (torch.randn(2, 3, n, d) for n, d in ((tokens, 8), (stored + near, 8), (stored + near, 6)))
    at = torch.arange(count)
    mask = newest_mask(at[past:], at[:stored], at[count - near :], newest)
    expected = ((q @ k.mT) * 0.3).masked_fill(~mask, -torch.inf).softmax(-1) @ v
    with patch("latentize.modeling.blocks.suit_blocks", return_value=suits):
        assert relative_error(newest_blocks(q, k, v, stored, newest, 0.3), expected) < FP32
