"""The cache of a latent model: one row a token and layer, in as few bits as one likes.

A token's row is its latent ``c`` and its roped key ``k_R``. Rows are appended, never touched again: quantised ones keep
the scale that they were given, and the newest may wait in full precision for a while (``residual``). With ``window``
only the first tokens and the last ``N`` are kept (StreamingLLM, Xiao et al., arXiv 2309.17453).

:func:`latentize.accelerate` attends to the rows as they lie. A model that is not accelerated gets latents and keys back
in its own precision, as from any cache of transformers.

B batch, S cached tokens, T new tokens, r kv_lora_rank, P roped keys, R qk_rope_head_dim, d = r + P R.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, TypedDict

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from latentize.attention.rope import rotate_half, rotate_interleaved
from latentize.errors import OptionError
from latentize.runtime.codecs import Codec, Plain, codec

__all__ = ["LatentCache", "LatentLayer", "Rows", "cache_formats"]

# Rows that are restored at once: they stay in a core's cache until they are attended.
_BLOCK = 2048
_GROWTH, _LEAST = 32, 64


@cache
def rotation(size: int) -> Tensor:
    """An orthogonal ``[n, n]`` that spreads every value over all: Hadamard's where there is one, else a random one."""
    if size & (size - 1) == 0:
        h = torch.ones(1, 1, dtype=torch.float64)
        while len(h) < size:
            h = torch.cat([torch.cat([h, h], dim=1), torch.cat([h, -h], dim=1)])
        return h / size**0.5
    generator = torch.Generator().manual_seed(size)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


class _Growing:
    """Tensors that grow along their second axis, in place while there is room."""

    def __init__(self) -> None:
        self.tensors: tuple[Tensor, ...] = ()
        self.length = 0

    def append(self, new: tuple[Tensor, ...]) -> None:
        end = self.length + new[0].shape[1]
        if not self.tensors:
            self.tensors = tuple(t[:, :0] for t in new)
        if end > self.tensors[0].shape[1]:
            room = end + max(_LEAST, end // _GROWTH)
            self.tensors = tuple(_enlarged(t[:, : self.length], room) for t in self.tensors)
        for mine, more in zip(self.tensors, new, strict=True):
            mine[:, self.length : end] = more
        self.length = end

    def view(self, start: int, stop: int) -> tuple[Tensor, ...]:
        return tuple(t[:, start:stop] for t in self.tensors)

    def keep(self, head: int, tail: int) -> None:
        """Only the first ``head`` and the last ``tail`` tokens."""
        self.tensors = tuple(torch.cat([t[:, :head], t[:, self.length - tail : self.length]], 1) for t in self.tensors)
        self.length = head + tail

    def map(self, change: Any) -> None:
        self.tensors = tuple(change(t) for t in self.tensors)

    @property
    def nbytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self.tensors)


def _enlarged(t: Tensor, room: int) -> Tensor:
    larger = t.new_empty((t.shape[0], room, *t.shape[2:]))
    larger[:, : t.shape[1]] = t
    return larger


