"""How far one model's predictions are from another's, on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Quality", "compare_logits", "compare_streams"]


@dataclass
class Quality:
    """Sums over predicted tokens; adding two gives those of both.

    Attributes:
        tokens: Predictions.
        nll: Negative log-likelihood of the true next token, nats.
        reference_nll: The reference's.
        kl: ``KL(reference ‖ model)``, nats.
        agree: Predictions whose most likely token is the reference's.
    """

    tokens: int = 0
    nll: float = 0.0
    reference_nll: float = 0.0
    kl: float = 0.0
    agree: int = 0

    def __add__(self, other: Quality) -> Quality:
        return Quality(**{k: v + getattr(other, k) for k, v in vars(self).items()})

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood, nats per token."""
        return self.nll / self.tokens

    @property
    def excess(self) -> float:
        """Nats per token above the reference."""
        return (self.nll - self.reference_nll) / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def reference_perplexity(self) -> float:
        return math.exp(self.reference_nll / self.tokens)

    def describe(self) -> dict[str, float | int]:
        """The JSON keys of ``latentize eval``."""
        return {
            "perplexity": self.perplexity,
            "reference_perplexity": self.reference_perplexity,
            "kl": self.kl / self.tokens,
            "top1_agreement": self.agree / self.tokens,
            "tokens": self.tokens,
        }


def compare_logits(logits_nV: Tensor, reference_nV: Tensor | None, targets_n: Tensor) -> Quality:
    """Quality of one batch of predictions.

    Args:
        logits_nV: The model's.
        reference_nV: The reference's on the same tokens; without one the model is its own.
        targets_n: The tokens that came next.
    """
    log_p_nV = logits_nV.float().log_softmax(-1)
    nll = -float(log_p_nV.gather(1, targets_n[:, None]).double().sum())
    if reference_nV is None:
        return Quality(len(targets_n), nll, nll, 0.0, len(targets_n))
    log_r_nV = reference_nV.float().log_softmax(-1)
    return Quality(
        tokens=len(targets_n),
        nll=nll,
        reference_nll=-float(log_r_nV.gather(1, targets_n[:, None]).double().sum()),
        kl=float((log_r_nV.exp() * (log_r_nV - log_p_nV)).sum(-1).double().sum()),
        agree=int((log_p_nV.argmax(-1) == log_r_nV.argmax(-1)).sum()),
    )


def compare_streams(
    hidden_NTD: Tensor,
    reference_NTD: Tensor,
    tokens_NT: Tensor,
    logits: Callable[[Tensor], Tensor],
    *,
    vocab_size: int,
    logit_bytes: int = 1 << 25,
) -> Quality:
    """Quality of final hidden states against a reference's; logits exist for a few tokens at a time."""
    total = Quality()
    for part, reference, targets in _chunks(hidden_NTD, reference_NTD, tokens_NT, logit_bytes // (4 * vocab_size)):
        total = total + compare_logits(logits(part), logits(reference), targets)
    return total


def _chunks(
    hidden_NTD: Tensor, reference_NTD: Tensor, tokens_NT: Tensor, size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    # The last token of a sequence predicts nothing that is there.
    flat = [hidden_NTD[:, :-1].flatten(0, 1), reference_NTD[:, :-1].flatten(0, 1), tokens_NT[:, 1:].flatten()]
    yield from zip(*(t.split(max(1, size)) for t in flat), strict=True)
