"""Picomodels of every family with random weights, and their tokenizers."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from tests.common import sentences
from torch import nn

from latentize.modeling.body import body_of

FAMILIES = (
    "apertus",
    "ernie4_5",
    "exaone4",
    "gemma2",
    "gemma3_text",
    "gemma4_text",
    "glm",
    "glm4",
    "glm4_moe",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "granite",
    "granitemoe",
    "hunyuan_v1_dense",
    "lfm2",
    "llama",
    "llama4_text",
    "minimax_m2",
    "ministral3",
    "mistral",
    "mixtral",
    "olmo2",
    "olmo3",
    "olmoe",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_next",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
)
# What a picomodel of a family has beside the sizes that all have: features that are off by default are on, and
# layers are of all kinds that there are.
_EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2}
_ALTERNATING = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
_DELTANET = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "partial_rotary_factor": 0.5,
}
PECULIAR: dict[str, dict[str, Any]] = {
    "exaone4": _ALTERNATING,
    "gemma2": {**_ALTERNATING, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 4.0},
    "gemma3_text": {**_ALTERNATING, "query_pre_attn_scalar": 20},
    "gemma4_text": {
        **_ALTERNATING,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "final_logit_softcapping": 5.0,
        "enable_moe_block": True,
        "num_experts": 3,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    "glm4_moe": {
        "n_routed_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "use_qk_norm": True,
        "attention_bias": True,
        "routed_scaling_factor": 1.5,
    },
    "gpt2": {"n_inner": 96},
    "gpt_oss": {**_ALTERNATING, "num_local_experts": 3, "num_experts_per_tok": 2},
    "granite": {
        "attention_multiplier": 0.2,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.4,
        "logits_scaling": 3.0,
    },
    "granitemoe": {
        "attention_multiplier": 0.2,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.4,
        "logits_scaling": 3.0,
        "num_local_experts": 3,
    },
    "hunyuan_v1_dense": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0}},
    # Tests are shorter than what is published: queries grow every 16 tokens, and a chunk is as long.
    "llama4_text": {
        "no_rope_layers": [1, 0],
        "moe_layers": [1],
        "attention_chunk_size": 16,
        "floor_scale": 16,
        "attn_scale": 0.3,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "intermediate_size_mlp": 48,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "minimax_m2": {"num_local_experts": 3, "num_experts_per_tok": 2, "partial_rotary_factor": 0.5},
    # Tests are shorter than what published models were trained for: here queries grow every 16 tokens.
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.3,
        }
    },
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 3},
    "olmo3": _ALTERNATING,
    "olmoe": _EXPERTS,
    "qwen3_5_moe_text": {
        **_DELTANET,
        **_EXPERTS,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 24,
    },
    "qwen3_5_text": _DELTANET,
    "qwen3_moe": {**_EXPERTS, "moe_intermediate_size": 32, "norm_topk_prob": True, "mlp_only_layers": [1]},
    "qwen3_next": {
        **_DELTANET,
        **_EXPERTS,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 24,
        "mlp_only_layers": [1],
    },
    "seed_oss": {"attention_out_bias": True},
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {"use_qkv_bias": True},
}
# Heads of their own for every query.
ONLY_MHA = ("gpt2", "gpt_neox")
# Nothing rotates, positions are learnt.
WITHOUT_ROPE = ("gpt2",)
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_SCALING = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}


def decoder_layers(model: Any) -> Any:
    """Of a model of transformers, or of ours."""
    body = body_of(getattr(model, "source", model))
    return body.h if hasattr(body, "h") else body.layers


def pico_config(family: str = "llama", kv_heads: int = 2, **changes: Any) -> Any:
    """A transformers config of a tiny model: hidden 64, 2 layers, 4 heads of 16, 257 tokens."""
    from transformers import AutoConfig

    entries: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "head_dim": 16,
        "vocab_size": 257,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if family not in ("granite", "llama", "mistral", "qwen2", "qwen3"):
        # Its default lies beyond so few tokens.
        entries["pad_token_id"] = 0
    entries |= PECULIAR.get(family, {})
    return AutoConfig.for_model(family, **{**entries, **changes})


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Random weights of a size that makes attention pick, biases and norms that are not their defaults."""
    generator = torch.Generator().manual_seed(seed)
    # Norms of Gemma 2 and 3 multiply with one more than their weight.
    name = type(model).__name__
    offset, scaled = float("Gemma" in name and "Gemma4" not in name), float("Gemma" in name)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.data = 0.3 * noise if name.endswith("bias") else (1 + 0.3 * noise).abs() + 0.1 - offset
        elif "embed" in name:
            # Gemma multiplies embeddings with the root of the hidden size: a token would predict itself.
            parameter.data = noise / parameter.shape[1] ** (0.5 * scaled)
        else:
            gain = 1.5 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
            parameter.data = gain * noise / parameter.shape[1] ** 0.5

    for name, buffer in model.named_buffers():
        # A router's, which moves its choices.
        if name.endswith("correction_bias"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
        if name.endswith("layer_scalar"):
            buffer.fill_(0.7)


def pico_model(family: str = "llama", kv_heads: int = 2, seed: int = 0, **changes: Any) -> Any:
    """The model in memory, float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(pico_config(family, kv_heads, **changes), dtype=torch.float32)
    randomize(model, seed)
    return model.eval()


def byte_tokenizer() -> Any:
    """One token for each byte, and one that ends a text."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    fast = Fast(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=pieces[0], bos_token=pieces[0])


@functools.cache
def trained_tokenizer(vocab: int = 320) -> Any:
    """Byte-level BPE that has learnt some merges; none but token 0 is special."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(sentences(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def portable(
    tmp_path: Path,
    *,
    heads: int,
    rank: int,
    rope: int,
    nope: int,
    value: int,
    seed: int = 0,
    linear: bool = True,
    stored: torch.dtype = torch.float32,
    hidden: int = 96,
    **config: Any,
) -> Path:
    """A folder as the portable format has it, with random weights: two layers, 320 tokens, an MLP of 128.

    Args:
        tmp_path: Where its folder goes.
        heads: Of queries.
        rank: ``kv_lora_rank``.
        rope: ``qk_rope_head_dim``.
        nope: ``qk_nope_head_dim``.
        value: ``v_head_dim``.
        seed: Of the weights.
        linear: The latent so small that its norm is linear, as the format has it; or a norm like any other.
        stored: Precision of the weights.
        hidden: ``hidden_size``.
        config: Other entries of the config.
    """
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from latentize.formats.deepseek_v3 import EPS, NORM_SHIFT, LatentNorm

    entries = {
        "hidden_size": hidden, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": heads,
        "num_key_value_heads": heads, "kv_lora_rank": rank, "q_lora_rank": None, "qk_rope_head_dim": rope,
        "qk_nope_head_dim": nope, "v_head_dim": value, "vocab_size": 320, "max_position_embeddings": 512,
        "first_k_dense_replace": 2, "moe_layer_freq": 1, "moe_intermediate_size": 128, "n_routed_experts": 1,
        "n_shared_experts": 1, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0,
        "rms_norm_eps": EPS, "rope_interleave": True, "attention_bias": False, "tie_word_embeddings": False,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "routed_scaling_factor": 1.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}, "rope_theta": 10_000.0,
        "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**{**entries, **config}))
    randomize(model, seed)
    if linear:
        # A row of unit variance on a normed stream gives a latent of about one.
        norm = LatentNorm.stored_as(stored, 4.0, 1.0)
        for layer in model.model.layers:
            attention = layer.self_attn
            layer.input_layernorm.weight.data *= NORM_SHIFT
            attention.q_proj.weight.data /= NORM_SHIFT
            attention.kv_a_proj_with_mqa.weight.data /= NORM_SHIFT
            attention.kv_a_proj_with_mqa.weight.data[:rank] *= norm.latent
            attention.kv_a_layernorm.weight.data.fill_(norm.weight)
            attention.kv_b_proj.weight.data *= norm.up
    folder = tmp_path / f"portable-{rank}-{rope}-{seed}-{linear}"
    model.to(stored).save_pretrained(folder)
    # transformers stores what it knows; engines read more.
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**saved, **entries, **config}, indent=2))
    trained_tokenizer().save_pretrained(folder)
    return folder


def pico(
    tmp_path: Path,
    family: str = "llama",
    kv_heads: int = 2,
    *,
    seed: int = 0,
    name: str = "source",
    shard: str | None = None,
    stored: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """Save a picomodel and its tokenizer, as ``save_pretrained`` does.

    Args:
        tmp_path: Where its folder goes.
        family: ``model_type``.
        kv_heads: Key/value heads, of 4 query heads.
        seed: Of the weights.
        name: Of the folder.
        shard: Largest shard, as transformers writes it (``"40KB"``).
        stored: Precision of the saved weights.
        config: Entries of the config.
    """
    folder = tmp_path / name
    options = {} if shard is None else {"max_shard_size": shard}
    pico_model(family, kv_heads, seed, **config).to(stored).save_pretrained(folder, **options)
    byte_tokenizer().save_pretrained(folder)
    return folder
