"""Models as functions from tokens to logits, from whatever cache they are to predict from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from latentize.modeling.fused import fuse
from latentize.runtime.accelerate import accelerate, has_latents, no_latents
from latentize.runtime.cache import LatentCache, cache_formats

__all__ = ["Predict", "longest_context", "predictor"]

# Logits of the last so many tokens, ``[B, count, V]``, of tokens ``[B, T]``; 0 is all.
Predict = Callable[[Tensor, int], Tensor]


def predictor(model: Any, *, cache: str | None = None, window: int | None = None) -> Predict:
    """The predictions of a loaded model; with a cache format or a window, one with latents is accelerated.

    All tokens go through at once: under a window each sees the first tokens where they stand.

    Args:
        model: Loaded.
        cache: ``LATENT[+ROPE]``, formats of :class:`LatentCache`.
        window: Tokens that are seen, beside the first four.

    Raises:
        OptionError: an unknown format, or a model without latents.
    """
    formats = cache_formats(cache)
    stored = bool(formats) or window is not None
    if stored and not has_latents(model):
        raise no_latents("--cache" if formats else "--window")
    if stored:
        accelerate(model)
    else:
        fuse(model)

    @torch.no_grad()
    def predict(tokens_BT: Tensor, count: int) -> Tensor:
        options: dict[str, Any] = {"use_cache": False}
        if stored:
            options = {"past_key_values": LatentCache(model.config, window=window, **formats)}
        return model(input_ids=tokens_BT.to(model.device), logits_to_keep=count, **options).logits

    return predict


def longest_context(model: Any) -> int:
    """Tokens that a loaded model was made for."""
    return model.config.get_text_config(decoder=True).max_position_embeddings
