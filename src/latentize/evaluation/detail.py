"""More than one number: near misses, confidence, and where in the context a model is better or worse.

B batch, T predictions of each sequence, n of all, V vocabulary, k bins of position, c bins of confidence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from latentize.evaluation.losses import Quality, Terms

__all__ = ["Confidence", "Evaluation", "Positions"]

_NEAR = 5
_CONFIDENCE_BINS = 15
# Of the logits that are looked at together.
_LOGIT_BYTES = 1 << 23
# The last one begins at 2**31 tokens of context.
_POSITION_BINS = 32


@dataclass
class Confidence:
    """How sure a model is of its most likely token, and how often that is right; adding two gives that of both.

    Attributes:
        sums_c3: Predictions, their confidence, and how many were right, by confidence in bins of equal width.
    """

    sums_c3: Tensor = field(default_factory=lambda: torch.zeros(_CONFIDENCE_BINS, 3, dtype=torch.float64))

    @classmethod
    def of(cls, log_p_nV: Tensor, targets_n: Tensor) -> Confidence:
        top_n, token_n = log_p_nV.max(-1)
        sure_n = top_n.double().exp().cpu()
        bin_n = (sure_n * _CONFIDENCE_BINS).ceil().long().sub(1).clamp(0, _CONFIDENCE_BINS - 1)
        right_n = (token_n == targets_n).double().cpu()
        terms_n3 = torch.stack([torch.ones_like(sure_n), sure_n, right_n], dim=1)
        return cls(cls().sums_c3.index_add(0, bin_n, terms_n3))

    def __add__(self, other: Confidence) -> Confidence:
        return Confidence(self.sums_c3 + other.sums_c3)

    @property
    def error(self) -> float:
        """Expected calibration error (Guo et al., arXiv 1706.04599): the mean over predictions of the difference, in
        their bin, between how often the most likely token is right and how sure the model is of it."""
        count_c, sure_c, right_c = self.sums_c3.unbind(1)
        return float((right_c - sure_c).abs().sum() / count_c.sum())


@dataclass
class Positions:
    """Losses by how many tokens precede the one that is predicted, 1, 2 to 3, 4 to 7, …; adding two gives that of both.

    Attributes:
        sums_k4: Predictions, their negative log-likelihood, the reference's, and KL, nats.
        longest: Most tokens of context that there were.
    """

    sums_k4: Tensor = field(default_factory=lambda: torch.zeros(_POSITION_BINS, 4, dtype=torch.float64))
    longest: int = 0

    @classmethod
    def of(cls, terms: Terms, length: int) -> Positions:
        """Of predictions of whole sequences, each with ``length`` of them, the first after one token."""
        context_n = torch.arange(1, length + 1).repeat(len(terms.nll_n) // length)
        # The exponent of frexp is one more than the logarithm, rounded down.
        bin_n = torch.frexp(context_n.double()).exponent.long() - 1
        losses = (terms.nll_n, terms.reference_nll_n, terms.kl_n)
        terms_n4 = torch.stack([torch.ones_like(losses[0]), *losses], dim=1).cpu()
        return cls(cls().sums_k4.index_add(0, bin_n, terms_n4), length)

    def __add__(self, other: Positions) -> Positions:
        return Positions(self.sums_k4 + other.sums_k4, max(self.longest, other.longest))

    def describe(self, *, compared: bool) -> list[dict[str, Any]]:
        """For each bin that is not empty: tokens of context ``from`` and ``to``, both included, and mean losses."""
        found = []
        for k, (count, *sums) in enumerate(self.sums_k4.tolist()):
            if count:
                loss, reference, kl = (s / count for s in sums)
                bounds = {"from": 2**k, "to": min(2 ** (k + 1) - 1, self.longest), "tokens": round(count)}
                other = {"reference_loss": reference, "kl": kl} if compared else {"reference_loss": None, "kl": None}
                found.append({**bounds, "loss": loss, **other})
        return found


@dataclass
class Evaluation:
    """What ``latentize eval`` finds; adding two gives that of both.

    Attributes:
        compared: Whether there is a reference.
        quality: Perplexity, KL and agreement.
        near: Predictions where the reference's most likely token is among the model's five.
        confidence, reference_confidence: Of either.
        positions: Where in the context.
    """

    compared: bool
    quality: Quality
    near: int
    confidence: Confidence
    reference_confidence: Confidence
    positions: Positions

    @classmethod
    def empty(cls, *, compared: bool) -> Evaluation:
        return cls(compared, Quality(), 0, Confidence(), Confidence(), Positions())

    @classmethod
    def of(cls, logits_BTV: Tensor, reference_BTV: Tensor | None, targets_BT: Tensor) -> Evaluation:
        """Of a batch of whole sequences: the prediction at ``T = 0`` was made after one token."""
        compared = reference_BTV is not None
        predictions = logits_BTV.flatten(0, 1), targets_BT.flatten()
        if compared:
            predictions = *predictions, reference_BTV.flatten(0, 1)
        # A few passes over what the processor's cache holds, not over what the memory does.
        few = max(1, _LOGIT_BYTES // (4 * logits_BTV.shape[-1]))
        near, sure, reference_sure, terms = 0, Confidence(), Confidence(), []
        for logits_nV, targets_n, *reference in zip(*(p.split(few) for p in predictions), strict=True):
            log_p_nV = logits_nV.float().log_softmax(-1)
            log_r_nV = reference[0].float().log_softmax(-1) if compared else None
            terms.append(Terms.of(log_p_nV, log_r_nV, targets_n))
            sure += Confidence.of(log_p_nV, targets_n)
            if log_r_nV is not None:
                five_n5 = log_p_nV.topk(min(_NEAR, log_p_nV.shape[1])).indices
                near += int((five_n5 == log_r_nV.argmax(-1, keepdim=True)).any(-1).sum())
                reference_sure += Confidence.of(log_r_nV, targets_n)
        whole = Terms.cat(terms)
        positions = Positions.of(whole, targets_BT.shape[1])
        return cls(compared, whole.sum(), near, sure, reference_sure, positions)

    def __add__(self, other: Evaluation) -> Evaluation:
        assert self.compared == other.compared
        added = {name: value + getattr(other, name) for name, value in vars(self).items() if name != "compared"}
        return Evaluation(compared=self.compared, **added)

    def describe(self) -> dict[str, Any]:
        """The JSON keys of ``latentize eval``; what needs a reference is ``None`` without one."""
        found: dict[str, Any] = {
            **self.quality.describe(),
            "top5_agreement": self.near / self.quality.tokens,
            "calibration_error": self.confidence.error,
        }
        positions = self.positions.describe(compared=self.compared)
        if not self.compared:
            found |= dict.fromkeys(("reference_perplexity", "kl", "top1_agreement", "top5_agreement"))
            return {**found, "reference_calibration_error": None, "by_position": positions}
        error = self.reference_confidence.error
        return {
            **found,
            "reference_calibration_error": error,
            "by_position": positions,
            "excess_loss": self.quality.excess,
        }
