"""Frequencies and rotations are those of transformers, in both layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.common import FP32, FP64, relative_error
from tests.models import FAMILIES, LLAMA3_SCALING, WITHOUT_ROPE, YARN_SCALING, pico_config
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from latentize.attention.rope import half_to_interleaved, rope_angles, rotate_half, rotate_interleaved
from latentize.attention.spec import RopeSpec
from latentize.errors import UnsupportedModelError
from latentize.families import families
from latentize.families.config import model_spec, rope_spec
from latentize.modeling.body import body_of

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "llama3": LLAMA3_SCALING,
    "yarn": YARN_SCALING,
    "yarn, ends": {**YARN_SCALING, "attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    "yarn, mscale": {**YARN_SCALING, "mscale": 0.7, "mscale_all_dim": 0.4},
}
# Its pairs that do not turn are in the module's table, and not in ours.
PROPORTIONAL = {"rope_type": "proportional", "rope_theta": 1e4, "factor": 2.0, "partial_rotary_factor": 0.5}


def rotary(family: str, config: Any) -> Any:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return type(body_of(model).rotary_emb)(config)


# Phi-3's config takes LongRoPE or none; where kinds of layers have ladders of their own, the entry is nested.
@pytest.mark.parametrize(
    ("family", "scaling"),
    [
        (f, s)
        for f in sorted({*FAMILIES} - {*WITHOUT_ROPE})
        for s in (*SCALINGS, "proportional")
        if (s == "default" and f != "gemma4_text")
        or (s == "proportional" and f == "gemma4_text")
        or f not in ("phi3", "gemma3_text", "gemma4_text", "olmo3")
    ],
)
def test_frequencies_are_those_of_the_familys_rotary_module(family: str, scaling: str) -> None:
    given = dict(SCALINGS.get(scaling, PROPORTIONAL))
    plain = pico_config(family)
    for key in ("partial_rotary_factor", "llama_4_scaling_beta"):
        if key in plain.rope_parameters:
            given[key] = plain.rope_parameters[key]
    if "llama_4_scaling_beta" in given:
        given.setdefault("original_max_position_embeddings", 16)
    nested = "full_attention" in plain.rope_parameters
    config = plain if nested else pico_config(family, rope_parameters=given)
    before = model_spec(plain.to_dict()).attention
    in_part = given.get("partial_rotary_factor", 1.0) != 1
    if "yarn" in scaling and in_part and before.qk_norm:
        with pytest.raises(UnsupportedModelError, match="a factor on it"):
            model_spec(config.to_dict())
        return
    if scaling == "proportional" and families()[family].attention.get("partial"):
        with pytest.raises(UnsupportedModelError, match="a part of each head"):
            model_spec(config.to_dict())
        return
    spec = model_spec(config.to_dict()).attention
    ours = torch.tensor(spec.rope.frequencies)
    module = rotary(family, config)
    prefix = "full_attention_" if nested else ""
    factor = getattr(module, prefix + "attention_scaling")
    assert spec.rope.attention_factor == pytest.approx(factor) and (factor == 1) != ("yarn" in scaling)
    # That of gpt-oss is stretched unless the config says otherwise.
    unscaled = before.softmax_scale / before.logit_factor
    # Of a part of each head it is in the weights.
    assert spec.softmax_scale == pytest.approx(unscaled if in_part else factor**2 * unscaled)
    theirs = getattr(module, prefix + "inv_freq")
    if scaling == "proportional":
        assert not theirs[len(ours) :].any(), "pairs that do not turn"
        theirs = theirs[: len(ours)]
    assert relative_error(ours, theirs) <= FP32
    # A ladder spans decades: compare each rung too.
    assert torch.allclose(ours, theirs, rtol=FP32, atol=0)


@pytest.mark.parametrize("scaling", [name for name in SCALINGS if name != "default"])
def test_scaled_frequencies_are_those_of_transformers_table(scaling: str) -> None:
    config = pico_config(rope_parameters=dict(SCALINGS[scaling]))
    theirs, _ = ROPE_INIT_FUNCTIONS[SCALINGS[scaling]["rope_type"]](config, "cpu")
    ours = torch.tensor(rope_spec(config.to_dict(), 16).frequencies)
    assert torch.allclose(ours, theirs, rtol=FP32, atol=0)
    plain = torch.tensor(RopeSpec(10_000.0, 16).frequencies)
    assert not torch.allclose(ours, plain, rtol=1e-2), "the scaling does something"


def test_llama3_scaling_keeps_fast_divides_slow_and_ramps_between() -> None:
    """All three regions of the interpolation occur in the example that the other tests use."""
    plain = torch.tensor(RopeSpec(10_000.0, 32).frequencies)
    scaled = torch.tensor(rope_spec({"rope_parameters": LLAMA3_SCALING}, 32).frequencies)
    quotient = plain / scaled
    assert quotient[0] == 1
    assert quotient[-1] == pytest.approx(8.0)
    assert ((quotient > 1.001) & (quotient < 7.999)).any()


def test_unknown_scalings_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="nope"):
        _ = RopeSpec(10_000.0, 16, {"rope_type": "nope", "factor": 2.0}).frequencies


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_parameters": {"rope_theta": 5e5}}),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}},
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": {k: v for k, v in LLAMA3_SCALING.items() if k != "rope_theta"}},
            {"rope_parameters": LLAMA3_SCALING},
        ),
        ({}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    ],
    ids=["theta", "null-scaling", "linear", "llama3", "nothing"],
)
def test_both_generations_of_config_mean_the_same(old: dict[str, Any], new: dict[str, Any]) -> None:
    """``rope_theta`` with ``rope_scaling``, as hub checkpoints have it, and ``rope_parameters``."""
    sizes = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}
    assert model_spec({**sizes, **old}).attention.rope == model_spec({**sizes, **new}).attention.rope


@pytest.mark.parametrize("scaling", SCALINGS)
def test_parameters_are_what_transformers_reads(scaling: str) -> None:
    """``RopeSpec.parameters`` is the way back to a config."""
    spec = rope_spec({"rope_parameters": SCALINGS[scaling]}, 16)
    config = pico_config(rope_parameters=spec.parameters())
    assert rope_spec(config.to_dict(), 16) == spec
    assert torch.allclose(torch.tensor(spec.frequencies), rotary("llama", config).inv_freq, rtol=FP32, atol=0)


def frequencies() -> torch.Tensor:
    return torch.tensor([RopeSpec(100.0, 16).frequencies], dtype=torch.float64)


def test_rotate_half_is_transformers_rotation() -> None:
    q, k = torch.randn(2, 4, 12, 16), torch.randn(2, 2, 12, 16)
    positions = torch.stack([torch.arange(12), torch.arange(7, 19)])
    config = pico_config(rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    cos, sin = rotary("llama", config)(q, positions)
    their_q, their_k = apply_rotary_pos_emb(q, k, cos, sin)
    ours = rope_angles(frequencies(), positions)
    assert relative_error(rotate_half(q, *ours), their_q) <= FP32
    assert relative_error(rotate_half(k, *ours), their_k) <= FP32


def test_rotate_interleaved_is_deepseeks_rotation() -> None:
    """transformers reads pairs interleaved and leaves them in halves, for queries and keys alike."""
    q, positions = torch.randn(2, 4, 12, 16, dtype=torch.float64), torch.arange(12)[None]
    cos, sin = rope_angles(frequencies(), positions)
    twice_cos, twice_sin = (torch.cat([t, t], dim=-1)[:, 0] for t in (cos, sin))
    theirs, _ = apply_rotary_pos_emb_interleave(q, q, twice_cos, twice_sin)
    ours = rotate_interleaved(q, cos, sin)[..., half_to_interleaved(16).argsort()]
    assert relative_error(ours, theirs) <= FP64


@pytest.mark.parametrize("dim", [2, 6, 16])
def test_layouts_differ_by_an_order_of_rows_only(dim: int) -> None:
    x = torch.randn(2, 3, 5, dim, dtype=torch.float64)
    angles = rope_angles(torch.rand(1, dim // 2, dtype=torch.float64), torch.arange(5)[None])
    order = half_to_interleaved(dim)
    assert sorted(order.tolist()) == list(range(dim))
    interleaved = rotate_interleaved(x[..., order], *angles)
    assert relative_error(interleaved[..., order.argsort()], rotate_half(x, *angles)) <= FP64
    if dim > 2:
        assert relative_error(rotate_interleaved(x, *angles), rotate_half(x, *angles)) > 0.01


def test_rotation_is_multiplication_by_a_complex_number() -> None:
    x, w = torch.randn(1, 1, 9, 8, dtype=torch.float64), torch.rand(1, 4, dtype=torch.float64)
    turned = rotate_half(x, *rope_angles(w, torch.arange(9)[None]))
    as_complex = torch.complex(x[..., :4], x[..., 4:]) * torch.exp(1j * torch.arange(9)[:, None] * w[0])
    assert relative_error(turned, torch.cat([as_complex.real, as_complex.imag], dim=-1)) <= FP64


@pytest.mark.parametrize("rotate", [rotate_half, rotate_interleaved])
def test_partial_rope_passes_the_rest(rotate: Any) -> None:
    x = torch.randn(2, 3, 5, 10)
    angles = rope_angles(torch.rand(1, 3) + 0.1, torch.arange(1, 6)[None])
    turned = rotate(x, *angles)
    assert torch.equal(turned[..., 6:], x[..., 6:])
    assert torch.equal(turned[..., :6], rotate(x[..., :6], *angles))
    assert (turned[..., :6] - x[..., :6]).abs().amin(dim=(0, 1)).max() > 0


def test_each_head_may_have_its_own_frequencies() -> None:
    x, w = torch.randn(2, 3, 7, 8), torch.rand(3, 4)
    positions = torch.stack([torch.arange(7), torch.arange(5, 12)])
    together = rotate_half(x, *rope_angles(w, positions))
    for head in range(3):
        alone = rotate_half(x[:, head : head + 1], *rope_angles(w[head : head + 1], positions))
        assert torch.equal(together[:, head : head + 1], alone)


def test_logits_depend_on_distance_only() -> None:
    q, k = torch.randn(1, 1, 1, 16, dtype=torch.float64), torch.randn(1, 1, 1, 16, dtype=torch.float64)

    def logit(at: int, key_at: int) -> float:
        turn = [rope_angles(frequencies(), torch.tensor([[t]])) for t in (at, key_at)]
        return float((rotate_half(q, *turn[0]) * rotate_half(k, *turn[1])).sum())

    assert logit(9, 4) == pytest.approx(logit(105, 100), rel=FP64)
    assert logit(9, 4) != pytest.approx(logit(9, 5), rel=1e-3)
