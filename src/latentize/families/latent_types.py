"""Types that have latent attention as they come: what transformers assumes where ``config.json`` says nothing."""

from __future__ import annotations

from typing import Any

__all__ = ["ALIASES", "LATENT_TYPES"]

# Held against its classes by a test.
LATENT_TYPES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        **{"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32},
        **{"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
        **{"v_head_dim": 128, "vocab_size": 102_400, "max_position_embeddings": 2048, "tie_word_embeddings": False},
        **{"first_k_dense_replace": 0, "n_routed_experts": 64, "n_shared_experts": 2, "moe_intermediate_size": 1407},
    },
    "deepseek_v3": {
        **{"num_hidden_layers": 61, "hidden_size": 7168, "intermediate_size": 18_432, "num_attention_heads": 128},
        **{"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
        **{"v_head_dim": 128, "vocab_size": 129_280, "max_position_embeddings": 4096, "tie_word_embeddings": False},
        **{"first_k_dense_replace": 3, "n_routed_experts": 256, "n_shared_experts": 1, "moe_intermediate_size": 2048},
        **{"num_experts_per_tok": 8},
    },
    "glm4_moe_lite": {
        **{"num_hidden_layers": 47, "hidden_size": 2048, "intermediate_size": 10_240, "num_attention_heads": 20},
        **{"kv_lora_rank": 512, "q_lora_rank": 768, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64},
        **{"v_head_dim": 256, "vocab_size": 154_880, "max_position_embeddings": 202_752, "tie_word_embeddings": False},
        **{"n_routed_experts": 64, "n_shared_experts": 1, "moe_intermediate_size": 1536, "num_experts_per_tok": 4},
    },
    "youtu": {
        **{"num_hidden_layers": 32, "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16},
        **{"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
        **{"v_head_dim": 128, "vocab_size": 128_256, "max_position_embeddings": 131_072, "tie_word_embeddings": True},
    },
    "mistral4": {
        **{"num_hidden_layers": 36, "hidden_size": 4096, "intermediate_size": 12_288, "num_attention_heads": 32},
        **{"kv_lora_rank": 256, "q_lora_rank": 1024, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64},
        **{"v_head_dim": 128, "vocab_size": 131_072, "max_position_embeddings": 1_048_576},
        **{"tie_word_embeddings": False, "first_k_dense_replace": 0, "n_routed_experts": 128, "n_shared_experts": 1},
        **{"moe_intermediate_size": 2048, "num_experts_per_tok": 4},
    },
    "deepseek_v32": {
        **{"num_hidden_layers": 61, "hidden_size": 7168, "intermediate_size": 18_432, "num_attention_heads": 128},
        **{"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
        **{"v_head_dim": 128, "vocab_size": 129_280, "max_position_embeddings": 163_840, "tie_word_embeddings": False},
        **{"first_k_dense_replace": 3, "n_routed_experts": 256, "n_shared_experts": 1, "moe_intermediate_size": 2048},
        **{"num_experts_per_tok": 8, "index_topk": 2048, "index_head_dim": 128, "index_n_heads": 64},
    },
    "glm_moe_dsa": {
        **{"num_hidden_layers": 78, "hidden_size": 6144, "intermediate_size": 12_288, "num_attention_heads": 64},
        **{"kv_lora_rank": 512, "q_lora_rank": 2048, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64},
        **{"v_head_dim": 256, "vocab_size": 154_880, "max_position_embeddings": 202_752, "tie_word_embeddings": False},
        **{"first_k_dense_replace": 3, "n_routed_experts": 256, "n_shared_experts": 1, "moe_intermediate_size": 2048},
        **{"num_experts_per_tok": 8, "index_topk": 2048, "index_head_dim": 128, "index_n_heads": 32},
    },
    "kimi_linear": {
        **{"num_hidden_layers": 27, "hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 32},
        **{"kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
        **{"v_head_dim": 128, "vocab_size": 163_840, "max_position_embeddings": 1_048_576},
        **{"tie_word_embeddings": False, "num_local_experts": 256, "n_shared_experts": 1},
        **{"moe_intermediate_size": 1024, "num_experts_per_tok": 8},
        **{"linear_head_dim": 128, "linear_num_heads": 32, "linear_conv_kernel_dim": 4},
    },
    "minicpm3": {
        **{"num_hidden_layers": 62, "hidden_size": 2560, "intermediate_size": 6400, "num_attention_heads": 40},
        **{"kv_lora_rank": 256, "q_lora_rank": 768, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32},
        **{"vocab_size": 73_448, "max_position_embeddings": 32_768, "tie_word_embeddings": True},
    },
}
# What files call entries otherwise than above; of several names the first that is there counts.
ALIASES: dict[str, dict[str, tuple[str, ...]]] = {
    "kimi_linear": {
        "n_routed_experts": ("num_experts", "num_local_experts"),
        "num_experts_per_tok": ("num_experts_per_token",),
        "n_shared_experts": ("num_shared_experts",),
        "max_position_embeddings": ("model_max_length",),
    }
}
