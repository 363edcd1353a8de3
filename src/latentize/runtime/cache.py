"""The cache of a latent model, for ``generate(past_key_values=…)``."""

from __future__ import annotations

from typing import Any, TypedDict

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from latentize.errors import OptionError
from latentize.runtime.codecs import codec
from latentize.runtime.coded import code_ahead
from latentize.runtime.layer import LatentLayer
from latentize.runtime.static import StaticLatentLayer

__all__ = ["LatentCache", "LatentLayer", "cache_formats", "latent_entries"]


class CacheFormats(TypedDict, total=False):
    """Arguments of :class:`LatentCache`."""

    latent: str
    rope: str


def cache_formats(text: str | None) -> CacheFormats:
    """Arguments of :class:`LatentCache` from ``LATENT[+ROPE]``: ``"int4"``, ``"int4+bf16"``. ``"auto"`` is what the
    checkpoint says: the codes of a model that has them, and 16 bits of any other.

    A roped key without a format of its own gets that of the latent, but never fewer than 8 bits: it is small, and
    what it loses is not spread over others.

    Raises:
        OptionError: an unknown format.
    """
    if text is None or text == "auto":
        return {}
    latent, _, rope = text.partition("+")
    rope = rope or ("int8" if latent == "int4" else latent)
    for name in (latent, rope):
        codec(name, 2)
    return {"latent": latent, "rope": rope}


def latent_entries(config: Any) -> list[Any]:
    """For each layer of a model something if it has latent attention, of the native format its sizes, or ``None``."""
    decoder = config.get_text_config(decoder=True)
    types = getattr(decoder, "layer_types", None) or ["full_attention"] * decoder.num_hidden_layers
    return getattr(config, "latent_layers", None) or [True if kind == "full_attention" else None for kind in types]


class LatentCache(Cache):
    """A cache for DeepSeek-V2/V3-type models and for the native format, for ``generate(past_key_values=…)``.

    Args:
        config: The model's; only how many layers it has is read, and which of them are not latent: these have what
            transformers gives them.
        latent: Format of the latents: bf16, fp16, fp32, fp8, int8 or int4; by default that of the checkpoint's codes,
            where it has some (``convert --bytes``), else what the model computes in. Below 16 bits they are rotated
            first, which spreads outliers, with a scale for each token.
        rope: Format of the roped keys.
        window: Keep the last ``N`` tokens only, and the first ``sinks``.
        sinks: First tokens that are kept beside a window.
        residual: Newest tokens that are kept in full precision, at least; up to twice as many are. Of the checkpoint's
            codes exactly so many, and no fewer than the checkpoint says.
        max_length: Room for so many tokens from the start, none ever moved: a static cache, for CUDA graphs
            (``runtime.graphs``). Without a window and ``residual``; all of it is attended to where no kernel is.

    Raises:
        OptionError: an unknown format, a window smaller than what waits in full precision, or a static cache with
            either, or for layers that are not latent.
    """

    def __init__(
        self,
        config: Any,
        *,
        latent: str | None = None,
        rope: str | None = None,
        window: int | None = None,
        sinks: int = 4,
        residual: int = 0,
        max_length: int | None = None,
    ) -> None:
        for name in filter(None, (latent, rope)):
            codec(name, 2)
        if window is not None and window <= 2 * residual + 1:
            raise OptionError(
                f"a window of {window} tokens with {residual} in full precision", where="LatentCache", fix="widen it"
            )
        if max_length is not None and (window is not None or residual or max_length < 1):
            raise OptionError(
                f"a static cache of {max_length} tokens, window {window}, residual {residual}",
                where="LatentCache",
                fix="max_length alone, 1 or more; windows let go of rows, and rows that wait are stored twice",
            )
        self.max_length, entries = max_length, latent_entries(config)
        if max_length is not None and None in entries:
            raise OptionError(
                "a static cache for a model some of whose layers are not latent",
                where="LatentCache",
                fix="leave max_length out",
            )
        # The native format says how many factors of keys a row has; others have none.
        factors = [entry.get("key_scales", 0) if isinstance(entry, dict) else 0 for entry in entries]
        layers: list[Any] = [
            LatentLayer(latent, rope, window, sinks, residual, key_scales)
            if max_length is None
            else StaticLatentLayer(latent, rope, max_length, key_scales)
            for key_scales in factors
        ]
        if None in entries:
            others = DynamicCache(config=config).layers
            layers = [other if e is None else mine for e, mine, other in zip(entries, layers, others, strict=True)]
        self._rows = [layer for layer in layers if isinstance(layer, LatentLayer)]
        super().__init__(layers=layers)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if self._rows and self.layers[layer_idx] is self._rows[0]:
            one = key_states.shape[2] == 1
            code_ahead([(m.coder, m.next_coded if one else None) for m in self._rows if m.coder is not None])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def nbytes(self) -> int:
        """Bytes that the latent layers' tensors take up."""
        return sum(layer.nbytes for layer in self._rows)

    def advance(self, tokens: int) -> None:
        """Tell a static cache of tokens that a replayed graph has added."""
        for layer in self._static():
            layer.advance(tokens)

    def rewind(self, tokens: int) -> None:
        """Let a static cache forget all but its first ``tokens``."""
        for layer in self._static():
            layer.rewind(tokens)

    def _static(self) -> list[StaticLatentLayer]:
        found = [layer for layer in self._rows if isinstance(layer, StaticLatentLayer)]
        assert len(found) == len(self._rows), "the cache has no max_length"
        return found
