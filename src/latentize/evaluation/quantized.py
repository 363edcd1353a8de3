"""The source with transformers' own quantised cache: what one would use without converting anything."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import QuantizedCache
from transformers.utils.import_utils import is_hqq_available, is_optimum_quanto_available

from latentize.evaluation.predict import Predict

__all__ = ["Quantized", "quantized"]

# Tokens that go in at once and see each other exactly; later ones see them quantised.
_CHUNK = 32
_GROUP = 64


@dataclass(frozen=True)
class Quantized:
    """A way to predict from a quantised cache.

    Attributes:
        name: Backend and format.
        predict: The model's predictions.
        bits: Of a cached value, with its share of scale and offset, 16 bits each.
    """

    name: str
    predict: Predict
    bits: float


def _options(latent: str, values: int) -> tuple[str, dict[str, Any]] | str:
    """Backend and options for a format; or why there is none."""
    if latent == "fp8":
        return "fp8", {}
    bits = {"int8": 8, "int4": 4}.get(latent)
    if bits is None:
        return f"transformers' QuantizedCache knows no {latent}"
    group = {"nbits": bits, "q_group_size": math.gcd(_GROUP, values), "residual_length": _CHUNK}
    if bits == 4 and is_optimum_quanto_available():
        return "quanto", group
    if is_hqq_available():
        return "hqq", group
    return "transformers' QuantizedCache wants " + ("optimum-quanto or hqq" if bits == 4 else "hqq") + ", not installed"


def quantized(model: Any, latent: str, values: int) -> Quantized | str:
    """The source with a quantised cache; or why that cannot be.

    Args:
        model: Loaded.
        latent: ``fp8``, ``int8`` or ``int4``.
        values: Keys of a token and layer; values are as many.
    """
    chosen = _options(latent, values)
    if isinstance(chosen, str):
        return chosen
    backend, options = chosen
    try:
        QuantizedCache(backend, model.config, **options)
    except (ImportError, ValueError) as error:
        return f"transformers' QuantizedCache: {error}"

    @torch.no_grad()
    def predict(tokens_BT: Tensor, count: int) -> Tensor:
        """In chunks: the first tokens of such a cache see themselves as they were."""
        cache = QuantizedCache(backend, model.config, **options)
        parts = [
            model(input_ids=part, past_key_values=cache, use_cache=True).logits
            for part in tokens_BT.to(model.device).split(_CHUNK, dim=1)
        ]
        return torch.cat(parts, dim=1)[:, -count:]

    bits = options.get("nbits", 8)
    # One scale for a whole tensor is nothing to a token.
    shared = 32 / options["q_group_size"] if options else 0.0
    named = "transformers" if backend == latent else backend
    return Quantized(f"{named} {latent}", predict, bits + shared)
