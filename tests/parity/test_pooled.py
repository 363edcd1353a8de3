"""Head pooling gives the source's own architecture, with averaged heads and nothing else changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.common import FP32, SMALL, logits, random_tokens, relative_error
from transformers import AutoConfig, AutoModelForCausalLM

import latentize

CASES: list[tuple[str, dict[str, Any], int, dict[str, Any], int]] = [
    ("llama", {}, 4, {"to": "gqa", "keep": "50%"}, 2),
    ("llama", {"tie_word_embeddings": True}, 4, {"to": "mqa"}, 1),
    ("llama", {"attention_bias": True}, 2, {"to": "mqa"}, 1),
    ("mistral", {}, 4, {"to": "gqa"}, 1),
    ("phi3", {}, 4, {"to": "gqa", "keep": "50%"}, 2),
    ("qwen2", {}, 4, {"to": "gqa", "keep": "50%"}, 2),
    ("qwen3", {"tie_word_embeddings": True}, 4, {"to": "gqa", "keep": "60%"}, 2),
]


def pooled_by_hand(folder: Path, kv_heads: int) -> Any:
    """The source in transformers, with the mean of neighbouring kv heads."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    config.num_key_value_heads = kv_heads
    tensors = {}

    def mean(tensor: Any) -> Any:
        heads = tensor.reshape(kv_heads, -1, config.head_dim, *tensor.shape[1:])
        return heads.mean(1).reshape(kv_heads * config.head_dim, *tensor.shape[1:])

    for name, tensor in model.state_dict().items():
        if "qkv_proj" in name:
            q, k, v = tensor.split((len(tensor) - 8 * config.head_dim, 4 * config.head_dim, 4 * config.head_dim))
            tensor = torch.cat([q, mean(k), mean(v)])
        elif "k_proj" in name or "v_proj" in name:
            tensor = mean(tensor)
        tensors[name] = tensor
    pooled = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    pooled.load_state_dict(tensors)
    return pooled.eval()


@pytest.mark.parametrize(
    ("family", "config", "before", "recipe", "after"), CASES, ids=[f"{c[0]}-{c[2]}-{c[4]}" for c in CASES]
)
def test_pooled_output_is_pooling_by_hand(
    source: Callable[..., Path],
    text: str,
    tmp_path: Path,
    family: str,
    config: dict[str, Any],
    before: int,
    recipe: dict[str, Any],
    after: int,
) -> None:
    model, out = source(family, before, **config), tmp_path / "out"
    report = latentize.convert(model, out, data=(text,), **recipe, **SMALL)
    tokens = random_tokens()
    with torch.no_grad():
        expected = pooled_by_hand(model, after)(input_ids=tokens).logits
    assert relative_error(logits(out, tokens), expected) <= FP32
    assert relative_error(logits(model, tokens), expected) > 0.01
    assert (report["format"], report["method"]) == (family, "mean-pool")
    assert report["num_key_value_heads"] == after
    assert report["cache_values_per_token_layer"] == 2 * after * 16
    written = json.loads((out / "config.json").read_text())
    assert written["num_key_value_heads"] == after
    assert written["model_type"] == family
    verdict = latentize.verify(out)
    assert verdict["cache_values_per_token_layer"] == 2 * after * 16
    assert verdict["decode_error"] <= FP32
    assert ("lm_head.weight" in load_file(str(out / "model.safetensors"))) != bool(config.get("tie_word_embeddings"))


def test_pooled_weights_are_rounded_once(source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    """The mean is taken in float32 and saved in bf16; what is not pooled is only rounded."""
    model, out = source("qwen2", 4), tmp_path / "out"
    latentize.convert(model, out, to="gqa", keep="50%", data=(text,), **{**SMALL, "dtype": "bfloat16"})
    was, now = (load_file(str(folder / "model.safetensors")) for folder in (model, out))
    assert was.keys() == now.keys()
    for name, tensor in was.items():
        if "k_proj" in name or "v_proj" in name:
            heads = tensor.reshape(2, 2, 16, *tensor.shape[1:])
            tensor = heads.mean(1).reshape(32, *tensor.shape[1:])
        assert torch.equal(now[name], tensor.bfloat16()), name
