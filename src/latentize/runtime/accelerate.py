"""Absorbed decode inside transformers: latents are cached, and never expanded to decode a token.

transformers' MLA modules call ``expand_kv`` on what the cache returns and hand keys and values to the attention
function of the config. Both are places where a model may be extended: one instance gets an ``expand_kv`` that leaves
latents as they are, and an attention function, registered under a name of its own, that knows what to do with them.
Whatever else a family does (query compression, interleaved RoPE, YaRN's factors, experts) stays its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from latentize.attention.module import LatentAttention
from latentize.errors import OptionError, UnsupportedModelError
from latentize.formats.balance import KEY, rebalance, unbalance
from latentize.runtime.backends import Backend
from latentize.runtime.cache import LatentCache
from latentize.runtime.heads import Up, heads
from latentize.runtime.static import Room

__all__ = ["accelerate", "backend_of", "decelerate", "has_latents", "is_accelerated", "no_latents"]

_NAME = "latentize"
_STATE = "_latentize_accelerated"
# On every layer, the model's own.
_BACKEND = "_latentize_backend"


def _attention(
    module: Any,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function, over latents and roped keys instead of keys and values."""
    assert dropout == 0.0, "dropout belongs to training"
    nope, v = module.qk_nope_head_dim, module.v_head_dim
    k_HNr, v_HVr = module.kv_b_proj.weight.unflatten(0, (-1, nope + v)).split([nope, v], dim=1)
    q_nope, q_rope = query[..., :nope], query[..., nope:]
    up = Up(k_HNr, v_HVr, scaling)
    return heads(q_nope, q_rope, key, value, up, attention_mask, getattr(module, _BACKEND)).transpose(1, 2), None


