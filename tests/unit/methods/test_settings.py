"""What a budget allows, and that a converted layer is as large as its setting says."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.layers import attention_spec, random_attention, stats_of

from latentize.attention.latent import latent_attention
from latentize.attention.spec import AttentionSpec, RopeSpec
from latentize.errors import OptionError, UnsupportedModelError
from latentize.methods.calibrated import ladder_costs
from latentize.methods.closed_form import convert_layer
from latentize.methods.pooling import pooled_heads
from latentize.methods.registry import settings
from latentize.methods.setting import Setting
from latentize.recipe import Recipe

expanded = partial(latent_attention, absorb=False)
METHODS = ("transmla", "care", "mha2mla")


def spec_of(heads: int, kv_heads: int, head_dim: int) -> AttentionSpec:
    return AttentionSpec(heads * head_dim, heads, kv_heads, head_dim, RopeSpec(1e4, head_dim))


@given(
    method=st.sampled_from(METHODS),
    shape=st.sampled_from([(4, 4, 16), (8, 2, 32), (4, 1, 16), (32, 8, 128), (6, 2, 24), (8, 8, 40)]),
    keep=st.floats(0.01, 1.0),
    selection=st.sampled_from(["high", "low", "uniform", "2-norm"]),
    svd=st.sampled_from(["joint", "split"]),
)
def test_every_setting_stays_within_the_budget(
    method: str, shape: tuple[int, int, int], keep: float, selection: str, svd: str
) -> None:
    spec, recipe = spec_of(*shape), Recipe.build(method=method, keep=keep, selection=selection, svd=svd)
    # Roped keys are d, d/2, d/4, … as long as that is even; one value at least is for the latent.
    rope = spec.head_dim
    while rope % 4 == 0:
        rope //= 2
    smallest = rope * (spec.num_kv_heads if method == "mha2mla" else 1) + 1
    if int(keep * spec.cache_values + 1e-9) < smallest:
        with pytest.raises(OptionError, match="--keep"):
            settings(recipe, spec)
        return
    if int(keep * spec.cache_values + 1e-9) == smallest and svd == "split":
        return  # keys and values in two SVDs need a value of the latent each
    found = settings(recipe, spec)
    assert len(set(found)) == len(found)
    for setting in found:
        assert setting.cache_values <= keep * spec.cache_values + 1e-6
        assert setting.kv_lora_rank >= 1
        assert setting.qk_rope_head_dim % 2 == 0
        assert spec.head_dim % setting.qk_rope_head_dim == 0
        assert setting.rope_heads == (spec.num_kv_heads if method == "mha2mla" else 1)
        if method != "mha2mla":
            collapse = spec.head_dim // setting.qk_rope_head_dim
            assert setting.freqfold % collapse == 0
            assert (spec.head_dim // 2) % setting.freqfold == 0
    # All of the budget is used, unless the latent would outgrow what it is made from.
    largest = max(s.cache_values for s in found)
    bounded = any(s.kv_lora_rank >= spec.hidden_size for s in found)
    assert largest == int(keep * spec.cache_values + 1e-9) or bounded


@pytest.mark.parametrize("method", METHODS)
def test_a_percentage_is_not_rounded_against_the_user(method: str) -> None:
    """1/3 of 96 as a binary fraction is a little less than 32."""
    found = settings(Recipe.build(method=method, keep=1 / 3), spec_of(6, 2, 24))
    assert max(s.cache_values for s in found) == 32


@pytest.mark.parametrize("method", METHODS)
def test_explicit_sizes_are_taken(method: str) -> None:
    found = settings(Recipe.build(method=method, kv_lora_rank=20, qk_rope_head_dim=8), attention_spec(2))
    assert {(s.kv_lora_rank, s.qk_rope_head_dim) for s in found} == {(20, 8)}
    assert {s.freqfold for s in found} == ({None} if method == "mha2mla" else {2, 4, 8})


def test_explicit_folding_is_taken_or_refused() -> None:
    sizes = {"kv_lora_rank": 20, "qk_rope_head_dim": 8}
    found = settings(Recipe.build(method="care", **sizes, freqfold=4), attention_spec(2))
    assert [s.freqfold for s in found] == [4]
    with pytest.raises(OptionError):
        settings(Recipe.build(method="care", **sizes, freqfold=3), attention_spec(2))


def test_a_refused_folding_names_its_option() -> None:
    with pytest.raises(OptionError) as caught:
        settings(Recipe.build(method="transmla", keep="50%", freqfold=3), attention_spec(2))
    assert "freqfold" in str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "where"),
    [
        ({"kv_lora_rank": 20, "qk_rope_head_dim": 32}, "--qk-rope-head-dim"),
        ({"kv_lora_rank": 20, "qk_rope_head_dim": 6}, "--qk-rope-head-dim"),
        ({"kv_lora_rank": 65, "qk_rope_head_dim": 8}, "--kv-lora-rank"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_explicit_sizes_out_of_range(method: str, sizes: dict[str, int], where: str) -> None:
    with pytest.raises(OptionError) as caught:
        settings(Recipe.build(method=method, **sizes), attention_spec(2))
    assert caught.value.where == where


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_that_nothing_fits(method: str) -> None:
    with pytest.raises(OptionError, match="fits") as caught:
        settings(Recipe.build(method=method, keep="2%"), attention_spec(2))
    assert caught.value.where == "--keep"
    assert caught.value.fix


@pytest.mark.parametrize("method", METHODS)
def test_a_setting_describes_what_matters_to_it(method: str) -> None:
    entries = settings(Recipe.build(method=method, keep="50%"), attention_spec(2))[0].describe()
    assert ("selection" in entries) == ("svd" in entries) == (method == "mha2mla")
    assert ("damping" in entries) == (method == "care")
    assert ("freqfold" in entries) == (method != "mha2mla")


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("keep", ["15%", "50%", "75%", "100%"])
@pytest.mark.parametrize(
    ("method", "svd"), [("transmla", "joint"), ("care", "joint"), ("mha2mla", "joint"), ("mha2mla", "split")]
)
def test_a_converted_layer_has_the_size_of_its_setting(method: str, keep: str, kv_heads: int, svd: str) -> None:
    """Also where the latent could be larger than the hidden state, or than what is left to compress."""
    spec = attention_spec(kv_heads)
    w = random_attention(spec, biases=True)
    stats = stats_of(w)
    for setting in settings(Recipe.build(method=method, keep=keep, svd=svd), spec):
        latent = convert_layer(w, spec, stats, setting)
        assert latent.spec.cache_values == setting.cache_values, setting
        assert latent.spec.kv_lora_rank == setting.kv_lora_rank, setting
        assert latent.spec.rope_heads == setting.rope_heads
        assert latent.spec.softmax_scale == spec.softmax_scale
        assert torch.isfinite(expanded(torch.randn(1, 5, spec.hidden_size, dtype=torch.float64), latent)).all()


@pytest.mark.parametrize("method", METHODS)
def test_more_budget_is_not_worse(method: str) -> None:
    """Error of the layer's output shrinks with the latent, everything else equal."""
    spec = attention_spec(2)
    w = random_attention(spec)
    stats, x = stats_of(w), torch.randn(2, 30, spec.hidden_size, dtype=torch.float64)
    split = {"selection": "2-norm", "svd": "joint"} if method == "mha2mla" else {"freqfold": 2}
    outputs = [
        expanded(x, convert_layer(w, spec, stats, Setting(method, rank, 8, 2 if method == "mha2mla" else 1, **split)))
        for rank in (4, 12, 24, 40)
    ]
    errors = [float((y - outputs[-1]).square().sum()) for y in outputs]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 2 * errors[2] > 0


