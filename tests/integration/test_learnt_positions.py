"""GPT-2: positions that are learnt instead of RoPE, projections that are stored inputs first."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.common import FP32, SMALL, call_cli, random_tokens, relative_error
from transformers import AutoModelForCausalLM

import latentize
from latentize.errors import OptionError, UnsupportedModelError
from latentize.families import model_spec
from latentize.families.described import described
from latentize.modeling.load import load_model

# Positions of a picomodel.
LEARNT = 256


@pytest.fixture
def model(source: Callable[..., Path]) -> Path:
    return source("gpt2", 4)


def test_a_latent_as_wide_as_the_hidden_state_is_exact(model: Path, text: str, tmp_path: Path) -> None:
    """Keys and values together are twice as many, and all are made from it: nothing is lost at half of them."""
    out = tmp_path / "out"
    report = latentize.convert(model, out, kv_lora_rank=64, qk_rope_head_dim=2, data=(text,), **SMALL)
    assert report["format"] == "native" and report["source_cache_values_per_token_layer"] == 128
    tokens = random_tokens(2, LEARNT)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(tokens).logits
        assert relative_error(load_model(out)(tokens).logits, expected) <= FP32
    made = json.loads((out / "config.json").read_text())
    assert made["frequency_table"] == [0.0]


def test_half_of_the_values_keep_what_does_not_rotate_in_the_latent(model: Path, text: str, tmp_path: Path) -> None:
    report = latentize.convert(model, tmp_path / "out", keep="50%", data=(text,), **SMALL)
    assert [(layer["kv_lora_rank"], layer["qk_rope_head_dim"]) for layer in report["layers"]] == [(62, 2)] * 2
    assert report["kl"] < 1e-3


def test_where_learnt_positions_end(model: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    with pytest.raises(OptionError, match="257 tokens, and the model has learnt 256 positions"):
        latentize.convert(model, out, keep="50%", data=(text,), **{**SMALL, "sequence_length": LEARNT + 1})
    assert not out.exists()
    latentize.convert(model, out, keep="50%", data=(text,), **SMALL)
    for folder in (model, out):
        load_model(folder)(random_tokens(1, LEARNT))
        with pytest.raises(OptionError, match="has learnt 256 positions"):
            load_model(folder)(random_tokens(1, LEARNT + 1))
        said = call_cli(capsys, "generate", str(folder), "abc", "--max-new-tokens", "300")
        assert said.returncode == 2 and "has learnt 256 positions" in said.stderr


@pytest.mark.parametrize(
    "changes",
    [
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"add_cross_attention": True},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ],
)
def test_what_is_another_attention_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match=next(iter(changes))) as refused:
        model_spec({"model_type": "gpt2", **changes})
    assert refused.value.code == "LZ212"
    spec = model_spec({"model_type": "gpt2"})
    assert spec.attention.hidden_size == 768 and spec.intermediate_size == 3072
    assert described(spec)["rope"] is None and described(spec)["max_position_embeddings"] == 1024
