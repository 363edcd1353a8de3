"""Attention over cached rows, whatever they are stored in, is the reference's over what is restored from them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.common import BF16, FP32, FP64, relative_error
from torch import Tensor

from latentize.attention.latent import LatentWeights, absorbed_heads, cache_rows, queries
from latentize.errors import OptionError
from latentize.runtime import absorbed as module
from latentize.runtime.absorbed import attend_block, attend_block_fused, attend_rows, merge
from latentize.runtime.cache import LatentCache, LatentLayer
from latentize.runtime.codecs import FORMATS
from latentize.runtime.heads import Up, decode, heads, prefill

# Relative error (Frobenius) of what is restored: half a step, uniformly, where the largest value is three typical ones.
LOSSY = {None: 0.0, "bf16": 4e-3, "fp16": 5e-4, "fp32": FP32, "fp8": 0.05, "int8": 0.01, "int4": 0.15}


def weights(
    seed: int,
    *,
    H: int = 4,
    U: int = 4,
    P: int = 1,
    r: int = 6,
    R: int = 4,
    N: int = 5,
    V: int = 3,
    D: int = 12,
    K: int = 0,
    sinks: bool = False,
):
    g, d = torch.Generator().manual_seed(seed), 7 if K else D

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g) / math.sqrt(shape[-1])

    shapes = [(H, N, d), (H, R, d), (r, D), (P, R, D), (U, N, r), (U, V, r), (D, H, V)]
    w = LatentWeights(*(random(*shape) for shape in shapes), torch.rand(P, R // 2, generator=g), (N + R) ** -0.5)
    if sinks:
        w = replace(w, sink_H=torch.randn(H, generator=g), v_up_bias_UV=random(U, V))
    if not K:
        return w
    own = {"q_HdD": random(H, d, D), "q_norm_R": torch.rand(d, generator=g), "k_KeD": random(K, d, D)}
    return replace(w, **own, key_gain_K=torch.rand(K, generator=g) + 0.5)


def layer(
    latent: str | None = None, rope: str | None = None, window: int | None = None, sinks=4, residual=0, factors=0
):
    made = LatentLayer(latent, rope, window, sinks, residual, factors)
    made.attends_rows = True
    return made


def up(w: LatentWeights) -> Up:
    more = {"v_up_bias_UV": w.v_up_bias_UV, "key_scales": w.key_scales, "sink_H": w.sink_H}
    return Up(w.k_up_UNr, w.v_up_UVr, w.softmax_scale, **more)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    B=st.integers(1, 3),
    past=st.integers(0, 40),
    new=st.integers(1, 20),
    shape=st.sampled_from(
        [(4, 4, 1, 0), (4, 2, 1, 0), (4, 1, 1, 0), (4, 2, 2, 0), (6, 3, 3, 0), (1, 1, 1, 0), (4, 2, 1, 2), (6, 3, 1, 1)]
    ),
    r=st.integers(1, 9),
    R=st.sampled_from([2, 4, 6]),
    formats=st.tuples(st.sampled_from([None, *FORMATS]), st.sampled_from([None, *FORMATS])),
    residual=st.sampled_from([0, 1, 7]),
    padded=st.booleans(),
    sinks=st.booleans(),
)
def test_heads_over_a_cache_against_the_reference(
    seed: int,
    B: int,
    past: int,
    new: int,
    shape: tuple,
    r: int,
    R: int,
    formats: tuple,
    residual: int,
    padded: bool,
    sinks: bool,
) -> None:
    H, U, P, K = shape
    w = weights(seed, H=H, U=U, P=P, r=r, R=R, K=K, sinks=sinks)
    x = torch.randn(B, past + new, 12, generator=torch.Generator().manual_seed(seed))
    at = torch.arange(past + new)[None]
    c, k_rope = cache_rows(x, w, at)
    made = layer(*formats, residual=residual, factors=K)
    if past:
        made.update(c[:, :, :past], k_rope[:, :, :past])
    rows, _ = made.update(c[:, :, past:], k_rope[:, :, past:])
    q_nope, q_rope = queries(x[:, past:], w, at[:, past:])
    allowed = torch.ones(new, past + new, dtype=torch.bool).tril(past)[None, None].expand(B, 1, -1, -1).clone()
    if padded and past > 2:
        allowed[0, ..., :2] = False
    expected = absorbed_heads(q_nope, q_rope, *rows.tensors(), allowed, w)
    mask = allowed if padded else None
    for form in (heads, decode, prefill):
        assert relative_error(form(q_nope, q_rope, rows, up(w), mask), expected) <= 3 * FP32, form.__name__
    # And what is restored is not far from what was put in.
    for restored, put, name in zip(rows.tensors(), (c, k_rope[..., :R]), formats, strict=True):
        assert relative_error(restored[..., : put.shape[-1]], put) <= LOSSY[name], name
    assert torch.equal(rows.tensors()[1][..., R:], k_rope[..., R:]), "factors are stored as they are"


@pytest.mark.parametrize("mask", [None, "some", "all of one"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_fused_block_against_its_twin(dtype: torch.dtype, mask: str | None) -> None:
    q, rows = torch.randn(2, 5, 10, dtype=dtype), torch.randn(2, 33, 10, dtype=dtype)
    added = None
    if mask is not None:
        added = torch.zeros(2, 5, 33, dtype=dtype)
        added[0, :, :7] = -torch.inf
    if mask == "all of one":
        added[1] = -torch.inf
    (one, lse), (other, lse2) = (f(q, rows, 0.4, added) for f in (attend_block, attend_block_fused))
    torch.testing.assert_close(one, other, rtol=FP32, atol=FP32)
    torch.testing.assert_close(lse.float(), lse2.float(), rtol=FP32, atol=FP32)


@pytest.mark.parametrize("hidden", [0, 7])
def test_both_blocks_in_bfloat16_against_float64(hidden: int) -> None:
    """Whichever a machine prefers. Scores and log-sum-exps of the one are rounded to bfloat16, as eager attention's."""
    q, rows = (torch.randn(2, n, 64).bfloat16() for n in (5, 500))
    added = torch.zeros(2, 5, 500)
    added[0, :, :hidden] = -torch.inf
    expected, lse = attend_block(q.double(), rows.double(), 64**-0.5, added.double())
    for form in (attend_block, attend_block_fused):
        made, lse2 = form(q, rows, 64**-0.5, added)
        assert relative_error(made, expected) <= BF16, form.__name__
        assert float((lse2.double() - lse).abs().max()) <= BF16 * float(lse.abs().max()), form.__name__


