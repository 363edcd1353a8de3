"""Models of any supported kind, loaded as users load them."""

from __future__ import annotations

from contextlib import nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from latentize.checkpoint import load_config, pretrained
from latentize.checkpoint.gguf import is_gguf
from latentize.errors import CheckpointError

__all__ = ["load_model"]


def load_model(
    path: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu", trust_remote_code: bool = False
) -> Any:
    """``AutoModelForCausalLM.from_pretrained``, with the native format known and nothing left unsaid.

    Args:
        path: A folder; or a GGUF file, which transformers dequantises.
        dtype: Precision to run in.
        device: Where.
        trust_remote_code: Whether code of the checkpoint may be run.

    Raises:
        CheckpointError: transformers cannot load it, or weights are missing or left over; or a package is missing that
            transformers wants for a GGUF file.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options = {**pretrained(path), **_dequantised(path), "dtype": dtype, "trust_remote_code": trust_remote_code}
    try:
        # The bar that transformers shows for a GGUF file knows no setting.
        with redirect_stderr(StringIO()) if is_gguf(path) else nullcontext():
            loaded: Any = AutoModelForCausalLM.from_pretrained(**options, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"transformers cannot load the model: {error}", where=str(path)) from error
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        odd = sorted(str(k) for k in info.get(kind, ()))
        if odd:
            raise CheckpointError(f"{kind.replace('_', ' ')}: {', '.join(odd[:3])}", where=str(path))
    return model.to(device).eval()


def _dequantised(path: Path) -> dict[str, Any]:
    """What transformers is told of a GGUF file beside where it is."""
    if not is_gguf(path):
        return {}
    import transformers

    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise CheckpointError(
            "transformers loads a GGUF file with the accelerate package, which is not installed",
            code="LZ120",
            where="the accelerate package",
            fix="pip install 'latentize[gguf]'",
        ) from None
    # Before there was this setting everything was dequantised.
    setting = getattr(transformers, "GgufConfig", None)
    found = {} if setting is None else {"quantization_config": setting(dequantize=True)}
    return {"config": load_config(path), **found}