@pytest.mark.parametrize("method", METHODS)
def test_normalised_keys_cannot_be_compressed(method: str) -> None:
    with pytest.raises(UnsupportedModelError, match="qk-norm") as caught:
        settings(Recipe.build(method=method, keep="50%"), attention_spec(2, qk_norm=True))
    assert "100%" in caught.value.fix


@pytest.mark.parametrize(
    ("changes", "recipe", "factors"),
    [
        ({}, {"keep": "50%"}, 2),
        ({"qk_norm_across": True}, {"keep": "50%"}, 1),
        ({}, {"kv_lora_rank": 20, "qk_rope_head_dim": 8}, 2),
        # A bias times a factor is not the same for all keys, and rows in codes have no factors.
        ({"qkv_bias": True}, {"keep": "50%"}, 0),
        ({}, {"keep": "50%", "bytes": "20%"}, 0),
        # No room for them.
        ({}, {"keep": "7%"}, 0),
    ],
    ids=["per head", "across", "sizes", "biases", "codes", "nothing left"],
)
def test_the_calibrated_method_keeps_norms_where_it_can(
    changes: dict[str, bool], recipe: dict[str, Any], factors: int
) -> None:
    spec = attention_spec(2, qk_norm=True, **changes)
    found = settings(Recipe.build(**recipe), spec)
    free = [s for s in found if s.stride is None]
    assert free and all(s.key_scales == factors and s.linear == (not factors) for s in free)
    budget = 30 if "kv_lora_rank" in recipe else math.floor(spec.cache_values * Recipe.build(**recipe).budget)
    assert max(s.cache_values for s in found) <= budget
    if "kv_lora_rank" not in recipe and factors:
        assert {s.cache_values for s in free} == {budget}
    ladders = [s for s in found if s.stride is not None and not s.key_scales]
    assert ladders and all(s.linear for s in ladders), "a portable format has no norms"
    assert [s.describe().get("key_scales", 0) for s in free] == [factors] * len(free)


