"""Absorbed decode inside transformers: latents are cached, and never expanded to decode a token.

transformers' MLA modules call ``expand_kv`` on what the cache returns and hand keys and values to the attention
function of the config. Both are places where a model may be extended: one instance gets an ``expand_kv`` that leaves
latents as they are, and an attention function, registered under a name of its own, that knows what to do with them.
Whatever else a family does (query compression, interleaved RoPE, YaRN's factors, experts) stays its own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from latentize.attention.projections import UpProjections, up_projections
from latentize.errors import OptionError, UnsupportedModelError
from latentize.formats.balance import KEY, rebalance, unbalance
from latentize.modeling.attention import LatentAttention
from latentize.modeling.refusals import check_cache, no_paging, no_probabilities
from latentize.runtime.backends import Backend
from latentize.runtime.cache import LatentCache
from latentize.runtime.heads import heads
from latentize.runtime.rows import rows_of
from latentize.runtime.static import MaskColumns

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
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function, over latents and roped keys instead of keys and values.

    Raises:
        OptionError: dropout is asked for.
    """
    if not hasattr(module, _BACKEND):
        # A model made from an accelerated one's config.
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **more
        )
    if dropout:
        raise OptionError(
            f"an accelerated model has no dropout in attention, and is trained with {dropout}",
            where="config.json, attention_dropout",
            fix="set it to 0 (every layer has its `attention_dropout`), or latentize.decelerate(model) to train",
        )
    nope, sizes = module.qk_nope_head_dim, (module.kv_lora_rank, module.qk_nope_head_dim, module.v_head_dim)
    up = up_projections(module.kv_b_proj, sizes, scaling, 0.0, query)
    q_nope, q_rope = query[..., :nope], query[..., nope:]
    rows, backend = rows_of(key, value), getattr(module, _BACKEND)
    return heads(q_nope, q_rope, rows, up, attention_mask, backend).transpose(1, 2), None


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
    if isinstance(q_offset, Tensor) or isinstance(kv_length, MaskColumns):
        last = isinstance(kv_length, MaskColumns) and attention_mask is None
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
    module: LatentAttention, q_nope: Tensor, q_rope: Tensor, c: Any, k_rope: Any, up: UpProjections, mask: Any
) -> Tensor:
    """Stands for ``LatentAttention.heads``."""
    rows = rows_of(c, k_rope, module.spec.key_scales)
    return heads(q_nope, q_rope, rows, up, mask, getattr(module, _BACKEND))