@dataclass(frozen=True)
class Rows:
    """What a layer's attention may see, as it is stored.

    Attributes:
        layer: Where it lies.
        dtype: What to restore it to.
        new: Tokens that came in last.
    """

    layer: LatentLayer
    dtype: torch.dtype
    new: int

    @property
    def rank(self) -> int:
        return self.layer.rank

    @property
    def rotation_rr(self) -> Tensor | None:
        """Latents are stored times this; queries and sums have to be, too."""
        return self.layer.rotation(self.dtype)

    def positions(self) -> Tensor:
        """Of every row, ``[S]``; the mask has these columns."""
        return self.layer.positions(self.new)

    def blocks(self) -> Iterator[Tensor]:
        """Rows ``[B, s, d]`` in order."""
        return self.layer.blocks(self.dtype, self.new)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Latents ``[B, 1, S, r]`` in their own basis, and roped keys ``[B, P, S, R]``."""
        rows_BSd = torch.cat(list(self.blocks()), dim=1)
        c_BSr, k_BSR = rows_BSd[..., : self.rank], rows_BSd[..., self.rank :]
        turn = self.rotation_rr
        k_BPSR = k_BSR.unflatten(-1, (self.layer.roped_keys, -1)).transpose(1, 2)
        return (c_BSr if turn is None else c_BSr @ turn.mT)[:, None], k_BPSR


class LatentLayer(CacheLayerMixin):
    """One layer's rows.

    Args:
        latent, rope: Formats of latents and roped keys; ``None`` is that of the model.
        window, sinks: As in :class:`LatentCache`.
        residual: As in :class:`LatentCache`.
    """

    is_sliding = False

    def __init__(
        self, latent: str | None, rope: str | None, window: int | None, sinks: int, residual: int, **_: Any
    ) -> None:
        # The base class would set `keys` and `values`, which are made on demand here.
        self.formats, self.window, self.sinks, self.residual = (latent, rope), window, sinks, residual
        self.is_croppable = window is None
        # Set by what attends to rows as they lie.
        self.attends_rows = False
        self.frequencies_F: Tensor | None = None
        self.interleaved = False
        self._clear()

    def _clear(self) -> None:
        self.seen, self.rank, self.roped_keys, self.is_initialized = 0, 0, 1, False
        self.stored, self.recent = _Growing(), _Growing()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.rank = key_states.dtype, key_states.device, key_states.shape[-1]
        own = Plain(key_states.dtype)
        self.roped_keys = value_states.shape[1]
        names, sizes = self.formats, (self.rank, self.roped_keys * value_states.shape[-1])
        self.codecs: tuple[Codec, Codec] = tuple(  # type: ignore[assignment]
            own if name is None else codec(name, size) for name, size in zip(names, sizes, strict=True)
        )
        self.plain = all(c == own for c in self.codecs)
        self.is_initialized = True

    def rotation(self, dtype: torch.dtype) -> Tensor | None:
        if isinstance(self.codecs[0], Plain):
            return None
        return rotation(self.rank).to(self.device, dtype)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """Append ``c [B, 1, T, r]`` and ``k_R [B, P, T, R]``.

        Returns:
            All of both, or where the model attends to rows, a :class:`Rows` for either.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        turn, c_BTr, new = self.rotation(torch.float32), key_states[:, 0], key_states.shape[2]
        if turn is not None:
            c_BTr = (c_BTr.float() @ turn).to(c_BTr.dtype)
        self._trim()
        self.recent.append((torch.cat([c_BTr, value_states.transpose(1, 2).flatten(2)], dim=-1),))
        self.seen += new
        if not self.plain and self.recent.length >= 2 * self.residual + 1:
            self._store(self.recent.length - self.residual)
        rows = Rows(self, key_states.dtype, new)
        if self.attends_rows:
            return rows, rows
        if self.window is not None:
            raise OptionError(
                "a window needs a model that attends to cached rows",
                where="LatentCache",
                fix="latentize.accelerate(model)",
            )
        return rows.tensors()

    def _store(self, count: int) -> None:
        """The oldest of the waiting rows, for good."""
        (old_Bsd,) = self.recent.view(0, count)
        parts = old_Bsd.split([self.rank, old_Bsd.shape[-1] - self.rank], dim=-1)
        encoded = [t for c, part in zip(self.codecs, parts, strict=True) for t in c.encode(part)]
        self.stored.append(tuple(encoded))
        self.recent.keep(0, self.recent.length - count)

    def _restore(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        tensors = self.stored.view(start, stop)
        # A format with a scale has two tensors, one without has one.
        count = 1 if isinstance(self.codecs[0], Plain) else 2
        latent, rope = self.codecs
        return torch.cat([latent.decode(tensors[:count], dtype), rope.decode(tensors[count:], dtype)], dim=-1)

    def _trim(self) -> None:
        """Let go of what no later token will see, now and then."""
        if self.window is None or self._kept < self.sinks + 2 * self.window:
            return
        if self.stored.length:
            self.stored.keep(self.sinks, self.window - self.recent.length)
        else:
            self.recent.keep(self.sinks, self.window)

    @property
    def _kept(self) -> int:
        return self.stored.length + self.recent.length

    def _spans(self, new: int) -> list[tuple[int, int]]:
        """Of the rows that are kept, those that some of the ``new`` last tokens see."""
        if self.window is None or self._kept <= self.sinks + self.window + new - 1:
            return [(0, self._kept)]
        return [(0, self.sinks), (self._kept - self.window - new + 1, self._kept)]

    def positions(self, new: int) -> Tensor:
        spans, gone = self._spans(new), self.seen - self._kept
        first = torch.arange(*spans[0], device=self.device)
        if len(spans) == 1:
            # Nothing was let go of but what lies between the sinks and the rest.
            return torch.where(first < self.sinks, first, first + gone) if gone else first
        return torch.cat([first, gone + torch.arange(*spans[1], device=self.device)])

    def blocks(self, dtype: torch.dtype, new: int) -> Iterator[Tensor]:
        spans, gone = self._spans(new), self.seen - self._kept
        if len(spans) == 1 and gone:
            spans = [(0, self.sinks), (self.sinks, self._kept)]
        for number, (start, stop) in enumerate(spans):
            # The first tokens stay as near as the window's far end: no distance is one that was never trained on.
            shift = gone + spans[1][0] - self.sinks if number == 0 and len(spans) == 2 else 0
            for rows_Bsd in self._span(start, stop, dtype):
                yield self._turned(rows_Bsd, shift) if shift else rows_Bsd

    def _span(self, start: int, stop: int, dtype: torch.dtype) -> Iterator[Tensor]:
        border = self.stored.length
        for begin in range(start, min(stop, border), _BLOCK):
            yield self._restore(begin, min(begin + _BLOCK, stop, border), dtype)
        if stop > border:
            yield self.recent.view(max(start - border, 0), stop - border)[0]

    def _turned(self, rows_Bsd: Tensor, shift: int) -> Tensor:
        if self.frequencies_F is None:
            return rows_Bsd
        angle_F = shift * self.frequencies_F.to(rows_Bsd.device, torch.float64)
        turn = rotate_interleaved if self.interleaved else rotate_half
        c_Bsr, k_BsR = rows_Bsd[..., : self.rank], rows_Bsd[..., self.rank :]
        k_BsPR = k_BsR.unflatten(-1, (self.roped_keys, -1))
        return torch.cat([c_Bsr, turn(k_BsPR, angle_F.cos(), angle_F.sin()).flatten(2)], dim=-1)

    @property
    def keys(self) -> Tensor:
        """Latents ``[B, 1, S, r]``, restored."""
        return Rows(self, self.dtype, 1).tensors()[0]

    @property
    def values(self) -> Tensor:
        """Roped keys ``[B, P, S, R]``, restored."""
        return Rows(self, self.dtype, 1).tensors()[1]

    @property
    def nbytes(self) -> int:
        """Bytes that the layer's tensors take up."""
        return self.stored.nbytes + self.recent.nbytes

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        count = abs(tokens_to_remove)
        if not self.is_initialized or count == 0:
            return
        if self.window is not None:
            raise OptionError("a cache with a window cannot be cropped", where="LatentCache", fix="use none here")
        self.seen -= count
        waiting = min(count, self.recent.length)
        self.recent.length -= waiting
        self.stored.length -= count - waiting

    def _map(self, change: Any) -> None:
        self.stored.map(change)
        self.recent.map(change)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda t: t[indices])


