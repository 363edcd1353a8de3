"""What several functions are told by name."""

from __future__ import annotations

import torch

from latentize.errors import OptionError

__all__ = ["torch_dtype"]


def torch_dtype(name: str) -> torch.dtype:
    """By its name.

    Raises:
        OptionError: it is no precision that models run in.
    """
    if name not in ("float32", "bfloat16", "float16"):
        raise OptionError(f"no such precision: '{name}'", where="--dtype", fix="float32, bfloat16 or float16")
    return getattr(torch, name)
