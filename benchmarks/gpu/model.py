"""Decode of a whole model with CUDA graphs: Llama-3-8B's shape, and what a conversion to 512 + 64 makes of it.

The source runs as transformers runs it over a static cache, with a mask; and with its heads grouped as queries of
PyTorch's flash attention over all the room without one, which is no generation but the least that it could take.

Random weights; caches are filled with noise up to the context, so no prompt is run but one of a few tokens. A step is
one replay. Off a GPU the same at a tiny size, uncaptured: whether steps say what one forward pass says.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    DeepseekV3Config,
    DynamicCache,
    LlamaConfig,
    StaticCache,
)

from gpu.machine import milliseconds
from latentize.runtime.accelerate import accelerate, backend_of, is_accelerated
from latentize.runtime.cache import LatentCache
from latentize.runtime.graphs import DecodeGraph

__all__ = ["check", "large", "measure", "small", "subjects"]

_PROMPT, _STEPS = 24, 24
_UNMASKED = "latentize_bench_unmasked"
_LIMIT = 1e-5


def _unmasked(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    grouped = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(grouped, key, value, scale=scaling)
    return out.unflatten(2, (-1, query.shape[2])).flatten(1, 2).transpose(1, 2), None


AttentionInterface.register(_UNMASKED, _unmasked)


def large() -> tuple[LlamaConfig, DeepseekV3Config]:
    """Llama-3-8B, and the same with latents."""
    shared: dict[str, Any] = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 128_256, "max_position_embeddings": 131_072, "tie_word_embeddings": False,
    }  # fmt: skip
    latent = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
    return LlamaConfig(**shared, num_key_value_heads=8, head_dim=128), _latent(shared, latent)


def small() -> tuple[LlamaConfig, DeepseekV3Config]:
    """For an interpreter."""
    shared: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": 257, "max_position_embeddings": 128, "tie_word_embeddings": False,
    }  # fmt: skip
    latent = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    return LlamaConfig(**shared, num_key_value_heads=2, head_dim=8), _latent(shared, latent)


def _latent(shared: dict[str, Any], latent: dict[str, int]) -> DeepseekV3Config:
    heads, layers = shared["num_attention_heads"], shared["num_hidden_layers"]
    return DeepseekV3Config(
        **shared, **latent, num_key_value_heads=heads, q_lora_rank=None, first_k_dense_replace=layers
    )


def subjects(
    source: LlamaConfig, converted: DeepseekV3Config, *, timed: bool
) -> dict[str, tuple[Any, Callable[[Any, int], Any]]]:
    """Configs, and what makes their caches: ``model, room -> cache``."""

    def static(model: Any, room: int) -> StaticCache:
        return StaticCache(model.config, max_cache_len=room)

    found: dict[str, tuple[Any, Callable[[Any, int], Any]]] = {"source, transformers": (source, static)}
    if timed:
        unmasked = copy.deepcopy(source)
        unmasked._attn_implementation = _UNMASKED
        found["source, flash, unmasked"] = (unmasked, static)
    for name in ("bf16", "fp8", "int8", "int4"):
        rope = "bf16" if name == "bf16" else "int8"

        def cache(model: Any, room: int, name: str = name, rope: str = rope) -> LatentCache:
            return LatentCache(model.config, latent=name, rope=rope, max_length=room)

        found[f"converted, latentize {name}+{rope}"] = (converted, cache)
    return found


def build(config: Any, device: torch.device, dtype: torch.dtype, backend: str = "triton") -> Any:
    """A model with random weights, accelerated where it has latents."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    return accelerate(model, backend=backend) if isinstance(config, DeepseekV3Config) else model


@torch.no_grad()
def measure(model: Any, name: str, new_cache: Any, batch: int, context: int, bandwidth: float) -> dict[str, Any]:
    """Median step, and the least that reading weights and cache would take."""
    told: dict[str, Any] = {"name": name, "batch": batch, "context": context}
    device = next(model.parameters()).device
    try:
        cache = new_cache(model, context + _STEPS + 8)
        ids = torch.randint(0, 1000, (batch, _PROMPT), device=device)
        model(ids, past_key_values=cache, logits_to_keep=1)
        _fill(cache, context)
        step, token = DecodeGraph(model, cache, batch), ids[:, :1]
        took = milliseconds(lambda: step(token), _STEPS)
        finite = bool(step(token).isfinite().all())
        used, weights = _read(cache, context), _weights(model)
        told |= {"milliseconds": took, "tokens_per_second": batch / (took / 1e3), "finite": finite}
        told |= {"cache_bytes": used, "weight_bytes": weights, "right": finite}
        told |= {"share_of_copy": (used + weights) / bandwidth / (took / 1e3)}
        told |= {"decoded": dict(backend_of(model).used)} if is_accelerated(model) else {}
    except (RuntimeError, torch.OutOfMemoryError) as error:
        told |= {"trouble": f"{type(error).__name__}: {error}"[:300]}
    cache = step = None
    gc.collect()
    torch.cuda.empty_cache()
    return told


def _fill(cache: Any, context: int) -> None:
    """Noise up to the context, as if it had been a prompt."""
    for layer in cache.layers:
        tensors = layer.stored.tensors if isinstance(cache, LatentCache) else (layer.keys, layer.values)
        for t in tensors:
            if t.is_floating_point():
                # Of a size that a scale may have, too.
                t.normal_().abs_().mul_(0.01) if t.shape[-1] == 1 else t.normal_()
            else:
                t.random_(0, 100)
        if not isinstance(cache, LatentCache):
            layer.cumulative_length.fill_(context)
    if isinstance(cache, LatentCache):
        cache.rewind(context)


def _read(cache: Any, context: int) -> int:
    if isinstance(cache, LatentCache):
        return cache.nbytes * context // cache.layers[0].max_length
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum(t.numel() * t.element_size() for t in tensors) * context // cache.layers[0].max_cache_len


def _weights(model: Any) -> int:
    """All but the input embedding, of which a row is read."""
    skipped = model.get_input_embeddings().weight
    return sum(p.numel() * p.element_size() for p in model.parameters() if p is not skipped)


@torch.no_grad()
def check(device: torch.device) -> list[dict[str, Any]]:
    """Steps of a tiny model over static caches, against growing ones that PyTorch attends to, in float32."""
    rows, built = [], {}
    for name, (config, new_cache) in subjects(*small(), timed=False).items():
        if id(config) not in built:
            built[id(config)] = build(config, device, torch.float32)
        model = built[id(config)]
        ids = torch.randint(0, 257, (2, _PROMPT + 4), device=device)
        cache = new_cache(model, _PROMPT + 8)
        model(ids[:, :_PROMPT], past_key_values=cache)
        step = DecodeGraph(model, cache, 2)
        made = [step(ids[:, at : at + 1]).clone() for at in range(_PROMPT, _PROMPT + 4)]
        expected = _stepwise(config, ids, cache, device)
        error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(made, expected, strict=True))
        rows.append({"name": name, "captured": step.capture, "error": error, "right": error <= _LIMIT})
    return rows


def _stepwise(config: Any, ids: Tensor, cache: Any, device: torch.device) -> list[Tensor]:
    """Logits over a cache that grows, by PyTorch alone."""
    model = build(config, device, torch.float32, backend="torch")
    other: Any = DynamicCache()
    if isinstance(cache, LatentCache):
        latent, rope = cache.layers[0].formats
        other = LatentCache(config, latent=latent, rope=rope)
    model(ids[:, :_PROMPT], past_key_values=other)
    return [model(ids[:, at : at + 1], past_key_values=other).logits[:, -1] for at in range(_PROMPT, _PROMPT + 4)]
