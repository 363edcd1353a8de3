"""Sizes and bytes: derived once, and right."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentize.attention.spec import AttentionSpec, LatentSpec, RopeSpec, kv_cache_bytes

ROPE = RopeSpec(10_000.0, 16)
COUNTS = st.integers(1, 64)


@pytest.mark.parametrize(("kv_heads", "kind"), [(8, "MHA"), (4, "GQA"), (2, "GQA"), (1, "MQA")])
def test_kind_group_and_cache_of_grouped_attention(kv_heads: int, kind: str) -> None:
    spec = AttentionSpec(hidden_size=96, num_heads=8, num_kv_heads=kv_heads, head_dim=16, rope=ROPE)
    assert spec.kind == kind
    assert spec.group_size == 8 // kv_heads
    assert spec.cache_values == 2 * kv_heads * 16


def test_one_head_is_multi_head() -> None:
    """With H = G = 1 nothing is shared."""
    assert AttentionSpec(16, 1, 1, 16, ROPE).kind == "MHA"


def test_softmax_scale_follows_the_head_size_unless_given() -> None:
    assert AttentionSpec(64, 4, 4, 16, ROPE).softmax_scale == 0.25
    assert AttentionSpec(64, 4, 4, 16, ROPE, softmax_scale=0.1).softmax_scale == 0.1


@given(rank=COUNTS, rope=COUNTS, rope_heads=COUNTS, heads=COUNTS, nope=COUNTS, v=COUNTS, layers=COUNTS, tokens=COUNTS)
def test_latent_cache_is_counted_once(
    rank: int, rope: int, rope_heads: int, heads: int, nope: int, v: int, layers: int, tokens: int
) -> None:
    """MLA keeps one latent for keys and values together: no factor of two, no dependence on heads."""
    spec = LatentSpec(
        hidden_size=64,
        num_heads=heads,
        kv_lora_rank=rank,
        qk_rope_head_dim=rope,
        qk_nope_head_dim=nope,
        v_head_dim=v,
        rope_heads=rope_heads,
        up_heads=heads,
        softmax_scale=1.0,
    )
    assert spec.cache_values == rank + rope_heads * rope
    assert spec.qk_head_dim == nope + rope
    assert kv_cache_bytes(spec.cache_values, layers=layers, tokens=tokens) == 2 * layers * tokens * spec.cache_values


@given(values=COUNTS, layers=COUNTS, tokens=COUNTS, batch=COUNTS, bits=st.sampled_from([4, 8, 16, 32]))
def test_bytes_are_a_plain_product(values: int, layers: int, tokens: int, batch: int, bits: int) -> None:
    size = kv_cache_bytes(values, layers=layers, tokens=tokens, batch=batch, bits=bits)
    assert size == round(values * layers * tokens * batch * bits / 8)
    double = kv_cache_bytes(values, layers=layers, tokens=2 * tokens, batch=batch, bits=2 * bits)
    assert double == values * layers * tokens * batch * bits // 2


def test_deepseek_v3_cache() -> None:
    """61 layers of 512 + 64: 70,272 bytes a token in bf16, the published number."""
    assert kv_cache_bytes(512 + 64, layers=61, tokens=1) == 70_272
