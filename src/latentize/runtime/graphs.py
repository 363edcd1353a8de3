"""Decode steps as one CUDA graph: captured once, replayed for every token, with nothing left for the host to launch.

    cache = latentize.LatentCache(model.config, latent="int8", rope="int8", max_length=65_536)
    model(prompt_ids, past_key_values=cache)
    step = DecodeGraph(model, cache, batch=1)
    logits = step(token)

Works for any model whose cache is static: a :class:`~latentize.runtime.cache.LatentCache` with ``max_length``, or
transformers' ``StaticCache``. Where there is no CUDA the same step runs uncaptured, through the same tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentize.errors import OptionError
from latentize.runtime.cache import LatentCache

__all__ = ["DecodeGraph"]

# Steps before the capture: kernels are compiled and tried, libraries allocate what they work in.
_WARMUP = 2


class DecodeGraph:
    """One decode step over a static cache that holds the prompt already.

    The first call captures; it and the warm-up write rows where the next token's will be, and leave the cache as it
    was.
    No sequence may be padded: a mask would have to grow.

    Args:
        model: A loaded model, accelerated or not.
        cache: A static cache with the prompt in it.
        batch: Sequences.
        capture: Whether to capture; by default where the model is on a CUDA device.

    Raises:
        OptionError: a cache that grows.
    """

    def __init__(self, model: Any, cache: Any, batch: int, *, capture: bool | None = None) -> None:
        self.model, self.cache = model, cache
        self.room: int = getattr(cache, "max_length", None) or cache.get_max_length()
        self.used = int(cache.get_seq_length())
        if self.room <= 0 or self.used == 0:
            raise OptionError(
                "a graph needs a static cache with a prompt in it",
                where="DecodeGraph",
                fix="LatentCache(model.config, max_length=…), and the prompt through the model first",
            )
        device = next(model.parameters()).device
        self.capture = device.type == "cuda" if capture is None else capture
        self.tokens_B1 = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.logits_BV: Tensor | None = None
        self._graph: Any = None

    @torch.no_grad()
    def __call__(self, tokens_B1: Tensor) -> Tensor:
        """Logits ``[B, V]`` of the next token; the tensor is overwritten by the next call."""
        if self.used + 1 > self.room:
            raise OptionError(f"a cache of {self.room} tokens is full", where="DecodeGraph", fix="a larger max_length")
        self.tokens_B1.copy_(tokens_B1)
        if not self.capture:
            self._run()
        else:
            self._graph = self._graph or self._recorded()
            self._graph.replay()
            if isinstance(self.cache, LatentCache):
                self.cache.advance(1)
        self.used += 1
        assert self.logits_BV is not None
        return self.logits_BV

    def _run(self) -> None:
        out = self.model(input_ids=self.tokens_B1, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        if self.logits_BV is None:
            self.logits_BV = torch.empty_like(out.logits[:, -1])
        self.logits_BV.copy_(out.logits[:, -1])

    def _recorded(self) -> Any:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARMUP):
                self._run()
                self._rewind()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run()
        # Capturing counts on the host, and runs nothing.
        self._rewind()
        return graph

    def _rewind(self) -> None:
        if isinstance(self.cache, LatentCache):
            self.cache.rewind(self.used)
            return
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.used)
