"""A whole converted model as a differentiable function of its attention layers. It is in memory, all of it.

N sequences, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from latentize.modeling.attention import LatentAttention
from latentize.modeling.layer import SourceLayer, Stream
from latentize.modeling.source import SourceModel

__all__ = ["Student"]

# Bounds the float32 logits that exist at once.
_LOGIT_BYTES = 1 << 26


class Student:
    """Layers, added one by one, and the output head.

    Attributes:
        head: From hidden states that leave the last layer to logits.
        at_once: Tokens whose logits may exist at once.
    """

    def __init__(self, source: SourceModel) -> None:
        self._source = source
        self._layers: list[Callable[[Stream], Stream]] = []
        self.head, self.at_once = source.head(), max(1, _LOGIT_BYTES // (4 * source.spec.vocab_size))

    def add(self, layer: SourceLayer, attention: LatentAttention | None) -> None:
        """The next layer; with no attention it stays as it is. Only what a step runs is kept of it."""
        layer.hold_as_stored()
        self._layers.append(layer.with_attention(attention))
        layer.forget()

    def through(self, stream: Stream, start: int, stop: int) -> Stream:
        """What leaves the layers from ``start`` up to ``stop``."""
        for layer in self._layers[start:stop]:
            stream = layer(stream)
        return stream

    def run(self, stream: Stream, *, start: int = 0) -> Tensor:
        """Hidden states that leave the last layer, ``[n, D]``, of what enters layer ``start``."""
        return self.through(stream, start, len(self._layers)).hidden_NTD.flatten(0, 1)

    @torch.enable_grad()
    def learn(self, stream: Stream) -> Tensor:
        """:meth:`run`, so that gradients can come back."""
        return self.run(stream)

    def log_probs(self, hidden_nD: Tensor) -> Iterator[Tensor]:
        """Of hidden states that leave the last layer, float32 ``[·, V]``, some tokens at a time."""
        return (self.head(part_nD).float().log_softmax(-1) for part_nD in hidden_nD.split(self.at_once))

    @torch.no_grad()
    def divergence(self, hidden_nD: Tensor, reference: Iterable[Tensor]) -> float:
        """Mean ``KL(reference ‖ model)`` in nats per token, of hidden states that leave the last layer.

        Args:
            hidden_nD: The hidden states.
            reference: :meth:`log_probs` of the reference.
        """
        pairs = zip(reference, self.log_probs(hidden_nD), strict=True)
        return sum(float((log_p.exp() * (log_p - log_q)).sum()) for log_p, log_q in pairs) / len(hidden_nD)
