"""How far one model's predictions are from another's, on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Quality", "Terms", "compare_logits", "compare_streams"]


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


@dataclass(frozen=True)
class Terms:
    """What :class:`Quality` sums, prediction by prediction; the reference's of a model without one are its own.

    Attributes:
        nll_n, reference_nll_n: Negative log-likelihoods of the true next token, nats, float64.
        kl_n: ``KL(reference ‖ model)``, nats, float64.
        agree_n: Whether the most likely token is the reference's.
    """

    nll_n: Tensor
    reference_nll_n: Tensor
    kl_n: Tensor
    agree_n: Tensor

    @classmethod
    def of(cls, log_p_nV: Tensor, log_r_nV: Tensor | None, targets_n: Tensor) -> Terms:
        """From log-probabilities of both, the reference's may be absent."""
        nll_n = -log_p_nV.gather(1, targets_n[:, None])[:, 0].double()
        if log_r_nV is None:
            return cls(nll_n, nll_n, torch.zeros_like(nll_n), torch.ones_like(targets_n, dtype=torch.bool))
        return cls(
            nll_n=nll_n,
            reference_nll_n=-log_r_nV.gather(1, targets_n[:, None])[:, 0].double(),
            kl_n=(log_r_nV.exp() * (log_r_nV - log_p_nV)).sum(-1).double(),
            agree_n=log_p_nV.argmax(-1) == log_r_nV.argmax(-1),
        )

    @classmethod
    def cat(cls, parts: Sequence[Terms]) -> Terms:
        """Those of several batches, in order."""
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])})

    def sum(self) -> Quality:
        return Quality(
            tokens=len(self.nll_n),
            nll=float(self.nll_n.sum()),
            reference_nll=float(self.reference_nll_n.sum()),
            kl=float(self.kl_n.sum()),
            agree=int(self.agree_n.sum()),
        )


def compare_logits(logits_nV: Tensor, reference_nV: Tensor | None, targets_n: Tensor) -> Quality:
    """Quality of one batch of predictions.

    Args:
        logits_nV: The model's.
        reference_nV: The reference's on the same tokens; without one the model is its own.
        targets_n: The tokens that came next.
    """
    log_r_nV = None if reference_nV is None else reference_nV.float().log_softmax(-1)
    return Terms.of(logits_nV.float().log_softmax(-1), log_r_nV, targets_n).sum()


def compare_streams(
    streams: Sequence[Tensor],
    reference_NTD: Tensor,
    tokens_NT: Tensor,
    logits: Callable[[Tensor], Tensor],
    *,
    vocab_size: int,
    logit_bytes: int = 1 << 25,
) -> list[Quality]:
    """Quality of final hidden states, several of the same tokens, against a reference's.

    Args:
        streams: Hidden states ``[N, T, D]`` of each.
        reference_NTD: The reference's.
        tokens_NT: The tokens.
        logits: From hidden states to logits.
        vocab_size: Of those.
        logit_bytes: Bound on the logits of one that exist at a time.
    """
    totals, size = [Quality() for _ in streams], max(1, logit_bytes // (4 * vocab_size))
    # The last token of a sequence predicts nothing that is there.
    flat = [hidden_NTD[:, :-1].flatten(0, 1).split(size) for hidden_NTD in (reference_NTD, *streams)]
    for targets, reference, *parts in zip(tokens_NT[:, 1:].flatten().split(size), *flat, strict=True):
        log_r_nV = logits(reference).float().log_softmax(-1)
        found = [Terms.of(logits(part).float().log_softmax(-1), log_r_nV, targets).sum() for part in parts]
        totals = [total + one for total, one in zip(totals, found, strict=True)]
    return totals
