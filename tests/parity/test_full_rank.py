"""No compression, no loss: the source's logits, for every family."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.common import FP32, SMALL, STOCK, logits, printable_bytes, random_tokens, relative_error
from tests.models import FAMILIES, LLAMA3_SCALING, ONLY_MHA, YARN_SCALING

import latentize
from latentize.text.tokenizer import load_tokenizer

CASES: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES if family not in ("gemma4_text", "hunyuan_v1_dense")),
    ("llama", {"rope_parameters": LLAMA3_SCALING, "rms_norm_eps": 1e-5}),
    ("llama", {"rope_parameters": YARN_SCALING}),
    ("qwen3", {"rope_parameters": {**YARN_SCALING, "attention_factor": 1.3}}),
    ("smollm3", {"rope_parameters": YARN_SCALING}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True}),
    ("mistral", {"head_dim": 8, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 32, "attention_bias": True, "rms_norm_eps": 1e-2}),
    ("phi3", {"partial_rotary_factor": 0.5}),
    ("smollm3", {"attention_bias": True, "mlp_bias": True}),
    ("gemma2", {"attention_bias": True, "attn_logit_softcapping": None, "final_logit_softcapping": 5.0}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
]


@pytest.mark.parametrize("kv_heads", [1, 2, 4], ids=["MQA", "GQA", "MHA"])
@pytest.mark.parametrize(("family", "config"), CASES, ids=[f"{f}-{'-'.join(c) or 'plain'}" for f, c in CASES])
def test_native_at_full_rank_is_the_source(
    source: Callable[..., Path], text: str, tmp_path: Path, family: str, config: dict[str, Any], kv_heads: int
) -> None:
    if family in ONLY_MHA:
        kv_heads = 4
    model, out = source(family, kv_heads, **config), tmp_path / "out"
    report = latentize.convert(model, out, method="mha2mla", keep="100%", format="native", data=(text,), **SMALL)
    tokens = random_tokens()
    assert relative_error(logits(out, tokens), logits(model, tokens)) <= FP32
    assert report["format"] == "native"
    # Keys as they are; values too, unless there are more of them than the hidden state is wide.
    keys = kv_heads * config.get("head_dim", 16)
    cache = keys + min(keys, 64)
    if family == "gpt2":
        # What does not turn is in the latent as well: it holds the hidden state.
        cache = 4 * 8 + 64
    assert report["source_cache_values_per_token_layer"] == 2 * keys
    assert report["cache_values_per_token_layer"] == cache
    assert report["kl"] == pytest.approx(0, abs=1e-6)
    assert report["top1_agreement"] == 1
    assert all(layer["error_after_refine"] <= 1e-8 for layer in report["layers"])
    verdict = latentize.verify(out)
    assert verdict["absorbed_error"] <= FP32
    assert verdict["decode_error"] <= FP32
    assert verdict["cache_values_per_token_layer"] == cache


@pytest.mark.parametrize("kv_heads", [1, 2, 4], ids=["MQA", "GQA", "MHA"])
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("qwen3", {}),
        ("qwen3", {"head_dim": 24, "rms_norm_eps": 1e-2}),
        ("qwen3_moe", {}),
        ("hunyuan_v1_dense", {}),
        ("hunyuan_v1_dense", {"head_dim": 24, "rms_norm_eps": 1e-2}),
        ("olmo2", {"rms_norm_eps": 1e-2}),
        ("olmo3", {}),
        ("exaone4", {}),
        ("apertus", {}),
        ("gemma3_text", {}),
        ("lfm2", {}),
        ("qwen3_5_text", {}),
        ("qwen3_next", {"tie_word_embeddings": True}),
    ],
    ids=lambda c: c if isinstance(c, str) else "-".join(c) or "plain",
)
def test_norms_are_exact_beside_keys_that_heads_share(
    source: Callable[..., Path], tmp_path: Path, family: str, config: dict[str, Any], kv_heads: int
) -> None:
    """All components of all heads in one roped key, at their own frequencies, and a factor for each norm."""
    model, out, text = source(family, kv_heads, **config), tmp_path / "out", tmp_path / "text.txt"
    # Inputs that the calibration has not seen may lie where its latent has no direction: it sees every byte.
    text.write_text(printable_bytes())
    keys = kv_heads * config.get("head_dim", 16)
    options = {"format": "native", "kv_lora_rank": min(keys, 64), "qk_rope_head_dim": keys, **SMALL}
    report = latentize.convert(model, out, data=(str(text),), **options)
    tokens = torch.tensor([load_tokenizer(model)(text.read_text()[:200])["input_ids"]])
    assert relative_error(logits(out, tokens), logits(model, tokens)) <= FP32
    norms = 1 if family in ("olmo2", "olmo3") else kv_heads
    assert report["setting"]["key_scales"] == norms
    cache = keys + min(keys, 64) + norms
    assert report["cache_values_per_token_layer"] == cache
    assert report["linear_fit_excess_loss"] is None, "nothing is fitted"
    verdict = latentize.verify(out)
    assert verdict["absorbed_error"] <= FP32
    assert verdict["decode_error"] <= FP32
    assert verdict["cache_values_per_token_layer"] == cache


@pytest.mark.parametrize("kv_heads", [1, 2, 4], ids=["MQA", "GQA", "MHA"])
@pytest.mark.parametrize("config", [{}, {"rms_norm_eps": 1e-2, "enable_moe_block": False}], ids=["experts", "dense"])
def test_a_latent_holds_keys_that_are_values_once(
    source: Callable[..., Path], tmp_path: Path, config: dict[str, Any], kv_heads: int
) -> None:
    """One projection makes both, so a latent as large as the keys is exact: half of what the source caches, what
    rotates, and a factor for each norm."""
    text = tmp_path / "text.txt"
    text.write_text(printable_bytes())
    model, out = source("gemma4_text", 2, num_global_key_value_heads=kv_heads, **config), tmp_path / "out"
    if not config:
        # Half of the keys are nothing to anybody, all of the values are something.
        tensors = load_file(model / "model.safetensors")
        tensors["model.layers.1.self_attn.k_norm.weight"][::2] = 0
        model = tmp_path / "without"
        shutil.copytree(source("gemma4_text", 2, num_global_key_value_heads=kv_heads), model)
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
    rank, rope = min(kv_heads * 32, 64), kv_heads * 8
    options = {"format": "native", "kv_lora_rank": rank, "qk_rope_head_dim": rope, **SMALL}
    report = latentize.convert(model, out, data=(str(text),), **options)
    tokens = torch.tensor([load_tokenizer(model)(text.read_text()[:200])["input_ids"]])
    assert relative_error(logits(out, tokens), logits(model, tokens)) <= FP32
    assert report["source_cache_values_per_token_layer"] == 2 * kv_heads * 32
    assert report["cache_values_per_token_layer"] == rank + rope + kv_heads
    assert report["linear_fit_excess_loss"] is None, "nothing is fitted"
    verdict = latentize.verify(out)
    assert verdict["absorbed_error"] <= FP32
    assert verdict["decode_error"] <= FP32


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("llama", {"rms_norm_eps": 1e-2}),
        ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-2}),
        ("mistral", {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}),
        ("granite", {"rms_norm_eps": 1e-5}),
        ("phi3", {}),
        ("granite", {"tie_word_embeddings": True}),
    ],
    ids=lambda c: c if isinstance(c, str) else "-".join(c) or "plain",
)
def test_mqa_in_a_stock_deepseek_checkpoint_is_the_source(
    source: Callable[..., Path], text: str, tmp_path: Path, family: str, config: dict[str, Any]
) -> None:
    """One kv head is one shared roped key and a latent of one value head; only the latent's norm is not exact."""
    model, out = source(family, 1, **config), tmp_path / "out"
    sizes = {"kv_lora_rank": 16, "qk_rope_head_dim": 16}
    report = latentize.convert(model, out, method="transmla", format="deepseek_v3", data=(text,), **sizes, **SMALL)
    assert report["setting"]["freqfold"] == 1
    tokens = random_tokens()
    assert relative_error(logits(out, tokens), logits(model, tokens)) <= STOCK
    assert report["top1_agreement"] == 1
    assert latentize.verify(out)["cache_values_per_token_layer"] == 32


def test_bf16_costs_no_more_than_bf16(source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    """The default precision, on weights that are not representable in it."""
    model, out = source("llama", 2), tmp_path / "out"
    options = {**SMALL, "dtype": "bfloat16"}
    report = latentize.convert(model, out, method="mha2mla", keep="100%", format="native", data=(text,), **options)
    tokens = random_tokens()
    error = relative_error(logits(out, tokens), logits(model, tokens))
    assert 1e-4 < error < 0.1
    assert report["kl"] < 0.01
    assert latentize.verify(out)["ok"]