@settings(deadline=None, max_examples=30)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), hidden=st.integers(0, 4), seed=st.integers(0, 10**6))
def test_blocks_merge_to_the_whole(sizes: list[int], hidden: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 3, 7, dtype=torch.float64, generator=g)
    rows = torch.randn(2, sum(sizes), 7, dtype=torch.float64, generator=g)
    mask = torch.zeros(2, 1, sum(sizes), dtype=torch.float64)
    mask[0, :, : min(hidden, sum(sizes) - 1)] = -torch.inf
    whole, lse = attend_block(q, rows, 0.7, mask)
    parts = [
        attend_block(q, block, 0.7, part)
        for block, part in zip(rows.split(sizes, 1), mask.split(sizes, 2), strict=True)
    ]
    merged, merged_lse = merge(parts)
    assert relative_error(merged, whole) <= FP64
    assert relative_error(merged_lse, lse) <= FP64


def test_long_caches_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SPLIT", 16)
    q, rows = torch.randn(1, 4, 1, 10), torch.randn(1, 16 * 5 + 3, 10)
    expected, expected_lse = attend_rows(q, [rows], 0.5, fused=False)
    made, lse = attend_rows(q, [rows], 0.5, fused=True)
    assert relative_error(made, expected) <= FP32 and relative_error(lse, expected_lse) <= FP32
    for fused in (True, False):
        some, _ = attend_rows(q, [rows], 0.5, size=3, fused=fused)
        assert relative_error(some, expected[..., :3]) <= FP32


def grown(made: LatentLayer, steps: list[int], size: tuple[int, int] = (6, 4), B: int = 2, seed: int = 0) -> Tensor:
    g, parts = torch.Generator().manual_seed(seed), []
    for step in steps:
        c, k = (torch.randn(B, 1, step, n, generator=g) for n in size)
        made.update(c, k)
        parts.append(torch.cat([c, k], dim=-1))
    return torch.cat(parts, dim=2)


@pytest.mark.parametrize("residual", [0, 5])
@pytest.mark.parametrize("latent", [None, "int8", "int4"])
def test_what_is_stored_does_not_change_any_more(latent: str | None, residual: int) -> None:
    """Appending in other portions, or later, gives the same rows, but for those that still wait."""
    one, other = layer(latent, "int8", residual=residual), layer(latent, "int8", residual=residual)
    grown(one, [3, 1, 1, 20, 1]), grown(other, [3, 1, 1, 20, 1])
    before = one.keys.clone()
    grown(one, [7], seed=1)
    settled = before.shape[2] - 2 * residual - 1
    assert torch.equal(one.keys[:, :, :settled], before[:, :, :settled])
    assert one.get_seq_length() == 33


@pytest.mark.parametrize("latent", [None, "int4"])
def test_crop_select_repeat_and_reorder(latent: str | None) -> None:
    made = layer(latent, residual=3)
    grown(made, [10, 1, 1, 1])
    rows = torch.cat([made.keys, made.values], dim=-1)
    made.crop(-2)
    assert made.get_seq_length() == 11 and torch.equal(made.keys, rows[:, :, :11, :6])
    made.crop(-6)
    assert torch.equal(made.values, rows[:, :, :5, 6:])
    made.batch_repeat_interleave(2)
    assert torch.equal(made.keys, rows[[0, 0, 1, 1], :, :5, :6])
    made.reorder_cache(torch.tensor([3, 0, 1, 1]))
    assert torch.equal(made.keys, rows[[1, 0, 0, 0], :, :5, :6])
    made.batch_select_indices(torch.tensor([0]))
    assert torch.equal(made.keys, rows[[1], :, :5, :6])
    more = grown(made, [2], B=1, seed=3)
    assert made.get_seq_length() == 7
    assert relative_error(made.keys[:, :, 5:], more[..., :6]) <= (FP32 if latent is None else 0.5)
    made.reset()
    assert made.get_seq_length() == 0 and made.nbytes == 0


