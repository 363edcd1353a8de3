"""Text from a model."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Generated", "generate"]


@dataclass
class Generated:
    """What came out.

    Attributes:
        text: The continuation, without the prompt.
        tokens: New tokens.
        seconds: Prompt and generation together.
        cache_bytes: Bytes of the tensors that the cache held in the end.
        cache_values_per_token_layer: Counted in them.
    """

    text: str
    tokens: int
    seconds: float
    cache_bytes: int
    cache_values_per_token_layer: int


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    streamer: Any = None,
) -> Generated:
    """Continue ``prompt`` through transformers' own ``generate``.

    Args:
        model: A loaded model.
        tokenizer: Its tokenizer.
        prompt: Text.
        max_new_tokens: At most so many.
        temperature: 0 takes the most likely token.
        streamer: transformers' streamer, told of each token.
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
        **sampling,
    )
    new = out.sequences[0, inputs["input_ids"].shape[1] :]
    tensors = [t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)]
    return Generated(
        text=tokenizer.decode(new, skip_special_tokens=True),
        tokens=len(new),
        seconds=time.time() - started,
        cache_bytes=sum(t.numel() * t.element_size() for t in tensors),
        cache_values_per_token_layer=sum(t[0, :, 0].numel() for t in tensors[:2]),
    )