def test_normalised_keys_can_be_kept_whole() -> None:
    """What the refusal recommends has to work."""
    spec = attention_spec(2, qk_norm=True)
    found = settings(Recipe.build(method="mha2mla", keep="100%"), spec)
    assert {(s.kv_lora_rank, s.qk_rope_head_dim) for s in found} == {(32, 16)}
    explicit = Recipe.build(method="mha2mla", kv_lora_rank=32, qk_rope_head_dim=16)
    assert settings(explicit, spec)[0].cache_values == spec.cache_values


@pytest.mark.parametrize(
    ("to", "keep", "kv_heads", "expected"),
    [
        ("gqa", "50%", 8, 4),
        ("gqa", "40%", 8, 2),
        ("gqa", None, 8, 2),
        ("gqa", "12.5%", 8, 1),
        ("mqa", None, 8, 1),
        ("mqa", "12.5%", 8, 1),
        ("mqa", "50%", 8, 1),
        ("gqa", "40%", 6, 2),
    ],
)
def test_pooled_heads(to: str, keep: str | None, kv_heads: int, expected: int) -> None:
    assert pooled_heads(Recipe.build(to=to, keep=keep), spec_of(24, kv_heads, 16)) == expected


@pytest.mark.parametrize(
    ("to", "keep", "kv_heads"), [("gqa", "10%", 8), ("mqa", "10%", 8), ("mqa", None, 1), ("gqa", "50%", 1)]
)
def test_pooling_that_cannot_be(to: str, keep: str | None, kv_heads: int) -> None:
    with pytest.raises(OptionError) as caught:
        pooled_heads(Recipe.build(to=to, keep=keep), spec_of(24, kv_heads, 16))
    assert f"--to {to}" in caught.value.where


def test_value_bias_becomes_an_output_bias() -> None:
    """Probabilities sum to one; with one token there is nothing else."""
    spec = attention_spec(2)
    w = random_attention(spec, biases=True)
    bare = replace(w, v_bias_Gd=None)
    setting = Setting("mha2mla", 32, 16, 2, selection="high", svd="joint")
    x = torch.randn(1, 1, spec.hidden_size, dtype=torch.float64)
    with_bias, without = (expanded(x, convert_layer(weights, spec, stats_of(w), setting)) for weights in (w, bare))
    v_bias_Hd = w.v_bias_Gd.repeat_interleave(2, dim=0)
    assert torch.allclose((with_bias - without)[0, 0], torch.einsum("DHd,Hd->D", w.o_DHd, v_bias_Hd))


