"""Language models inside multimodal ones, and the tensors of what sees and hears, which stay as they are.

Their tensors lie under ``model.language_model`` or ``language_model.model`` beside those of other parts, and their
config is a part of ``config.json``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["CARRIED", "TOWERS", "is_tower", "language_model", "left_out", "own_names", "read_config", "renamed"]

# How names of tensors begin that the native format carries along as they were stored.
CARRIED = "carried."

# Multimodal ``model_type`` → what its language model is by itself; empty where its part of the config says so.
TOWERS = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "kimi_k25": "deepseek_v3",
    "llama4": "llama4_text",
    "llava": "",
    "mistral3": "",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    # Positions of text are the same in all three directions: its RoPE is Qwen3's there.
    "qwen3_vl": "qwen3",
}
# ``model_type`` of files that come with code of their own → what transformers runs of it: Kimi K2 is DeepSeek-V3 there,
# inside Kimi K2.5.
RENAMED = {"kimi_k2": "deepseek_v3"}
# What latentize writes as ``topk_method`` where weights of chosen experts sum to one, which no DeepSeek-V2's do.
NORMALISED = "greedy, normalised"
# Entries of the whole that hold for the part, unless it has its own.
_OF_ALL = ("quantization_config", "dtype", "torch_dtype", "tie_word_embeddings", "transformers_version")
# How names of tensors begin, and what they are in the language model.
_PREFIXES = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "lm_head.": "lm_head.",
}


def is_tower(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is that of a multimodal model whose language model is known."""
    return str(config.get("model_type")) in TOWERS and isinstance(config.get("text_config"), Mapping)


def renamed(config: dict[str, Any]) -> dict[str, Any]:
    """A ``config.json`` under the ``model_type`` that transformers has for it, which runs without its code."""
    if weighs_chosen(config):
        return {**config, "topk_method": "greedy"}
    name = RENAMED.get(str(config.get("model_type")))
    own = {key: value for key, value in config.items() if key != "auto_map"}
    return config if name is None else {**own, "model_type": name}


def weighs_chosen(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of DeepSeek-V2's layout with weights of chosen experts that sum to one."""
    return config.get("topk_method") == NORMALISED


def language_model(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a ``config.json`` as it is stated; all of it where there is no other part."""
    if not is_tower(config):
        return renamed(config)
    shared = {name: config[name] for name in _OF_ALL if name in config}
    named = TOWERS[config["model_type"]] or config["text_config"].get("model_type")
    return renamed({**shared, **config["text_config"], "model_type": named})


def read_config(whole: Any) -> Any:
    """transformers' config of the language model, from that of the whole; another as it is."""
    from transformers import AutoConfig

    if not is_tower(whole.to_dict()):
        return whole
    entries = {**whole.get_text_config().to_dict(), "tie_word_embeddings": whole.tie_word_embeddings}
    own = entries.pop("model_type")
    return AutoConfig.for_model(TOWERS[whole.model_type] or own, **entries)


def own_names(stored: Iterable[str]) -> dict[str, str | None]:
    """What the language model calls each tensor of the whole; ``None`` for those of other parts."""
    found: dict[str, str | None] = {}
    for name in stored:
        before = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
        found[name] = None if before is None else _PREFIXES[before] + name.removeprefix(before)
    return {name: own for name, own in found.items() if name != own}


def left_out(config: Mapping[str, Any], *, carried: bool) -> str:
    """What a report says of the rest, and whether that can be carried along."""
    rest = "carried along in the native format, and left out in others" if carried else "quantised, and left out"
    return f"the language model of '{config['model_type']}' alone is converted; what sees or hears is {rest}"
