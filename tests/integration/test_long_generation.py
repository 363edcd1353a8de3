"""Long contexts on real sizes: the trained model, and the sizes that kernels are made for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.common import relative_error
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3Config

import latentize
from latentize.text.documents import stdlib_documents
from latentize.text.tokens import pack

BUNDLED = Path(__file__).parents[2] / "models" / "tiny-llama-gqa"
PROMPT, NEW = 2000, 64


def converted(folder: Path) -> tuple[Any, torch.Tensor]:
    """The bundled model at a quarter of its cache, and text that it was not calibrated on."""
    out = folder / "out"
    latentize.convert(BUNDLED, out, fast=True, kv_lora_rank=20, qk_rope_head_dim=12, tokens=8192)
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = pack(tokenizer, stdlib_documents("heldout"), tokens=PROMPT, sequence_length=PROMPT)
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), text


def random(folder: Path) -> tuple[Any, torch.Tensor]:
    """Latents of 512 + 64, heads of 128 + 64, as DeepSeek's."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=1000,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        q_lora_rank=None,
        first_k_dense_replace=2,
        max_position_embeddings=4096,
        initializer_range=0.1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32), torch.randint(1, 1000, (1, PROMPT))


@pytest.mark.parametrize("make", [converted, random])
def test_a_long_answer_to_a_long_prompt_is_the_stock_models(make: Any, tmp_path: Path) -> None:
    stock, prompt = make(tmp_path)
    stock = stock.eval()
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    fast = latentize.accelerate(copy.deepcopy(stock))
    expected, made = stock.generate(prompt, **options), fast.generate(prompt, **options)
    assert made.sequences.shape == (1, PROMPT + NEW)
    assert torch.equal(made.sequences, expected.sequences)
    assert relative_error(torch.stack(made.logits), torch.stack(expected.logits)) <= 1e-4
