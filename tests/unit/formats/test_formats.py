"""The portable format's identities, each for itself."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.common import FP32, FP64, STOCK, relative_error
from tests.models import LLAMA3_SCALING, pico_config
from torch import Tensor

from latentize.attention.grouped import rms_norm
from latentize.attention.latent import LatentWeights, latent_attention
from latentize.families import model_spec
from latentize.formats.deepseek_v3 import (
    DELTA,
    DELTA_FP16,
    EPS,
    NORM_SHIFT,
    LatentNorm,
    decode_attention,
    encode_attention,
)
from latentize.formats.native import layer_entry
from latentize.formats.portable import portable_reasons
from latentize.methods.setting import Setting
from latentize.modeling.native import _empty_attention

H, U, R, N, V, RANK, D = 4, 2, 6, 5, 7, 9, 24
THETA = 300.0
POWERS = {2.0**n for n in range(-60, 60)}


def latent_weights(dtype: torch.dtype = torch.float64, scale: float = 1.0) -> LatentWeights:
    """One roped key on one ladder; no weight is near zero, so that what rounding loses can be seen."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        size = 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
        sign = torch.randn(shape, generator=generator, dtype=torch.float64).sign()
        return (scale * sign * size / shape[-1] ** 0.5).to(dtype)

    return LatentWeights(
        q_nope_HND=draw(H, N, D),
        q_rope_HRD=draw(H, R, D),
        kv_a_rD=draw(RANK, D),
        k_rope_PRD=draw(1, R, D),
        k_up_UNr=draw(U, N, RANK),
        v_up_UVr=draw(U, V, RANK),
        o_DHV=draw(D, H, V),
        frequencies_PF=torch.tensor([[THETA ** (-2 * j / R) for j in range(R // 2)]], dtype=torch.float64),
        softmax_scale=0.4,
    )


CONFIG: dict[str, Any] = {
    "num_attention_heads": H,
    "kv_lora_rank": RANK,
    "qk_rope_head_dim": R,
    "qk_nope_head_dim": N,
    "v_head_dim": V,
    "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
}


def latent_rms(w: LatentWeights, x: Tensor) -> tuple[float, float]:
    squares = (x @ w.kv_a_rD.T).square().mean(-1)
    return float(squares.max()) ** 0.5, float(squares.mean()) ** 0.5


@pytest.mark.parametrize("stream_scale", [1.0, math.sqrt(0.1)])
def test_decoding_inverts_encoding(stream_scale: float) -> None:
    """The same layer, whose input comes ``NORM_SHIFT`` times smaller and whose output ``stream_scale`` times."""
    w, x = latent_weights(), torch.randn(2, 9, D, dtype=torch.float64)
    # A mean of zero switches the gain correction off: the norm is taken as linear here.
    norm = LatentNorm.of(latent_rms(w, x)[0], 0.0)
    back = decode_attention(encode_attention(w, norm, stream_scale), CONFIG)
    assert replace(back.spec, up_heads=U) == replace(w.spec, softmax_scale=(N + R) ** -0.5)
    expected = latent_attention(x, w, absorb=False) * stream_scale
    assert relative_error(latent_attention(x * NORM_SHIFT, back, absorb=False), expected) <= FP64
    assert relative_error(latent_attention(x * NORM_SHIFT, back, absorb=True), expected) <= FP64


def test_encoding_inverts_decoding() -> None:
    """Tensor for tensor: names, shapes and order of rows."""
    w, norm = latent_weights(), LatentNorm.of(2.0, 0.0)
    tensors = encode_attention(w, norm)
    # What was decoded takes inputs that are smaller already; put that back into its weights.
    d = decode_attention(tensors, CONFIG)
    fields = ("q_nope_HND", "q_rope_HRD", "kv_a_rD", "k_rope_PRD")
    d = replace(d, **{name: getattr(d, name) * NORM_SHIFT for name in fields})
    again = encode_attention(d, norm)
    # Once more from what is known: the decoded weights carry the norm's leftover in the up-projections.
    for name in ("q_proj.weight", "kv_a_proj_with_mqa.weight", "kv_a_layernorm.weight", "o_proj.weight"):
        assert again[name].shape == tensors[name].shape, name
    assert relative_error(again["q_proj.weight"], tensors["q_proj.weight"]) <= FP64
    assert relative_error(again["o_proj.weight"], tensors["o_proj.weight"]) <= FP64
    ratio = again["kv_a_proj_with_mqa.weight"] / tensors["kv_a_proj_with_mqa.weight"]
    assert relative_error(ratio[RANK:], torch.ones_like(ratio[RANK:])) <= FP64
    assert float(ratio[:RANK].std()) <= FP64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_transformers_attention_computes_it(dtype: torch.dtype) -> None:
    """Stock ``DeepseekV3Attention`` with the encoded tensors, its RMSNorm active."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

    w, x = latent_weights(dtype), torch.randn(2, 9, D, dtype=dtype)
    config = DeepseekV3Config(**CONFIG, hidden_size=D, num_key_value_heads=H, q_lora_rank=None, rms_norm_eps=EPS)
    config._attn_implementation = "sdpa"
    attention = DeepseekV3Attention(config, 0).to(dtype).eval()
    attention.load_state_dict(encode_attention(w, LatentNorm.of(*latent_rms(w, x))))
    rotary = DeepseekV3RotaryEmbedding(config)(x, torch.arange(9)[None])
    with torch.no_grad():
        got = attention(x * NORM_SHIFT, position_embeddings=rotary, attention_mask=None)[0]
    assert relative_error(got, latent_attention(x, w, absorb=False)) <= STOCK


@given(largest=st.floats(1e-4, 1e4), ratio=st.floats(0.01, 1.0))
def test_latent_norm_is_made_of_powers_of_two(largest: float, ratio: float) -> None:
    norm = LatentNorm.of(largest, ratio * largest)
    assert norm.latent in POWERS
    assert norm.weight in POWERS
    assert 0.7 < norm.up < 1.42
    # The largest token is below delta, by less than a factor of two.
    assert 0.49 < norm.latent * largest / math.sqrt(DELTA * EPS) <= 1 + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp16_has_larger_latents(dtype: torch.dtype) -> None:
    size = LatentNorm.stored_as(dtype, 1.0, 0.5).latent / math.sqrt(EPS)
    assert size == pytest.approx(2.0**-5 if dtype == torch.float16 else 2.0**-8, rel=0.5)


@given(largest=st.floats(1e-3, 1e3), mean=st.floats(0.05, 1.0), seed=st.integers(0, 99))
def test_the_norm_is_linear_to_delta(largest: float, mean: float, seed: int) -> None:
    """In float32, for every token up to the largest, relative to that token."""
    y = torch.randn(40, 64, generator=torch.Generator().manual_seed(seed))
    y = y / y.square().mean(-1, keepdim=True).sqrt() * torch.linspace(0.01, 1.0, 40)[:, None] * largest
    norm = LatentNorm.of(largest, mean * largest)
    got = rms_norm(y * norm.latent, torch.full((64,), norm.weight), EPS) * norm.up
    error = (got - y).norm(dim=-1) / y.norm(dim=-1)
    assert float(error.max()) <= DELTA


def test_the_gain_is_made_good_for_the_mean_token() -> None:
    """A token of mean size comes out exactly, where the bare norm shrinks it."""
    norm, bare = LatentNorm.of(1.0, 1.0, delta=0.5), LatentNorm.of(1.0, 0.0, delta=0.5)
    y = torch.ones(1, 8, dtype=torch.float64)
    got, shrunk = (rms_norm(y * n.latent, torch.full((8,), n.weight), EPS) * n.up for n in (norm, bare))
    assert relative_error(got, y) <= FP64
    assert relative_error(shrunk, y) > 0.01


@pytest.mark.parametrize(("hidden", "delta"), [(64, DELTA), (4096, DELTA_FP16)])
def test_no_encoded_weight_is_subnormal_in_half_precision(hidden: int, delta: float) -> None:
    """Weights of the usual size ``hidden ** -0.5``, normalised inputs, and a first token four times the mean.

    Wide models need a larger delta for it, which what is saved in fp16 has.
    """
    w = latent_weights(scale=(D / hidden) ** 0.5)
    w = replace(w, k_up_UNr=latent_weights().k_up_UNr, v_up_UVr=latent_weights().v_up_UVr)
    for name, tensor in encode_attention(w, LatentNorm.of(4.0, 1.0, delta=delta), math.sqrt(0.1)).items():
        half = tensor.to(torch.float16)
        assert torch.isfinite(half).all(), name
        assert half.abs().min() >= torch.finfo(torch.float16).tiny, name


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1e-2])
def test_a_scaled_stream_has_another_epsilon(eps: float) -> None:
    """``RMSNorm(a x; a² eps) = RMSNorm(x; eps)``: how a model with any epsilon becomes one with 1e-6."""
    x, weight = 0.003 * torch.randn(5, 16, dtype=torch.float64), torch.rand(16, dtype=torch.float64)
    a = math.sqrt(EPS / eps)
    assert relative_error(rms_norm(a * x, weight, EPS), rms_norm(x, weight, eps)) <= FP64
    if eps != EPS:
        assert relative_error(rms_norm(x, weight, EPS), rms_norm(x, weight, eps)) > 0.01


def reasons(family: str = "llama", kv_heads: int = 2, setting: Setting | None = None, **config: Any) -> list[str]:
    entries = json.loads(pico_config(family, kv_heads, **config).to_json_string(use_diff=False))
    return portable_reasons(model_spec(entries), setting or Setting("transmla", 16, 8, freqfold=2))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_what_the_portable_format_holds(family: str) -> None:
    assert reasons(family) == []
    assert reasons(family, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 5e5}) == []


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"family": "qwen2"}, "biases"),
        ({"family": "qwen3"}, "normalised"),
        ({"attention_bias": True}, "biases"),
        ({"mlp_bias": True}, "MLP"),
        ({"rope_parameters": LLAMA3_SCALING}, "llama3"),
        ({"setting": Setting("mha2mla", 16, 8, 2, selection="uniform", svd="joint")}, "2 roped keys"),
        ({"kv_heads": 1, "setting": Setting("mha2mla", 16, 8, 1, selection="2-norm", svd="joint")}, "ladder"),
        ({"kv_heads": 1, "setting": Setting("mha2mla", 16, 8, 1, selection="low", svd="joint")}, "ladder"),
    ],
    ids=lambda a: a if isinstance(a, str) else None,
)
def test_what_it_cannot_hold_is_said(arguments: dict[str, Any], word: str) -> None:
    found = reasons(**arguments)
    assert len(found) == 1
    assert word in found[0]


@pytest.mark.parametrize("biases", [False, True])
def test_a_native_layer_is_rebuilt_from_its_entry(biases: bool) -> None:
    """``config.json`` says all that an empty layer needs to take its tensors."""
    from latentize.modeling.attention import LatentAttention

    w = latent_weights(torch.float32)
    if biases:
        w = replace(
            w,
            q_nope_bias_HN=torch.randn(H, N),
            q_rope_bias_HR=torch.randn(H, R),
            k_rope_bias_PR=torch.randn(1, R),
            o_bias_D=torch.randn(D),
        )
    table = tuple(w.frequencies_PF[0].tolist())
    full = LatentAttention.from_weights(w, frequency_table=table)
    entry = json.loads(json.dumps(layer_entry(w)))
    empty = _empty_attention(entry, 1, table)
    empty.load_state_dict(full.state_dict(), strict=True)
    x = torch.randn(1, 6, D)
    assert relative_error(empty(x)[0], latent_attention(x, w, absorb=False)) <= FP32