class CacheFormats(TypedDict, total=False):
    """Arguments of :class:`LatentCache`."""

    latent: str
    rope: str


def cache_formats(text: str | None) -> CacheFormats:
    """Arguments of :class:`LatentCache` from ``LATENT[+ROPE]``: ``"int4"``, ``"int4+bf16"``.

    A roped key without a format of its own gets that of the latent, but never fewer than 8 bits: it is small, and
    what it loses is not spread over others.

    Raises:
        OptionError: an unknown format.
    """
    if text is None:
        return {}
    latent, _, rope = text.partition("+")
    rope = rope or ("int8" if latent == "int4" else latent)
    for name in (latent, rope):
        codec(name, 2)
    return {"latent": latent, "rope": rope}


class LatentCache(Cache):
    """A cache for DeepSeek-V2/V3-type models and for the native format, for ``generate(past_key_values=…)``.

    Args:
        config: The model's; only how many layers it has is read, and which of them are not latent: these have what
            transformers gives them.
        latent: Format of the latents: bf16, fp16, fp32, fp8, int8 or int4; by default what the model computes in.
            Below 16 bits they are rotated first, which spreads outliers, with a scale for each token.
        rope: Format of the roped keys.
        window: Keep the last ``N`` tokens only, and the first ``sinks``.
        sinks: First tokens that are kept beside a window.
        residual: Newest tokens that are kept in full precision, at least; up to twice as many are.

    Raises:
        OptionError: an unknown format, or a window smaller than what waits in full precision.
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
    ) -> None:
        for name in filter(None, (latent, rope)):
            codec(name, 2)
        if window is not None and window <= 2 * residual + 1:
            raise OptionError(
                f"a window of {window} tokens with {residual} in full precision", where="LatentCache", fix="widen it"
            )
        count = config.get_text_config(decoder=True).num_hidden_layers
        entries = getattr(config, "latent_layers", None) or [True] * count
        layers: list[Any] = [LatentLayer(latent, rope, window, sinks, residual) for _ in range(count)]
        if None in entries:
            others = DynamicCache(config=config).layers
            layers = [other if e is None else mine for e, mine, other in zip(entries, layers, others, strict=True)]
        self._rows = [layer for layer in layers if isinstance(layer, LatentLayer)]
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes that the latent layers' tensors take up."""
        return sum(layer.nbytes for layer in self._rows)
