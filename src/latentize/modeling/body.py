"""Where transformers' models have their layers."""

from __future__ import annotations

from typing import Any

__all__ = ["body_of"]


def body_of(model: Any) -> Any:
    """The decoder below the output head.

    Args:
        model: A causal language model of transformers.
    """
    body = model.base_model
    # Llama 4's class says that it is called what it is not.
    return model.model if body is model else body
