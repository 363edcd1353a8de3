"""RoPE whose frequencies depend on the length of a text: LongRoPE (Phi-3.5, Phi-4-mini) and dynamic NTK's scaling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.common import FP32, SMALL, call_cli, last_json, random_tokens, relative_error
from tests.models import ONLY_MHA, YARN_SCALING, pico_config
from tests.unit.attention.test_rope import rotary
from transformers import DynamicCache

import latentize
from latentize import LatentCache
from latentize.errors import ConfigError, FormatError, OptionError
from latentize.families import model_spec
from latentize.modeling.load import load_model
from latentize.planning.inspection import plan

# Tokens that the usual frequencies are for.
LENGTH = 24


def longrope(pairs: int, **more: Any) -> dict[str, Any]:
    """With factors that no rule would guess."""
    short = [1.0 + 0.05 * f for f in range(pairs)]
    long = [1.3 + 0.9 * f for f in range(pairs)]
    return {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": short, "long_factor": long, **more}


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": longrope(8, original_max_position_embeddings=LENGTH, factor=4.0)}),
    "phi3": ("phi3", {"original_max_position_embeddings": LENGTH, "rope_parameters": longrope(8)}),
    # Phi-4-mini: of a part of each head, and a factor on that part.
    "phi3, a part": (
        "phi3",
        {
            "original_max_position_embeddings": LENGTH,
            "rope_parameters": longrope(6, partial_rotary_factor=0.75),
            "partial_rotary_factor": 0.75,
        },
    ),
    "qwen3": (
        "qwen3",
        {"rope_parameters": longrope(8, original_max_position_embeddings=LENGTH, attention_factor=1.1)},
    ),
    "dynamic": (
        "llama",
        {
            "max_position_embeddings": LENGTH,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0},
        },
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_frequencies_are_those_of_transformers(name: str) -> None:
    family, changes = MODELS[name]
    config = pico_config(family, **changes)
    spec, module = model_spec(config.to_dict()).attention, rotary(family, config)
    assert spec.rope.length == LENGTH
    assert spec.rope.attention_factor == pytest.approx(module.attention_scaling)
    for tokens in (1, LENGTH, LENGTH + 1, 3 * LENGTH, 40):
        # A text of its own each: transformers remembers the longest.
        module = rotary(family, config)
        module(torch.zeros(1), torch.tensor([[tokens - 1]]))
        ours = torch.tensor(spec.rope.at_length(tokens))
        assert torch.allclose(ours, module.inv_freq, rtol=FP32, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_at_full_rank_it_is_the_source(source: Callable[..., Path], text: str, tmp_path: Path, name: str) -> None:
    """Short texts and long ones, and step by step over the border, as the source with a cache of its own."""
    family, changes = MODELS[name]
    model, out = source(family, 2, **changes), tmp_path / "out"
    options = {**SMALL, "sequence_length": LENGTH}
    latentize.convert(model, out, method="mha2mla", keep="100%", format="native", data=(text,), **options)
    made, theirs = load_model(out, dtype=torch.float32), load_model(model, dtype=torch.float32)
    for length in (LENGTH, LENGTH + 1, 3 * LENGTH):
        tokens = random_tokens(2, length)
        assert relative_error(made(tokens).logits, theirs(tokens).logits) < 1e-5
    fast = latentize.accelerate(load_model(out, dtype=torch.float32))
    tokens = random_tokens(2, LENGTH + 8)
    caches = DynamicCache(), DynamicCache(), LatentCache(made.config)
    for start, stop in [
        (0, LENGTH - 3),
        *((t, t + 1) for t in range(LENGTH - 3, LENGTH + 4)),
        (LENGTH + 4, LENGTH + 8),
    ]:
        part = tokens[:, start:stop]
        own, latent, quick = (
            each(part, past_key_values=cache).logits for each, cache in zip((theirs, made, fast), caches, strict=True)
        )
        assert relative_error(latent, own) < 1e-5
        assert relative_error(quick, own) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2"])
def test_pairs_in_proportion(source: Callable[..., Path], text: str, tmp_path: Path, family: str) -> None:
    """Gemma 4's: the fast pairs of a whole head turn, the slow ones do not."""
    rope = {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "factor": 2.0}
    model, out = source(family, 2, rope_parameters=rope), tmp_path / "out"
    latentize.convert(model, out, method="mha2mla", keep="100%", format="native", data=(text,), **SMALL)
    made, theirs = load_model(out, dtype=torch.float32), load_model(model, dtype=torch.float32)
    tokens = random_tokens(2, 40)
    assert relative_error(made(tokens).logits, theirs(tokens).logits) < 1e-5
    report = latentize.convert(model, tmp_path / "quarter", keep="25%", data=(text,), **SMALL)
    assert 0.2 < report["keep"] <= 0.25


