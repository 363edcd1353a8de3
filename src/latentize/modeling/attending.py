"""How a source attends while calibration text is written and read: as transformers does, by faster operators on a CPU.

PyTorch's fused attention on a CPU is slow in bfloat16 unless the processor has matrix tiles, and slower still for one
query.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from latentize.attention.grouped import for_heads
from latentize.modeling.blocks import causal_blocks, suit_blocks

__all__ = ["NAME", "attend_faster", "attending", "cache_of"]

# What transformers calls it.
NAME = "latentize_causal"


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function."""
    kind, tokens, keys = query.device.type, query.shape[2], key.shape[2]
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    plain = attention_mask is None and more.get("is_causal") is not False and more.get("position_bias") is None
    q_BHTd = query.to(dtype)
    one, blocks = kind == "cpu" and tokens == 1, suit_blocks(q_BHTd, keys)
    if not plain or not (one or blocks):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    k_BGSd, v_BGSV = key.to(dtype), value.to(dtype)
    share, scale = query.shape[1] // key.shape[1], more.get("scaling") or query.shape[-1] ** -0.5
    if one:
        # Heads that share keys are rows of one product.
        q_BGnd = q_BHTd.view(len(query), key.shape[1], share, -1)
        heads_BGnV = (scale * q_BGnd @ k_BGSd.mT).softmax(-1) @ v_BGSV
        return heads_BGnV.flatten(1, 2)[:, None], None
    k_BHSd, v_BHSV = (for_heads(x, query.shape[1]) for x in (k_BGSd, v_BGSV))
    return causal_blocks(q_BHTd, k_BHSd, v_BHSV, scale).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


def attend_faster(model: Any) -> list[Any]:
    """Let a model that uses PyTorch's fused attention use this one.

    It is told once the model is made: code that comes with a checkpoint may know but transformers' own names then.

    Returns:
        The configs that say so now.
    """
    configs = {id(m.config): m.config for m in model.modules() if getattr(m, "config", None) is not None}
    fused = [config for config in configs.values() if getattr(config, "_attn_implementation", None) == "sdpa"]
    for config in fused:
        config._attn_implementation = NAME
    return fused


@contextmanager
def attending(model: Any) -> Iterator[None]:
    """Let it do so meanwhile."""
    fused = attend_faster(model)
    try:
        yield
    finally:
        for config in fused:
            config._attn_implementation = "sdpa"


class _Roomy(DynamicLayer):
    """Keys and values in the room that was set aside for all of them: they are not copied at every token.

    Args:
        room: Tokens.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room, self._held = room, ()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As transformers' own."""
        new, seen = (key_states, value_states), self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._held = tuple(x.new_empty(*x.shape[:-2], self._room, x.shape[-1]) for x in new)
        end = seen + key_states.shape[-2]
        for held, x in zip(self._held, new, strict=True):
            held[..., seen:end, :] = x
        self.keys, self.values = (held[..., :end, :] for held in self._held)
        return self.keys, self.values


def cache_of(model: Any, tokens: int) -> DynamicCache | None:
    """An empty cache with room for so many tokens; ``None`` where a model has others than keys and values."""
    cache = DynamicCache(config=model.config)
    if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    cache.layers[:] = [_Roomy(tokens) for _ in cache.layers]
    return cache