def _mask(
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' mask function: none at all where the new tokens come last, attention is causal, nothing padded.

    A static cache's offset stands on the device, and must not be asked for.
    """
    if isinstance(q_offset, Tensor) or isinstance(kv_length, Room):
        last = isinstance(kv_length, Room) and attention_mask is None
    else:
        last = kv_offset == 0 and q_offset + q_length == kv_length
    if last and mask_function is causal_mask_function and (attention_mask is None or bool(attention_mask.all())):
        return None
    kwargs |= {"q_offset": q_offset, "kv_offset": kv_offset, "allow_is_causal_skip": False}
    return sdpa_mask(
        q_length=q_length, kv_length=kv_length, mask_function=mask_function, attention_mask=attention_mask, **kwargs
    )


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)


def _as_they_are(_: nn.Module, latent: Any, k_rope: Any) -> tuple[Any, Any]:
    """Stands for ``expand_kv``."""
    return latent, k_rope


def _native_heads(
    module: LatentAttention, q_nope: Tensor, q_rope: Tensor, key: Any, value: Any, w: Any, mask: Any
) -> Tensor:
    """Stands for ``LatentAttention.heads``."""
    return heads(
        q_nope, q_rope, key, value, Up(w.k_up_UNr, w.v_up_UVr, w.softmax_scale), mask, getattr(module, _BACKEND)
    )


def _announce(frequencies: Callable[[], Tensor | None], interleaved: bool) -> Callable[..., None]:
    """Before a layer runs, tell a :class:`LatentCache` that its rows may stay as they lie."""

    def hook(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
        if isinstance(cache, LatentCache):
            layer = cache.layers[module.layer_idx]
            layer.attends_rows, layer.frequencies_F, layer.interleaved = True, frequencies(), interleaved

    return hook


def _is_mla(module: nn.Module) -> bool:
    parts = ("expand_kv", "kv_b_proj", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")
    return all(hasattr(module, name) for name in parts)


def _latent_layers(model: Any) -> list[Any]:
    # No fused form bends logits: such layers decode absorbed as they are.
    return [m for m in model.modules() if (isinstance(m, LatentAttention) and not m.spec.softcap) or _is_mla(m)]


def has_latents(model: Any) -> bool:
    """Whether a model has latent attention that :func:`accelerate` can treat."""
    return bool(_latent_layers(model))


def no_latents(where: str) -> OptionError:
    """What to raise where somebody asks for a latent cache in vain."""
    return OptionError(
        "this model has no latents to store",
        where=where,
        fix="convert it first; for other models transformers has its own QuantizedCache",
    )


def is_accelerated(model: Any) -> bool:
    """Whether :func:`accelerate` was called on this instance."""
    return hasattr(model, _STATE)


def accelerate(model: Any, *, backend: str = "auto") -> Any:
    """Make a loaded model decode in its latent space: this instance, in place, until :func:`decelerate`.

    Works under ``generate`` with every cache of transformers; where none is asked for, ``generate`` gets a
    :class:`LatentCache`, which grows without being copied.

    Args:
        model: A DeepSeek-V2/V3-type model of transformers (any class whose attention has ``expand_kv``), or one of
            the native format.
        backend: Who decodes: ``auto``, ``torch`` or ``triton``; see ``runtime.backends``.

    Returns:
        The same object.

    Raises:
        UnsupportedModelError: no layer has latent attention that could be absorbed.
        OptionError: no such backend, or kernels that cannot run where the model is.
    """
    if is_accelerated(model):
        return model
    layers = _latent_layers(model)
    if not layers:
        raise UnsupportedModelError(
            f"'{type(model).__name__}' has no latent attention to absorb",
            where="accelerate",
            fix="convert the model first; transformers 5.23 is known to work, older ones may lack `expand_kv`",
        )
    hooks, chosen = [], Backend.named(backend, next(model.parameters()).device)
    rotary = next((m for n, m in model.named_modules() if n.endswith("rotary_emb")), None)
    # DeepSeek-V2 leaves its keys interleaved after RoPE; all others do not, whatever their weights are.
    interleaved = getattr(model.config, "model_type", "") == "deepseek_v2"
    for layer in layers:
        if isinstance(layer, LatentAttention):
            layer.heads = MethodType(_native_heads, layer)
            frequencies = layer.frequencies
        else:
            layer.expand_kv = MethodType(_as_they_are, layer)
            frequencies = partial(getattr, rotary, "inv_freq", None)
        setattr(layer, _BACKEND, chosen)
        hooks.append(layer.register_forward_pre_hook(_announce(frequencies, interleaved), with_kwargs=True))
    # Roped keys that are tiny are nothing to a cache in fp16, and queries that are huge too much for its kernels.
    scaled = unbalance(model)
    # Models that were made from one config share it: this one gets its own. Layers that are not latent go on as before.
    mixed = len(layers) < model.config.get_text_config(decoder=True).num_hidden_layers
    before = [(m, m.config) for m in model.modules() if hasattr(m, "config") and not mixed]
    own = {id(config): copy.deepcopy(config) for _, config in before}
    for module, config in before:
        module.config = own[id(config)]
        module.config._attn_implementation = _NAME
        if scaled and hasattr(module.config, KEY):
            # Saved now, it must not say what is no longer true.
            delattr(module.config, KEY)
    setattr(model, _STATE, (layers, hooks, before, scaled))
    model.generate = MethodType(_generate, model)
    return model


def backend_of(model: Any) -> Backend:
    """Who decodes an accelerated model, and how often it did."""
    layers = getattr(model, _STATE)[0]
    return getattr(layers[0], _BACKEND)


def decelerate(model: Any) -> Any:
    """Undo :func:`accelerate`."""
    if not is_accelerated(model):
        return model
    layers, hooks, before, scaled = getattr(model, _STATE)
    for layer in layers:
        delattr(layer, "heads" if isinstance(layer, LatentAttention) else "expand_kv")
        delattr(layer, _BACKEND)
    for hook in hooks:
        hook.remove()
    for module, config in before:
        module.config = config
    if scaled:
        rebalance(model)
    del model.generate
    delattr(model, _STATE)
    return model


def _generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """``generate`` with a cache that fits."""
    asked = kwargs.get("past_key_values") is not None or kwargs.get("cache_implementation") is not None
    configured = getattr(kwargs.get("generation_config") or self.generation_config, "cache_implementation", None)
    if not asked and configured is None and kwargs.get("use_cache", True):
        kwargs["past_key_values"] = LatentCache(self.config)
    return type(self).generate(self, *args, **kwargs)
