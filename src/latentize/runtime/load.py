"""Models of any supported kind, loaded as users load them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from latentize.errors import CheckpointError

__all__ = ["load_model"]


def load_model(folder: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """``AutoModelForCausalLM.from_pretrained``, with the native format known and nothing left unsaid.

    Raises:
        CheckpointError: transformers cannot load it, or weights are missing or left over.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"transformers cannot load the model: {error}", where=str(folder)) from error
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        odd = sorted(str(k) for k in info.get(kind, ()))
        if odd:
            raise CheckpointError(f"{kind.replace('_', ' ')}: {', '.join(odd[:3])}", where=str(folder))
    return model.to(device).eval()
