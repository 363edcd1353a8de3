"""GGUF files of picomodels, written as llama.cpp's converter lays them out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tests.models import pico_model, trained_tokenizer

# Family → architecture of the file, where they differ.
ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3", "qwen3_moe": "qwen3moe"}
# What files of a family cannot say, or transformers does not read: it has to be its default.
SAID: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 50.0, "layer_types": None},
    "gemma3_text": {"query_pre_attn_scalar": 16, "layer_types": None, "num_hidden_layers": 6},
    "phi3": {"sliding_window": None},
    "qwen3": {"head_dim": 128},
    "qwen3_moe": {"mlp_only_layers": []},
    "lfm2": {"block_auto_adjust_ff_dim": False},
    "starcoder2": {"sliding_window": None},
}
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def source_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A picomodel that a GGUF file can hold."""
    return pico_model(family, seed=seed, **{"vocab_size": 320, **SAID.get(family, {}), **changes})


def _permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """Pairs that RoPE turns side by side, as llama.cpp has them of Llama."""
    return weights.reshape(heads, 2, -1, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def laid_out(family: str, model: Any) -> dict[str, np.ndarray]:
    """Tensors by the file's names, float32."""
    config, arch = model.config, ARCHITECTURES.get(family, family)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    found: dict[str, np.ndarray] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        if name.endswith("experts.gate_up_proj"):
            layer = name.split(".")[2]
            for part, half in zip(("gate", "up"), np.split(values, 2, axis=1), strict=True):
                found[f"blk.{layer}.ffn_{part}_exps.weight"] = half
            continue
        stem, _, kind = name.rpartition(".")
        stem, kind = (stem, kind) if kind in ("weight", "bias") else (name, "weight")
        stored = names.get_name(stem)
        assert stored is not None, name
        if arch == "llama" and stored.endswith(("attn_q", "attn_k")):
            heads = config.num_attention_heads if stored.endswith("q") else config.num_key_value_heads
            values = _permuted(values, heads)
        if arch in ("gemma2", "gemma3") and stored.endswith("norm"):
            values = values + np.float32(1)
        found[f"{stored}.{kind}"] = values.squeeze(1) if "shortconv.conv" in stored else values
    return found


def _keys(family: str, config: Any) -> dict[str, Any]:
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = {
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": int(head_dim * (rope.get("partial_rotary_factor") or 1.0)),
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    eps = {"stablelm": "layer_norm_eps", "starcoder2": "norm_epsilon", "lfm2": "norm_eps"}.get(family, "rms_norm_eps")
    keys["attention.layer_norm_" + ("" if family in ("stablelm", "starcoder2") else "rms_") + "epsilon"] = float(
        getattr(config, eps)
    )
    if family.startswith("gemma"):
        keys["attention.sliding_window"] = config.sliding_window
    if family == "gemma2":
        keys |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    if family == "qwen3_moe":
        keys |= {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok}
        keys["expert_feed_forward_length"] = config.moe_intermediate_size
    if family == "lfm2":
        attends = [kind == "full_attention" for kind in config.layer_types]
        keys["attention.head_count_kv"] = [config.num_key_value_heads * one for one in attends]
        keys["shortconv.l_cache"] = config.conv_L_cache
    return keys


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokenizer = trained_tokenizer()
    pieces = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(pieces)
    writer.add_token_types([3, *[1] * (len(pieces) - 1)])
    writer.add_token_merges([" ".join(merge) if isinstance(merge, list) else merge for merge in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    # The default of some families lies beyond so few tokens.
    writer.add_pad_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)


def write_source(
    path: Path,
    family: str = "llama",
    kind: str = "F32",
    *,
    model: Any = None,
    tokenizer: bool = True,
    keys: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray | None] | None = None,
    architecture: str = "",
) -> Any:
    """Write a picomodel as a GGUF file.

    Args:
        path: The file.
        family: ``model_type``.
        kind: GGML's type of matrices; vectors are F32.
        model: To write; by default a random one.
        tokenizer: Whether the file has one.
        keys: Others, or others' values; those of the model without its architecture, after a dot.
        tensors: Others, or none in the place of one.
        architecture: That the file says.

    Returns:
        The model.
    """
    model = source_model(family) if model is None else model
    writer = gguf.GGUFWriter(path, architecture or ARCHITECTURES.get(family, family))
    writer.add_name("a model")
    said = {f".{key}": value for key, value in _keys(family, model.config).items()}
    said["general.file_type"] = int(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    for key, value in (said | (keys or {})).items():
        if value is not None:
            _add(writer, writer.arch + key if key.startswith(".") else key, value)
    if tokenizer:
        _add_tokenizer(writer)
    for name, values in (laid_out(family, model) | (tensors or {})).items():
        if values is None:
            continue
        whole = values.ndim > 1 and values.shape[-1] % 32 == 0
        ggml = gguf.GGMLQuantizationType[kind if whole else "F32"]
        if ggml.name in ("F32", "F16"):
            writer.add_tensor(name, values.astype(np.float16 if ggml.name == "F16" else np.float32))
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, ggml), raw_dtype=ggml)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
