"""Mean pooling of kv heads."""

from __future__ import annotations

import pytest
import torch
from tests.common import FP64, relative_error
from tests.unit.layers import attention_spec, inputs, random_attention

from latentize.attention.grouped import grouped_attention
from latentize.methods.pooling import pool_heads


@pytest.mark.parametrize(("before", "after"), [(4, 2), (4, 1), (2, 1), (4, 4)])
def test_neighbouring_heads_are_averaged(before: int, after: int) -> None:
    w = random_attention(attention_spec(before), biases=True)
    pooled, share = pool_heads(w, after), before // after
    for name in ("k_GdD", "v_GdD", "k_bias_Gd", "v_bias_Gd"):
        was, now = getattr(w, name), getattr(pooled, name)
        assert len(now) == after
        for head in range(after):
            mean = sum(was[head * share + i] for i in range(share)) / share
            assert relative_error(now[head], mean) <= FP64
    assert pooled.q_HdD is w.q_HdD
    assert pooled.o_DHd is w.o_DHd


def test_pooling_equal_heads_changes_nothing() -> None:
    """Queries keep their group: head h still reads kv head h · G / H."""
    mqa = random_attention(attention_spec(1), biases=True)
    names = ("k_GdD", "v_GdD", "k_bias_Gd", "v_bias_Gd")
    equal = random_attention(attention_spec(4), biases=True)
    equal = type(mqa)(**{**vars(equal), **{n: getattr(mqa, n).repeat_interleave(4, dim=0) for n in names}})
    x = inputs(batch=1, length=8)
    before = grouped_attention(x, equal, attention_spec(4))
    after = grouped_attention(x, pool_heads(equal, 2), attention_spec(2))
    assert relative_error(after, before) <= FP64
    assert torch.isfinite(after).all()