@given(
    shape=st.sampled_from([(4, 4, 16), (8, 2, 32), (4, 1, 16), (32, 8, 128), (6, 2, 24), (8, 8, 40)]),
    keep=st.floats(0.01, 1.0),
)
def test_calibrated_settings_stay_within_the_budget(shape: tuple[int, int, int], keep: float) -> None:
    spec = spec_of(*shape)
    budget = int(keep * spec.cache_values + 1e-9)
    if budget < 4:
        with pytest.raises(OptionError, match="--keep"):
            settings(Recipe.build(keep=keep), spec)
        return
    found = settings(Recipe.build(keep=keep), spec)
    assert len(set(found)) == len(found)
    for setting in found:
        assert setting.cache_values <= budget
        assert setting.kv_lora_rank >= setting.qk_rope_head_dim or setting.qk_rope_head_dim == 2
        assert setting.qk_rope_head_dim % 2 == 0
        assert setting.qk_rope_head_dim <= spec.num_kv_heads * spec.head_dim
        # Rungs lie within the source's own frequencies.
        theta = setting.rope_theta(spec)
        slowest = theta ** (-2 * (setting.qk_rope_head_dim // 2 - 1) / setting.qk_rope_head_dim)
        assert slowest >= (1 - 1e-9) * spec.rope.frequencies[-1] * spec.rope.theta ** (-2 / spec.head_dim)
    sizes = {(s.kv_lora_rank, s.qk_rope_head_dim) for s in found}
    for size in sizes:
        mine = [s for s in found if (s.kv_lora_rank, s.qk_rope_head_dim) == size]
        assert sum(s.stride is None for s in mine) == 1, "one with free frequencies"
        assert any(s.stride == 1.0 for s in mine) or size[1] > spec.head_dim
        widest = max(s.stride for s in mine if s.stride is not None)
        assert widest == spec.head_dim / size[1], "a ladder over all frequencies"


def test_a_preset_is_a_pair_of_sizes() -> None:
    for preset, sizes in (("512+64", (512, 64)), ("256+64", (256, 64))):
        made = settings(Recipe.build(preset=preset), spec_of(32, 8, 128))
        assert {(s.kv_lora_rank, s.qk_rope_head_dim) for s in made} == {sizes}
    found = settings(Recipe.build(preset="512+64"), spec_of(32, 8, 128))
    assert {(s.kv_lora_rank, s.qk_rope_head_dim) for s in found} == {(512, 64)}
    with pytest.raises(OptionError, match="latent of 512"):
        settings(Recipe.build(preset="512+64"), spec_of(8, 2, 32))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("keep", ["15%", "50%", "100%"])
@pytest.mark.parametrize("biases", [False, True])
def test_a_calibrated_layer_has_the_size_of_its_setting(keep: str, kv_heads: int, biases: bool) -> None:
    spec = attention_spec(kv_heads, qkv_bias=biases)
    w = random_attention(spec, biases=biases)
    stats = replace(stats_of(w), distances_HT=torch.rand(4, 40, dtype=torch.float64))
    for setting in settings(Recipe.build(keep=keep), spec):
        latent = convert_layer(w, spec, stats, setting)
        assert latent.spec.cache_values == setting.cache_values
        assert (latent.q_nope_bias_HN is not None) == (biases and not setting.linear)
        assert latent.frequencies_PF.shape == (1, setting.qk_rope_head_dim // 2)
        if setting.stride is None:
            assert set(latent.frequencies_PF[0].tolist()) <= set(spec.rope.frequencies)
        assert expanded(torch.randn(1, 5, spec.hidden_size, dtype=torch.float64), latent).isfinite().all()


def test_the_ladder_that_costs_least_is_the_one_that_is_needed() -> None:
    """A layer that looks at one distance only loses nothing by any constant; one that looks everywhere does."""
    spec = attention_spec(2)
    w = random_attention(spec)
    candidates = [s for s in settings(Recipe.build(keep="50%"), spec) if s.stride is not None]
    here = torch.zeros(4, 40, dtype=torch.float64)
    here[:, 3] = 1
    near, far = (
        ladder_costs(w, spec, replace(stats_of(w), distances_HT=h), candidates) for h in (here, torch.ones_like(here))
    )
    assert max(near) <= 1e-9
    assert min(far) > 1e-3
    assert len(set(far)) > 1, "candidates differ"