@pytest.mark.parametrize(
    ("latent", "rope", "per_token"), [(None, None, 160), ("int8", None, 34 + 32), ("int4", "int8", 18 + 10)]
)
def test_bytes_are_those_of_the_storage(latent: str | None, rope: str | None, per_token: int) -> None:
    made = layer(latent, rope)
    made.update(torch.randn(2, 1, 1000, 32), torch.randn(2, 1, 1000, 8))
    assert 2 * 1000 * per_token <= made.nbytes <= 1.1 * 2 * 1000 * per_token


def test_a_window_holds_constant_memory_and_sees_what_it_should() -> None:
    made, w = layer(window=16, sinks=2), weights(0)
    made.frequencies_F = w.frequencies_PF[0]
    x = torch.randn(1, 300, 12)
    at = torch.arange(300)[None]
    c, k_rope = cache_rows(x, w, at)
    sizes, got = [], []
    for t in range(300):
        rows, _ = made.update(c[:, :, t : t + 1], k_rope[:, :, t : t + 1])
        q_nope, q_rope = queries(x[:, t : t + 1], w, at[:, t : t + 1])
        got.append(heads(q_nope, q_rope, rows, up(w), None))
        sizes.append(made.nbytes)
    assert len(set(sizes[100:])) <= 3 and max(sizes[100:]) <= max(sizes[:100])
    for t in (0, 5, 17, 18, 50, 299):
        seen = [*range(min(2, t + 1)), *range(max(2, t - 15), t + 1)]
        # The first tokens stand right before the window.
        places = torch.tensor([*range(max(2, t - 15) - 2, t + 1)] if t > 17 else seen)
        c_t, k_t = cache_rows(x[:, seen], w, places[None])
        q_nope, q_rope = queries(x[:, t : t + 1], w, at[:, t : t + 1])
        expected = absorbed_heads(q_nope, q_rope, c_t, k_t, torch.ones((), dtype=torch.bool), w)
        assert relative_error(got[t], expected) <= 3 * FP32, t


def test_a_window_over_twenty_thousand_tokens() -> None:
    made, sizes = layer("int8", "int8", window=64), set()
    made.frequencies_F = torch.tensor([1.0, 0.1])
    c, k_rope = torch.randn(2, 1, 1, 16), torch.randn(2, 1, 1, 4)
    for t in range(20_000):
        rows, _ = made.update(c, k_rope)
        if t >= 1000:
            sizes.add(made.nbytes)
    assert made.seen == 20_000
    assert rows.tensors()[0].shape[2] == 64 + 4
    assert max(sizes) <= 2 * 2 * (64 + 4) * (16 + 4 + 2 * 2), "bytes of two windows, with their scales"


@pytest.mark.parametrize("past", [0, 3, 30, 100])
def test_many_tokens_under_a_window_see_what_each_alone_would(past: int) -> None:
    """Before anything was let go of, or with no first tokens, a window is a band of the mask."""
    sinks = 2 if past < 10 else 0
    made, w, new = layer(window=12, sinks=sinks), weights(1), 25
    made.frequencies_F = w.frequencies_PF[0]
    x, at = torch.randn(2, past + new, 12), torch.arange(past + new)[None]
    c, k_rope = cache_rows(x, w, at)
    if past:
        made.update(c[:, :, :past], k_rope[:, :, :past])
    rows, _ = made.update(c[:, :, past:], k_rope[:, :, past:])
    q_nope, q_rope = queries(x[:, past:], w, at[:, past:])
    far = at.mT[past:] - at
    allowed = (far >= 0) & ((far < 12) | (at < sinks))
    expected = absorbed_heads(q_nope, q_rope, c, k_rope, allowed, w)
    assert relative_error(heads(q_nope, q_rope, rows, up(w), None), expected) <= 3 * FP32


def test_refusals() -> None:
    from tests.models import pico_config

    config = pico_config()
    with pytest.raises(OptionError, match="int3"):
        LatentCache(config, latent="int3")
    with pytest.raises(OptionError, match="window"):
        LatentCache(config, window=16, residual=8)
    made = LatentLayer(None, None, 8, 4, 0)
    with pytest.raises(OptionError, match="accelerate"):
        made.update(torch.randn(1, 1, 3, 6), torch.randn(1, 1, 3, 4))
    with pytest.raises(OptionError, match="cropped"):
        made.crop(-1)
