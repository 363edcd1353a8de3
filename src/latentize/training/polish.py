"""Polish: a few steps on what the whole converted model predicts, after its layers were refined one by one.

All attention projections learn together from ``KL(source ‖ model)`` on the calibration text, without labels, as
healing would, but for seconds. The whole model is in memory, so this is for models that fit.

N sequences, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latentize.attention.latent import LatentWeights
from latentize.modeling.source import SourceModel
from latentize.processes import ALONE, Team
from latentize.text.tokens import Passages
from latentize.training.descent import Schedule, descent
from latentize.training.refine import refined, stacked_heads, trainable
from latentize.training.relative import stream_error
from latentize.training.student import Student

__all__ = ["Polish", "divergence", "polish"]


@dataclass(frozen=True, kw_only=True)
class Polish(Schedule):
    """How the whole model is polished.

    A step is as large as there is something to repair: the rate is multiplied by the root of the divergence that the
    polish starts from, in nats per token; and in each layer by the root of the error in the residual stream that leaves
    it, relative to the mean of all layers.

    Attributes:
        looks: How often held-out text is looked at, evenly; the best of what was seen is kept.
        at_once: Tokens of a step whose activations exist at once, rounded to whole sequences.
        enough: Divergence at which nothing is left to gain, nats per token.
    """

    steps: int = 450
    rate: float = 0.014
    adam: float = 3.0
    looks: int = 5
    at_once: int = 1 << 20
    enough: float = 1e-6


def divergence(
    hidden_nD: Tensor, reference_nD: Tensor, head: Callable[[Tensor], Tensor], *, at_once: int
) -> tuple[float, Tensor]:
    """Mean ``KL(reference ‖ model)`` in nats per token, and its gradient by the hidden states.

    Logits, and what is derived from them, exist for ``at_once`` tokens at a time.

    Args:
        hidden_nD, reference_nD: Hidden states that leave the last layer.
        head: From those to logits.
        at_once: Tokens.
    """
    total, gradients = 0.0, []
    for part_nD, reference in zip(hidden_nD.detach().split(at_once), reference_nD.split(at_once), strict=True):
        log_p_nV = head(reference).float().log_softmax(-1)
        part_nD.requires_grad_(True)
        with torch.enable_grad():
            logits_nV = head(part_nD)
        log_q_nV = logits_nV.detach().float().log_softmax(-1)
        p_nV = log_p_nV.exp()
        total += float((p_nV * log_p_nV.sub_(log_q_nV)).sum())
        # The gradient by the logits is the difference of the two distributions.
        by_logits_nV = log_q_nV.exp_().sub_(p_nV).div_(len(hidden_nD))
        gradients += torch.autograd.grad(logits_nV, part_nD, by_logits_nV.to(logits_nV.dtype))
    return total / len(hidden_nD), torch.cat(gradients)


class _Student(Student):
    """A student with a text that tells how far it is from its teacher.

    Attributes:
        parameters: Of all converted layers, in order.
        heads: How many matrices each of them is.
        shares: Size of a step of each, relative to the mean of all layers.
        teacher: The checked text as it leaves the source.
        untouched: The checked text as it leaves the converted model before it is rounded or trained, in parts.
    """

    def __init__(
        self,
        source: SourceModel,
        weights: Sequence[LatentWeights | None],
        check: Passages,
        how: Polish,
        team: Team = ALONE,
    ) -> None:
        super().__init__(source)
        self._team = team
        self._size = how.sequences(check.length)
        self._start = [w for w in weights if w is not None]
        self._attentions = [trainable(w) for w in self._start]
        self._checked = source.embed(check)
        of_layer, wrong = iter(self._attentions), []
        teacher, made = self._checked.clone(), self._checked.clone()
        for index, w in enumerate(weights):
            layer, attention = source.layer(index), None if w is None else next(of_layer)
            layer.run(teacher)
            layer.run(made, attention)
            if attention is not None:
                wrong.append(stream_error(made, teacher, team))
            self.add(layer, attention)
        self.teacher, self.untouched = teacher, made.hidden_NTD.split(self._size)
        usual = max(sum(wrong) / len(wrong), 1e-30)
        pairs = list(zip(wrong, self._attentions, strict=True))
        self.shares = [(error / usual) ** 0.5 for error, a in pairs for _ in a.parameters()]
        self.parameters = [p for a in self._attentions for p in a.parameters()]
        self.heads = [each for a in self._attentions for each in stacked_heads(a)]

    def compared(self, hidden_nD: Tensor, teacher_BTD: Tensor) -> tuple[float, Tensor]:
        """:func:`divergence` of these from what leaves the source."""
        return divergence(hidden_nD, teacher_BTD.flatten(0, 1), self.head, at_once=self.at_once)

    def mean(self, finals: Iterable[Tensor]) -> float:
        """Divergence of final hidden states of the checked text, in parts."""
        pairs = zip(finals, self.teacher.hidden_NTD.split(self._size), strict=True)
        total = sum(self.compared(hidden_nD, teacher)[0] * len(teacher) for hidden_nD, teacher in pairs)
        return self._team.mean(total / len(self.teacher))

    @torch.no_grad()
    def look(self) -> float:
        """Divergence on the checked text, as it is now."""
        return self.mean(self.run(part) for part in self._checked.split(self._size))

    def state(self) -> list[Tensor]:
        """A copy of all parameters."""
        return [p.detach().clone() for p in self.parameters]

    def weights(self) -> list[LatentWeights]:
        """As they are now, in float32."""
        return [refined(a, w) for a, w in zip(self._attentions, self._start, strict=True)]


def polish(
    source: SourceModel,
    weights: Sequence[LatentWeights | None],
    text: Passages,
    teacher_NTD: Tensor,
    check: Passages,
    how: Polish,
    progress: Callable[..., None],
    team: Team = ALONE,
) -> list[LatentWeights]:
    """Train all attention layers together.

    Args:
        source: The model that was converted.
        weights: Its converted layers, the start; ``None`` for one that stays as it is.
        text: Calibration tokens.
        teacher_NTD: Hidden states that leave the source's last layer on these tokens.
        check: Tokens that are not learnt from and tell whether it helps.
        how: Steps and rates.
        progress: Told after each step.
        team: Processes that each have such texts of their own; ``how`` is each one's share.

    Returns:
        float32 weights of the layers that were converted, in order.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    student = _Student(source, weights, check, how, team)
    # Before anything is rounded: what is exact stays as it is.
    if student.mean(part.flatten(0, 1) for part in student.untouched) < how.enough:
        return student.weights()
    student.untouched = ()
    fast = torch.autocast(teacher_NTD.device.type, torch.bfloat16, enabled=source.precision.faster)
    with fast:
        best, kept = student.look(), student.state()
    how = replace(how, rate=how.rate * min(1.0, best) ** 0.5)
    steps = descent(student.parameters, how, student.shares, student.heads, team)
    for step, rows in enumerate(how.batches(len(text), text.length)):
        value = 0.0
        for part in rows.split(max(1, how.at_once // text.length)):
            share = len(part) / len(rows)
            with fast:
                hidden_nD = student.learn(source.embed(text[part]))
                lost, by_hidden_nD = student.compared(hidden_nD, teacher_NTD[part])
            value += share * lost
            steps.gather(hidden_nD, by_hidden_nD.mul_(share))
            del hidden_nD
        if not math.isfinite(value := team.mean(value)):
            raise FloatingPointError(f"polishing diverged at step {step}")
        steps.follow()
        if (step + 1) * how.looks % how.steps < how.looks:
            # Steps shrink to nothing, and the gain may come with the last: not having gained yet is no reason to end.
            with fast:
                found = student.look()
            if found < best:
                best, kept = found, student.state()
        progress("polishing", step + 1, how.steps, f"KL {value:.4f}, held out {best:.4f}")
    for parameter, value in zip(student.parameters, kept, strict=True):
        parameter.data.copy_(value)
    return student.weights()
