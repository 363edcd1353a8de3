"""Random MLA models of transformers' own classes, and prompts for them."""

from __future__ import annotations

from typing import Any

import torch
from tests.models import randomize
from transformers import AutoConfig, AutoModelForCausalLM

# family: extra entries of its config
MLA = {
    "deepseek_v3": {"q_lora_rank": None, "first_k_dense_replace": 2, "rope_interleave": True},
    "deepseek_v3-half": {"q_lora_rank": 24, "first_k_dense_replace": 2, "rope_interleave": False},
    "deepseek_v2": {"q_lora_rank": None, "first_k_dense_replace": 2},
    "minicpm3": {"q_lora_rank": 24},
}


def random_model(model_type: str, kv_lora_rank: int, *, seed: int = 0, **own: Any) -> Any:
    """Two layers with 4 heads of 12 + 8, values of 10."""
    entries: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 257,
        "kv_lora_rank": kv_lora_rank,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 10,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(model_type, **{**entries, **own})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(model, seed)
    return model


def stock(name: str, **changes: Any) -> Any:
    """A random MLA model with latents of 14."""
    return random_model(name.split("-")[0], 14, **{**MLA[name], **changes})


def prompt(batch: int = 1, length: int = 23) -> torch.Tensor:
    return torch.randint(1, 257, (batch, length), generator=torch.Generator().manual_seed(batch * 100 + length))
