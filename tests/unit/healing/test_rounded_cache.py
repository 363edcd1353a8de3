"""Rows as a quantised cache gives them back, for training through them."""

from __future__ import annotations

import pytest
import torch

from latentize.healing.student import RoundedCache
from latentize.runtime.layer import LatentLayer


@pytest.mark.parametrize(("keys", "factors"), [(1, 0), (2, 0), (1, 3)])
def test_rounded_as_the_cache_rounds(keys: int, factors: int) -> None:
    generator = torch.Generator().manual_seed(0)
    c = torch.randn(2, 1, 9, 12, generator=generator, requires_grad=True)
    k = torch.randn(2, keys, 9, 8 + factors, generator=generator, requires_grad=True)
    made = RoundedCache("int4", "int8", key_scales=factors).update(c, k)
    stored = LatentLayer("int4", "int8", None, 0, 0, factors).update(c.detach(), k.detach())
    for mine, its in zip(made, stored, strict=True):
        torch.testing.assert_close(mine.detach(), its, rtol=1e-5, atol=1e-6)
    assert torch.equal(made[1][..., 8:], k[..., 8:]), "factors are not rounded"
    # The gradient is that of the identity.
    (made[0].sum() + made[1].sum()).backward()
    assert c.grad is not None and k.grad is not None
    torch.testing.assert_close(c.grad, torch.ones_like(c))
    assert torch.equal(k.grad, torch.ones_like(k))
