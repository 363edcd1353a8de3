"""What latent attention is asked for in vain, by transformers or whoever uses it.

Shape letters as in :mod:`latentize.attention.latent`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from latentize.errors import OptionError

__all__ = ["check_cache", "no_paging", "no_probabilities", "unknown_mask"]


def check_cache(cache: Any, layer_idx: int, c_B1Tr: Tensor, k_rope_BPTR: Tensor) -> None:
    """Whether latents and roped keys may follow what a cache of transformers holds.

    Raises:
        OptionError: it holds keys and values of another model, or such as prefix tuning has learnt.
    """
    layers = getattr(cache, "layers", ())
    layer = layers[layer_idx] if layer_idx < len(layers) else None
    # Only what lies there: a cache of latents makes these tensors when they are asked for.
    own = getattr(layer, "__dict__", {})
    for held, new in ((own.get("keys"), c_B1Tr), (own.get("values"), k_rope_BPTR)):
        if not isinstance(held, Tensor) or held.ndim != 4 or held.numel() == 0:
            continue
        if type(held) is Tensor and (held.shape[1], held.shape[3]) != (new.shape[1], new.shape[3]):
            raise OptionError(
                f"the cache holds {held.shape[1]} heads of {held.shape[3]} a token, and latent attention stores "
                f"{new.shape[1]} of {new.shape[3]}",
                where="past_key_values",
                fix="start from an empty cache; prefix tuning learns keys and values, use LoRA or prompt tuning",
            )


def no_probabilities() -> OptionError:
    """What to raise where somebody asks for attention probabilities."""
    return OptionError(
        "latent attention does not return probabilities",
        where="output_attentions",
        fix="leave it out; the source has them, and a portable model before `accelerate`, with eager attention",
    )


def no_paging() -> OptionError:
    """What to raise where somebody asks for continuous batching."""
    return OptionError(
        "latent attention has no paged cache for transformers' continuous batching",
        where="generate_batch",
        fix="model.generate with padding on the left, or vLLM (docs/engines.md)",
    )


def unknown_mask(mask: Any) -> OptionError:
    kind = f"{mask.ndim} axes" if isinstance(mask, Tensor) else f"the type {type(mask).__name__}"
    return OptionError(
        f"latent attention takes masks [B, 1, T, S], and this one has {kind}",
        where="attention_mask",
        fix="attn_implementation='sdpa' or 'eager' make such masks; flash and flex attention do not",
    )
