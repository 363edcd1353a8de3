"""Norms of queries and keys beside a compressed key: linear heads for methods, the source's norms for the layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.common import FP64, relative_error
from tests.unit.layers import D, attention_spec, inputs, random_attention

from latentize.attention.grouped import AttentionWeights, grouped_attention, queries_keys
from latentize.attention.latent import latent_attention
from latentize.attention.spec import AttentionSpec
from latentize.methods.closed_form import conversion
from latentize.methods.norms import linear_heads
from latentize.methods.setting import Setting
from latentize.methods.statistics import CalibrationStats, Needed, gather


def layer(kv_heads: int, *, across: bool = False) -> tuple[AttentionSpec, AttentionWeights, CalibrationStats]:
    spec = attention_spec(kv_heads, qk_norm=True, qk_norm_across=across)
    generator = torch.Generator().manual_seed(2)
    shapes = ((spec.num_heads, 16), (kv_heads, 16)) if across else ((16,), (16,))
    q_norm, k_norm = (0.2 + torch.rand(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    w = replace(random_attention(spec), q_norm_d=q_norm, k_norm_d=k_norm)
    stats = gather(inputs(), w.to(torch.float32), spec, Needed(distances=True, cross=True))
    return spec, w, stats


def whole(spec: AttentionSpec) -> Setting:
    keys = spec.num_kv_heads * spec.head_dim
    return Setting("calibrated", min(keys, D), keys, key_scales=spec.key_norms)


@pytest.mark.parametrize("across", [False, True], ids=["per head", "across"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_where_nothing_is_left_out_the_layer_is_the_source(kv_heads: int, across: bool) -> None:
    spec, w, stats = layer(kv_heads, across=across)
    made = conversion(w, spec, stats, whole(spec)).weights
    assert made.spec.key_scales == (1 if across else kv_heads)
    expected = grouped_attention(inputs(), w, spec)
    for absorb in (False, True):
        assert relative_error(latent_attention(inputs(), made, absorb=absorb), expected) <= FP64


@pytest.mark.parametrize("weights", ["positive", "of both signs", "zero"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_factor_after_rope(kv_heads: int, weights: str) -> None:
    """What is odd in a pair rotates backwards; the rest is a part of the projections."""
    spec, w, _ = layer(kv_heads)
    generator = torch.Generator().manual_seed(3)
    turned_d = 0.2 + torch.rand(16, generator=generator, dtype=torch.float64)
    if weights == "of both signs":
        turned_d[::3] *= -1
        # Nothing is alike in this pair.
        turned_d[8] = -turned_d[0]
    if weights == "zero":
        turned_d[[1, 2, 10]] = 0
    assert w.q_norm_d is not None
    w = replace(w, q_turned_d=turned_d, q_norm_d=w.q_norm_d[:8].repeat(2))
    stats = gather(inputs(), w.to(torch.float32), spec, Needed(distances=True, cross=True))
    made = conversion(w, spec, stats, whole(spec)).weights
    expected = grouped_attention(inputs(), w, spec)
    for absorb in (False, True):
        assert relative_error(latent_attention(inputs(), made, absorb=absorb), expected) <= FP64
    alike = replace(w, q_turned_d=turned_d[:8].repeat(2))
    made = conversion(alike, spec, stats, whole(spec)).weights
    assert made.q_mirror_HRd is not None and float(made.q_mirror_HRd.abs().max()) == 0
    # Fitted, what is alike in a pair is kept.
    fitted = linear_heads(w, stats, Setting("calibrated", 8, 8, linear=True))
    without = linear_heads(replace(w, q_turned_d=None), stats, Setting("calibrated", 8, 8, linear=True))
    even_d = turned_d.view(2, 8).mean(0).repeat(2)
    assert torch.equal(fitted.q_HdD, even_d[:, None] * without.q_HdD) and torch.equal(fitted.k_GdD, without.k_GdD)


def test_methods_see_the_multiples_of_linear_heads_that_come_nearest() -> None:
    spec, w, stats = layer(2)
    linear = linear_heads(w, stats, whole(spec))
    assert linear.q_norm_d is None and linear.k_norm_d is None
    x = inputs()
    _, normalised = queries_keys(x, w, spec.norm_eps)
    _, made = queries_keys(x, linear, spec.norm_eps)

    def error(factor: float) -> torch.Tensor:
        return (factor * made - normalised).square().sum((0, 2, 3))

    assert bool((error(1.0) < torch.minimum(error(0.99), error(1.01))).all())
    assert torch.equal(linear_heads(w, stats, replace(whole(spec), key_scales=0)).k_GdD, w.k_GdD)


def test_factors_are_near_one() -> None:
    """Whatever the projections' scale is: half precision and eight bits have to hold them."""
    spec, w, _ = layer(2)
    w = replace(w, k_GdD=w.k_GdD * torch.tensor([1e3, 1e-2]).double()[:, None, None])
    stats = gather(inputs(), w.to(torch.float32), spec, Needed(distances=True, cross=True))
    made = conversion(w, spec, stats, whole(spec)).weights
    assert made.k_KeD is not None and made.key_gain_K is not None
    k_BTKe = torch.einsum("btD,keD->btke", inputs(), made.k_KeD)
    factors = made.key_gain_K / (k_BTKe.square().mean(-1) + spec.norm_eps).sqrt()
    assert float(factors.min()) > 0.3 and float(factors.max()) < 4
    assert relative_error(latent_attention(inputs(), made, absorb=True), grouped_attention(inputs(), w, spec)) <= FP64


@pytest.mark.parametrize("part", ["q_HdD", "k_GdD"])
def test_a_head_that_is_zero(part: str) -> None:
    spec, w, _ = layer(2)
    weight = getattr(w, part).clone()
    weight[0] = 0
    w = replace(w, **{part: weight})
    stats = gather(inputs(), w.to(torch.float32), spec, Needed(distances=True, cross=True))
    made = conversion(w, spec, stats, whole(spec)).weights
    assert relative_error(latent_attention(inputs(), made, absorb=True), grouped_attention(inputs(), w, spec)) <= FP64
