"""Keys and values of MHA, MQA and GQA as latents are kept: in few bits, or only so many tokens of them.

What a latent is compared with gets the same treatment, so that the comparison is of attention and not of codecs: keys
and values are rotated within each head, which spreads outliers, and coded with a scale for each token; a window keeps
the first four tokens beside the last ones, where they stand.

B batch, G kv heads, T new tokens, S all tokens, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from latentize.attention.masks import causal_mask
from latentize.evaluation.predict import Predict
from latentize.runtime.cache import cache_formats
from latentize.runtime.codecs import Plain, codec
from latentize.runtime.rotation import rotation

__all__ = ["SINKS", "CodedLayer", "grouped_predictor", "window_mask"]

SINKS = 4


class CodedLayer(DynamicLayer):
    """One layer's keys and values after coding: what attention sees of every token, itself included.

    Args:
        name: A format of :data:`latentize.runtime.codecs.FORMATS`, for keys as for values.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``[B, G, T, d]`` of either and return all, restored."""
        return super().update(self._restored(key_states), self._restored(value_states), *args, **kwargs)

    def _restored(self, x_BGTd: Tensor) -> Tensor:
        heads, size = x_BGTd.shape[1], x_BGTd.shape[3]
        coder = codec(self.name, heads * size)
        if isinstance(coder, Plain):
            return coder.decode(coder.encode(x_BGTd), x_BGTd.dtype)
        turn_dd = rotation(size).to(x_BGTd.device, torch.float32)
        row_BTn = (x_BGTd.float() @ turn_dd).transpose(1, 2).flatten(2)
        turned_BGTd = coder.decode(coder.encode(row_BTn), torch.float32).unflatten(2, (heads, size)).transpose(1, 2)
        return (turned_BGTd @ turn_dd.mT).to(x_BGTd.dtype)


def window_mask(tokens: int, window: int, dtype: torch.dtype) -> Tensor:
    """What is added to scores, ``[1, 1, T, T]``: 0 for the last ``window`` tokens and the first four, else -inf."""
    seen_TT = causal_mask(tokens, tokens, window=window)
    seen_TT[:, :SINKS] |= causal_mask(tokens, tokens)[:, :SINKS]
    return torch.zeros(1, 1, tokens, tokens, dtype=dtype).masked_fill(~seen_TT, torch.finfo(dtype).min)


def grouped_predictor(model: Any, *, cache: str | None = None, window: int | None = None) -> Predict:
    """As :func:`latentize.evaluation.predict.predictor`, of a model that caches keys and values.

    Args:
        model: Loaded.
        cache: ``LATENT[+ROPE]``, of which the first counts.
        window: Tokens that are seen, beside the first four.

    Raises:
        OptionError: an unknown format.
    """
    name = cache_formats(cache).get("latent")
    layers = model.config.get_text_config(decoder=True).num_hidden_layers

    @torch.no_grad()
    def predict(tokens_BT: Tensor, count: int) -> Tensor:
        options: dict[str, Any] = {"use_cache": False}
        if name is not None:
            options = {"use_cache": True, "past_key_values": Cache(layers=[CodedLayer(name) for _ in range(layers)])}
        if window is not None:
            options["attention_mask"] = window_mask(tokens_BT.shape[1], window, model.dtype).to(model.device)
        return model(input_ids=tokens_BT.to(model.device), logits_to_keep=count, **options).logits

    return predict