@dataclass
class _Announce:
    """Before a layer runs: its attention is ours still, and a :class:`LatentCache`'s rows may stay as they lie.

    Not closures: an accelerated model can be copied and pickled.

    Attributes:
        rotary: What rotates; of the native format the layers themselves know their frequencies.
        interleaved: Whether keys are, after RoPE.
    """

    rotary: nn.Module | None
    interleaved: bool

    def __call__(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        native = isinstance(module, LatentAttention)
        if not native and module.config._attn_implementation != _NAME:
            raise _owned(f"attn_implementation is '{module.config._attn_implementation}' now")
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
        if isinstance(cache, LatentCache):
            layer: Any = cache.layers[module.layer_idx]
            # Rows are turned as the queries of this call are.
            positions = kwargs.get("position_ids")
            frequencies_F = module.frequencies(positions) if native else getattr(self.rotary, "inv_freq", None)
            layer.attends_rows, layer.frequencies_F, layer.interleaved = True, frequencies_F, self.interleaved
        elif cache is not None and not native:
            _check_cache(module, cache)


def _check_cache(module: Any, cache: Any) -> None:
    """A stock layer checks nothing itself."""
    shapes = ((1, 1, 0, module.kv_lora_rank), (1, 1, 0, module.qk_rope_head_dim))
    c, k_rope = (torch.empty(shape, device="meta") for shape in shapes)
    check_cache(cache, module.layer_idx, c, k_rope)


def _owned(what: str) -> OptionError:
    return OptionError(
        f"an accelerated model attends by latentize's own functions: {what}",
        where="attn_implementation",
        fix="latentize.decelerate(model) first",
    )


def _set_attention(self: Any, attn_implementation: Any, *_: Any, **__: Any) -> None:
    """``set_attn_implementation``: there is one that an accelerated model can have."""
    if attn_implementation != _NAME:
        raise _owned(f"'{attn_implementation}' cannot be set")


def _without_weights(self: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Before an accelerated model runs: attention probabilities are never made."""
    asked = kwargs.get("output_attentions")
    if asked if asked is not None else getattr(self.config, "output_attentions", False):
        raise no_probabilities()


def _continuous(self: Any, *_: Any, **__: Any) -> None:
    raise no_paging()


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
            layer.heads = partial(_native_heads, layer)
        else:
            layer.expand_kv = partial(_as_they_are, layer)
        setattr(layer, _BACKEND, chosen)
        hooks.append(layer.register_forward_pre_hook(_Announce(rotary, interleaved), with_kwargs=True))
    hooks.append(model.register_forward_pre_hook(_without_weights, with_kwargs=True))
    # Roped keys that are tiny are nothing to a cache in fp16, and queries that are huge too much for its kernels.
    exponents = getattr(model.config, KEY, None) if unbalance(model) else None
    # Models that were made from one config share it: this one gets its own. Layers that are not latent go on as before.
    decoder = model.config.get_text_config(decoder=True)
    # So does what sees beside a decoder.
    mixed = len(layers) < decoder.num_hidden_layers or decoder is not model.config
    changed = (m for m in layers if not isinstance(m, LatentAttention)) if mixed else model.modules()
    before = [(m, m.config._attn_implementation) for m in changed if hasattr(m, "config")]
    own = {id(m.config): copy.deepcopy(m.config) for m, _ in before}
    for module, _ in before:
        module.config = own[id(module.config)]
    for config in own.values():
        config._attn_implementation = _NAME
        if exponents is not None and hasattr(config, KEY):
            # Saved now, it must not say what is no longer true.
            delattr(config, KEY)
    setattr(model, _STATE, _State(model, layers, hooks, before, exponents))
    for name, own_method in _METHODS.items():
        setattr(model, name, partial(own_method, model))
    return model


@dataclass
class _State:
    """What :func:`accelerate` has done.

    Attributes:
        owner: To which model.
        layers: Its latent layers.
        hooks: Handles.
        before: Modules with a config, and what attention it named.
        exponents: Factors of the weights that were taken out, as the config named them, or ``None``.
    """

    owner: Any
    layers: list[Any]
    hooks: list[Any]
    before: list[tuple[Any, Any]]
    exponents: Any = None


def backend_of(model: Any) -> Backend:
    """Who decodes an accelerated model, and how often it did."""
    return getattr(getattr(model, _STATE).layers[0], _BACKEND)


def decelerate(model: Any) -> Any:
    """Undo :func:`accelerate`; what else was changed since stays."""
    if not is_accelerated(model):
        return model
    # Something may have been wrapped around it.
    state = getattr(model, _STATE)
    for layer in state.layers:
        delattr(layer, "heads" if isinstance(layer, LatentAttention) else "expand_kv")
        delattr(layer, _BACKEND)
    for hook in state.hooks:
        hook.remove()
    for module, implementation in state.before:
        module.config._attn_implementation = implementation
        if state.exponents is not None:
            setattr(module.config, KEY, state.exponents)
    if state.exponents is not None:
        rebalance(state.owner)
    for name in (*_METHODS, _STATE):
        delattr(state.owner, name)
    return model


def _generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """``generate`` with a cache that fits."""
    asked = kwargs.get("past_key_values") is not None or kwargs.get("cache_implementation") is not None
    configured = getattr(kwargs.get("generation_config") or self.generation_config, "cache_implementation", None)
    if not asked and configured is None and kwargs.get("use_cache", True):
        kwargs["past_key_values"] = LatentCache(self.config)
    return type(self).generate(self, *args, **kwargs)


# What an accelerated instance has of its own.
_METHODS = {
    "generate": _generate,
    "set_attn_implementation": _set_attention,
    "init_continuous_batching": _continuous,
}