@torch.no_grad()
@pytest.mark.parametrize("family", ["glm", "gpt_neox", "stablelm"])
def test_a_factor_on_a_part_of_each_head(source: Callable[..., Path], text: str, tmp_path: Path, family: str) -> None:
    """YaRN's, on what is rotated alone: pairs side by side, fused projections with biases, plain ones."""
    kv_heads = 4 if family in ONLY_MHA else 2
    rope = {**YARN_SCALING, "original_max_position_embeddings": 16, "partial_rotary_factor": 0.5}
    model, out = source(family, kv_heads, rope_parameters=rope), tmp_path / "out"
    assert model_spec(load_model(model).config.to_dict()).attention.rope.attention_factor > 1.1
    latentize.convert(model, out, method="mha2mla", keep="100%", format="native", data=(text,), **SMALL)
    made, theirs = load_model(out, dtype=torch.float32), load_model(model, dtype=torch.float32)
    tokens = random_tokens(2, 40)
    assert relative_error(made(tokens).logits, theirs(tokens).logits) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["phi3, a part", "llama", "dynamic"])
def test_it_writes_over_the_border_what_the_source_writes(
    source: Callable[..., Path], text: str, tmp_path: Path, name: str
) -> None:
    """Phi-3's own class makes its cache anew there, others go on; from caches of transformers and ours."""
    family, changes = MODELS[name]
    model, out = source(family, 2, **changes), tmp_path / "out"
    options = {**SMALL, "sequence_length": LENGTH}
    latentize.convert(model, out, method="mha2mla", keep="100%", format="native", data=(text,), **options)
    made, theirs = load_model(out, dtype=torch.float32), load_model(model, dtype=torch.float32)
    prompt = random_tokens(2, LENGTH - 5)
    writing: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = theirs.generate(prompt, **writing)
    assert made.generate(prompt, **writing).equal(expected)
    assert made.generate(prompt, **writing, past_key_values=LatentCache(made.config)).equal(expected)
    assert latentize.accelerate(made).generate(prompt, **writing).equal(expected)


@pytest.mark.parametrize("name", ["phi3, a part", "dynamic"])
def test_a_quarter_is_kept(source: Callable[..., Path], text: str, tmp_path: Path, name: str) -> None:
    family, changes = MODELS[name]
    model, out = source(family, 2, **changes), tmp_path / "out"
    report = latentize.convert(model, out, keep="25%", data=(text,), **{**SMALL, "sequence_length": LENGTH})
    assert report["format"] == "native" and 0.2 < report["keep"] <= 0.25
    for length in (LENGTH, 2 * LENGTH):
        options: dict[str, Any] = {"tokens": 480, "sequence_length": length, "data": (text,), "split": "heldout"}
        measured = latentize.evaluate(out, model, **options)
        assert 0 < measured["kl"] < 10 * report["kl"], "longer texts are read with their frequencies"
    prompt, options = random_tokens(1, LENGTH - 4), {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    made = load_model(out)
    expected = made.generate(prompt, **options)
    assert latentize.accelerate(made).generate(prompt, **options).equal(expected)


def test_what_cannot_be_kept_is_said(
    source: Callable[..., Path], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family, changes = MODELS["phi3"]
    model = source(family, 2, **changes)
    with pytest.raises(OptionError, match="means of keys"):
        plan(str(model), bytes="25%")
    assert "'8 numbers'" in call_cli(capsys, "inspect", model).stdout
    assert last_json(call_cli(capsys, "inspect", model, "--json").stdout)["rope"]["short_factor"][1] == 1.05
    with pytest.raises(OptionError, match="means of keys"):
        latentize.convert(model, tmp_path / "out", bytes="25%", data=(text,), **SMALL)
    with pytest.raises(FormatError, match="texts of more than 24 tokens"):
        latentize.convert(model, tmp_path / "out", keep="50%", format="deepseek_v3", data=(text,), **SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"short_factor": [1.0] * 7}, "shorter|longer"),
        ({"long_factor": [0.0] * 8}, "make no sense"),
        ({"long_factor": "much"}, "make no sense"),
        ({"original_max_position_embeddings": 0}, "make"),
    ],
)
def test_entries_that_make_no_sense(changes: dict[str, Any], said: str) -> None:
    entries = pico_config("llama").to_dict()
    given = longrope(8, original_max_position_embeddings=LENGTH, factor=4.0)
    with pytest.raises(ConfigError, match=said):
        model_spec({**entries, "rope_parameters": {**given, **changes}})
