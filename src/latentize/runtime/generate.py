"""Text from a model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from latentize.attention.spec import mean_over_layers
from latentize.errors import ConfigError, LatentizeError, OptionError
from latentize.modeling.generation import NAME
from latentize.runtime.cache import LatentCache, latent_entries

__all__ = ["Generated", "cache_bytes", "cached_values", "generate", "latent_layers", "prompt_tokens", "row_bytes"]

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
        cache_bytes_per_token_layer: That these take up; the first and newest tokens of a text may take more.
        prompt_tokens: Tokens of the prompt.
        notes: What of the model's own settings is left out, in sentences.
    """

    text: str
    tokens: int
    seconds: float
    cache_bytes: int
    cache_values_per_token_layer: int | float
    cache_bytes_per_token_layer: int | float
    prompt_tokens: int
    notes: list[str] = field(default_factory=list)


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

    Raises:
        OptionError: the prompt has no tokens, and the tokenizer none to begin a text with.
        ConfigError: transformers cannot generate with the model's own settings.
    """
    ids_1T = prompt_tokens(tokenizer, prompt).to(model.device)
    started = time.time()
    options: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    options |= {"pad_token_id": pad, "tokenizer": tokenizer, "past_key_values": cache, "streamer": streamer}
    if ids_1T.shape[1] > _PREFILL:
        options["prefill_chunk_size"] = _PREFILL
    with _settings_of(model):
        out = model.generate(
            input_ids=ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            max_new_tokens=max_new_tokens,
            return_dict_in_generate=True,
            **{"do_sample": False, **options},
        )
    new = out.sequences[0, ids_1T.shape[1] :]
    used, layers = out.past_key_values, latent_layers(model.config)
    return Generated(
        text=tokenizer.decode(new, skip_special_tokens=True),
        tokens=len(new),
        seconds=time.time() - started,
        cache_bytes=cache_bytes(used),
        cache_values_per_token_layer=cached_values(used, layers),
        cache_bytes_per_token_layer=row_bytes(used, layers),
        prompt_tokens=ids_1T.shape[1],
    )


def prompt_tokens(tokenizer: Any, prompt: str) -> torch.Tensor:
    """A prompt's token ids ``[1, T]``; an empty one is the token that begins a text, or else the one that ends it.

    Raises:
        OptionError: it is empty, and there is no such token.
    """
    ids = tokenizer(prompt, verbose=False)["input_ids"]
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if not ids and first is None:
        raise OptionError(
            "the prompt is empty, and no token of this model begins a text", where="PROMPT", fix="give some text"
        )
    return torch.tensor([ids or [first]], dtype=torch.int64)


@contextmanager
def _settings_of(model: Any) -> Iterator[None]:
    """What transformers cannot do of a model's own settings is the fault of these."""
    try:
        yield
    except (LatentizeError, MemoryError):
        raise
    except Exception as error:
        ids = ("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version")
        own = [name for name, value in vars(model.generation_config).items() if value is not None and name not in ids]
        own = [name for name in own if not name.startswith("_")]
        if not own:
            raise
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ConfigError(
            f"transformers cannot generate with the model's own settings: {reason}",
            where=f"{NAME}: {', '.join(own)}",
            fix="correct them, or remove the file",
        ) from error


def latent_layers(config: Any) -> list[int]:
    """Numbers of the layers whose cache counts: all but those that a conversion has left as they were."""
    return [layer for layer, entry in enumerate(latent_entries(config)) if entry is not None]


def cached_values(cache: Any, layers: Sequence[int]) -> int | float:
    """Numbers that a transformers cache keeps for one token and layer; their mean where layers differ."""
    counted = [cache.layers[layer] for layer in layers]
    return mean_over_layers([sum(t.numel() for t in _row(layer)) for layer in counted])


def row_bytes(cache: Any, layers: Sequence[int]) -> int | float:
    """Bytes that those values are stored in; their mean where layers differ."""
    counted = [cache.layers[layer] for layer in layers]
    if isinstance(cache, LatentCache):
        return mean_over_layers([layer.row_bytes for layer in counted])
    return mean_over_layers([sum(t.numel() * t.element_size() for t in _row(layer)) for layer in counted])


def _row(layer: Any) -> list[torch.Tensor]:
    """A token's key and value."""
    return [t[0, :, 0] for t in (layer.keys, layer.values)]


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
