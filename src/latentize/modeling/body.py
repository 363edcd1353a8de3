"""Where transformers' models have their layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from latentize.families import families

__all__ = ["body_of", "decoder_layers"]


def body_of(model: Any) -> Any:
    """The decoder below the output head.

    Args:
        model: A causal language model of transformers.
    """
    body = model.base_model
    # Llama 4's class says that it is called what it is not.
    return model.model if body is model else body


def decoder_layers(model: Any) -> list[nn.Module]:
    """Its layers, in order.

    Args:
        model: A causal language model of transformers, or one in the native format.
    """
    inner = getattr(model, "source", model)
    table = families().get(inner.config.model_type)
    # What has latent attention by itself has DeepSeek's names.
    return list(getattr(body_of(inner), "layers" if table is None else table.module("layers")))
