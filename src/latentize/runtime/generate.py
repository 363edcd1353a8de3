"""Text from a model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from latentize.runtime.cache import LatentCache
from latentize.spec import mean_over_layers

__all__ = ["Generated", "cache_bytes", "cached_values", "generate", "latent_layers"]

# Longer prompts go through the model in parts, so that the memory of their activations is bounded.
_PREFILL = 2048


@dataclass
class Generated:
    """What came out.

    Attributes:
        text: The continuation, without the prompt.
        tokens: New tokens.
        seconds: Prompt and generation together.
        cache_bytes: Bytes of the tensors that the cache held in the end.
        cache_values_per_token_layer: Counted in them, the mean over layers.
        prompt_tokens: Tokens of the prompt.
    """

    text: str
    tokens: int
    seconds: float
    cache_bytes: int
    cache_values_per_token_layer: int | float
    prompt_tokens: int


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    streamer: Any = None,
    cache: Any = None,
) -> Generated:
    """Continue ``prompt`` through transformers' own ``generate``.

    Args:
        model: A loaded model.
        tokenizer: Its tokenizer.
        prompt: Text.
        max_new_tokens: At most so many.
        temperature: 0 takes the most likely token.
        streamer: transformers' streamer, told of each token.
        cache: Instead of the one that transformers makes.
    """
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    started = time.time()
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    out = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        return_dict_in_generate=True,
        streamer=streamer,
        past_key_values=cache,
        prefill_chunk_size=_PREFILL if inputs["input_ids"].shape[1] > _PREFILL else None,
        **sampling,
    )
    new = out.sequences[0, inputs["input_ids"].shape[1] :]
    used = out.past_key_values
    return Generated(
        text=tokenizer.decode(new, skip_special_tokens=True),
        tokens=len(new),
        seconds=time.time() - started,
        cache_bytes=cache_bytes(used),
        cache_values_per_token_layer=cached_values(used, latent_layers(model.config)),
        prompt_tokens=inputs["input_ids"].shape[1],
    )


def latent_layers(config: Any) -> list[int]:
    """Numbers of the layers whose cache counts: all but those that a conversion has left as they were."""
    entries = getattr(config, "latent_layers", None) or [True] * config.num_hidden_layers
    return [layer for layer, entry in enumerate(entries) if entry is not None]


def cached_values(cache: Any, layers: Sequence[int]) -> int | float:
    """Numbers that a transformers cache keeps for one token and layer; their mean where layers differ."""
    counted = [cache.layers[layer] for layer in layers]
    return mean_over_layers([sum(t[0, :, 0].numel() for t in (layer.keys, layer.values)) for layer in counted])


def cache_bytes(cache: Any) -> int:
    """Bytes of a cache's tensors; transformers' own, or a :class:`LatentCache`."""
    if isinstance(cache, LatentCache):
        return cache.nbytes
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in _tensors(layer))


def _tensors(layer: Any) -> list[torch.Tensor]:
    """Keys and values, or the states of a layer that has none."""
    found: list[torch.Tensor | None] = []
    for name in ("keys", "values", "conv_states", "recurrent_states"):
        held = getattr(layer, name, None)
        found += held.values() if isinstance(held, dict) else [held]
    return [t for t in found if isinstance(t, torch.Tensor)]
