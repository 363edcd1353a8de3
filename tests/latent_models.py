"""Small random models that have latent attention as they come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.mla import random_model
from tests.models import byte_tokenizer

_MOE = {
    "moe_intermediate_size": 48,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 128,
}
# name: model_type and entries of its config; one dense layer, then mixtures of experts
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2-lite": ("deepseek_v2", {**_MOE, "q_lora_rank": None, "topk_method": "greedy"}),
    "deepseek_v2-yarn": (
        "deepseek_v2",
        {**_MOE, "q_lora_rank": 24, "topk_method": "group_limited_greedy", "rope_parameters": _YARN},
    ),
    "deepseek_v3": ("deepseek_v3", {**_MOE, "q_lora_rank": 24, "rope_parameters": _YARN}),
    "deepseek_v3-bias": ("deepseek_v3", {**_MOE, "q_lora_rank": None, "attention_bias": True}),
    "glm4_moe_lite": ("glm4_moe_lite", {**_MOE, "q_lora_rank": 24, "rms_norm_eps": 1e-5}),
    "kimi_linear": (
        "kimi_linear",
        {
            **{name: value for name, value in _MOE.items() if name != "n_routed_experts"},
            "num_local_experts": 4,
            "q_lora_rank": None,
            "layer_types": ["linear_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse"],
            "linear_head_dim": 16,
            "linear_num_heads": 4,
            "linear_conv_kernel_dim": 4,
        },
    ),
    "mistral4": (
        "mistral4",
        {
            **_MOE,
            "num_local_experts": 4,
            "q_lora_rank": 24,
            # Queries grow every 16 tokens.
            "rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.3, "original_max_position_embeddings": 16},
        },
    ),
    "youtu": ("youtu", {"q_lora_rank": 24, "tie_word_embeddings": True}),
}


def mixture(name: str, *, seed: int = 0, **changes: Any) -> Any:
    """A random model: 4 heads of 12 + 8, values of 10, latents of 32."""
    model_type, own = MIXTURES[name]
    dense = {} if model_type in ("glm4_moe_lite", "kimi_linear") else {"first_k_dense_replace": 1}
    model = random_model(model_type, 32, seed=seed, **{"tie_word_embeddings": False, **dense, **own, **changes})
    if model.config.tie_word_embeddings:
        # As an output head the table of random models is too sure of itself.
        model.model.embed_tokens.weight.data /= 8
    return model


def saved(model: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A folder as users have it: experts one by one, and a tokenizer."""
    model.to(dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
