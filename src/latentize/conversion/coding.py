"""Bits for the rows of a converted model: what its gradients say of them, and what it costs to leave some out.

The whole model is in memory, so this is for models that fit. n tokens, N sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from latentize.attention.coding import Rounding, RowCode
from latentize.attention.latent import LatentWeights
from latentize.methods.even import EvenCache, suited
from latentize.methods.rate import Components, Plan, RowSamples, apply_plan, components, measured_factors, plans
from latentize.modeling.attention import LatentAttention
from latentize.modeling.source import SourceModel
from latentize.progress import Progress
from latentize.text.tokens import Passages
from latentize.training.student import Student

__all__ = ["SAMPLED_TOKENS", "TRIED_TOKENS", "Coding", "Suiting", "code_rows", "sampled_rows", "suited_rows"]

# Tokens whose gradients are looked at, and that tell what a half of a layer costs.
SAMPLED_TOKENS, TRIED_TOKENS = 12_288, 1_024
# Bytes of a row, of what is asked for, in the plan that layers are measured with: what one of them costs has to stand
# out of what rounding to bfloat16 costs. And the fewest.
_COARSE, _FEWEST = 0.6, 3.0


@dataclass(frozen=True)
class Coding:
    """What is asked for.

    Attributes:
        share: Bytes of all tokens' rows, of those that the source has in bfloat16.
        context: Tokens of a text, of which some are stored as they are.
        seed: Draws the model's own words.
        sinks: Tokens at the start of a text that are stored as they are.
        newest: Of each token, how many of its newest rows it sees as they are.
    """

    share: float
    context: int
    seed: int
    sinks: int = 4
    newest: int = 4

    @property
    def exact(self) -> int:
        """Tokens of a text that are stored as they are."""
        return self.sinks + self.newest

    def row_bytes(self, source_values: float, own_values: float) -> float:
        """Bytes of a coded row, on average over layers, where a row of the source has so many values, and an exact one
        of the result."""
        exact = 2 * own_values * self.exact
        return (self.share * 2 * source_values * self.context - exact) / (self.context - self.exact)


@dataclass(frozen=True)
class Suiting:
    """What is asked for where a cache of one width will hold the rows.

    Attributes:
        cache: How it rounds.
        seed: Draws the model's own words, and axes.
    """

    cache: EvenCache
    seed: int


@dataclass
class _Watch(Rounding):
    """Sees a layer's rows, and their gradients; or rounds one half of them."""

    sinks: int
    newest: int
    code: RowCode | None = None
    half: str = ""
    rows: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    seen: list[tuple[Tensor, ...]] = field(default_factory=list)

    def rounded(
        self, c_B1Tr: Tensor, k_rope_BPTR: Tensor, exact_BT: Tensor, positions_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.code is not None and self.half:
            c_hat, k_hat = self.code.rounded(c_B1Tr, k_rope_BPTR, exact_BT, positions_BT)
            return (c_hat, k_rope_BPTR) if self.half == "latent" else (c_B1Tr, k_hat)
        if torch.is_grad_enabled():
            # Tensors of their own: what sees a row as it is has no part in these gradients.
            c_B1Tr, k_rope_BPTR = (rows.clone().requires_grad_(True) for rows in (c_B1Tr, k_rope_BPTR))
            for rows in (c_B1Tr, k_rope_BPTR):
                rows.retain_grad()
            self.rows.append((c_B1Tr, k_rope_BPTR, positions_BT))
        return c_B1Tr, k_rope_BPTR

    def gather(self, sinks: int) -> None:
        """Keep what was seen of the last text, and its gradients."""
        for c_B1Tr, k_rope_BPTR, positions_BT in self.rows:
            c = (c_B1Tr.detach()[:, 0, sinks:].flatten(0, 1), _gradient(c_B1Tr)[:, 0, sinks:].flatten(0, 1))
            k = (t.transpose(1, 2)[:, sinks:].flatten(0, 1) for t in (k_rope_BPTR.detach(), _gradient(k_rope_BPTR)))
            rows = [t.to(torch.bfloat16) for t in (*c, *k)]
            self.seen.append((*rows, positions_BT[:, sinks:].flatten()))
        self.rows = []

    def samples(self) -> RowSamples:
        parts = [torch.cat(part) for part in zip(*self.seen, strict=True)]
        self.seen = []
        return RowSamples(*parts)


def _gradient(rows: Tensor) -> Tensor:
    assert rows.grad is not None
    return rows.grad


def code_rows(
    source: SourceModel,
    weights: Sequence[LatentWeights | None],
    calibration: Passages,
    selection: Passages,
    how: Coding,
    progress: Progress,
) -> list[LatentWeights]:
    """Give every converted layer a basis and bits for its rows.

    Args:
        source: The model that was converted.
        weights: Its converted layers, float32; ``None`` for one that stays.
        calibration: Tokens for gradients.
        selection: Tokens that tell what a layer costs.
        how: What is asked for.
        progress: Told how far it is.

    Returns:
        The converted layers, in order.
    """
    kept = [w for w in weights if w is not None]
    steps = 3 * len(kept)
    fast = torch.autocast(torch.device(source.device).type, torch.bfloat16, enabled=source.precision.faster)
    with fast:
        sampled = sampled_rows(source, weights, calibration, how.seed, how.sinks, how.newest)
    layers: list[Components] = []
    for rows in sampled:
        layers.append(components(rows, kept[len(layers)].frequencies_PF[0]))
        progress("choosing bits", len(layers), steps)
    wanted = how.row_bytes(source.spec.cache_values, sum(w.spec.cache_values for w in kept) / len(kept))
    trial = plans(layers, [(1.0, 1.0)] * len(layers), max(_FEWEST, _COARSE * wanted))
    with fast, torch.no_grad():
        costs = _Costs(source, weights, layers, trial, selection, how)

        def measure(number: int, half: str) -> float:
            progress("choosing bits", len(layers) + 2 * number + (half == "rope") + 1, steps)
            return costs.of(number, half)

        factors = measured_factors(layers, trial, measure)
    chosen = plans(layers, factors, wanted)
    return [
        apply_plan(w, layer, plan, how.sinks, how.newest) for w, layer, plan in zip(kept, layers, chosen, strict=True)
    ]


def _student(
    source: SourceModel, weights: Sequence[LatentWeights | None]
) -> tuple[Student, dict[int, LatentAttention]]:
    """The whole model, and the attention of its converted layers by their numbers; no row is rounded."""
    student, converted = Student(source), {}
    for index, w in enumerate(weights):
        if w is not None:
            converted[index] = LatentAttention.from_weights(replace(w, code=None).to(torch.float32))
        student.add(source.layer(index), converted.get(index))
    return student, converted


def suited_rows(
    source: SourceModel,
    weights: Sequence[LatentWeights | None],
    calibration: Passages,
    how: Suiting,
    progress: Progress,
) -> list[LatentWeights]:
    """Give every converted layer's rows axes and scales that suit a cache; what the layer computes stays the same.

    Args:
        source: The model that was converted.
        weights: Its converted layers, float32; ``None`` for one that stays.
        calibration: Tokens for gradients.
        how: What is asked for.
        progress: Told how far it is.

    Returns:
        The converted layers, in order, float64.
    """
    kept, made = [w for w in weights if w is not None], []
    with torch.autocast(torch.device(source.device).type, torch.bfloat16, enabled=source.precision.faster):
        # A cache of an engine rounds all rows, the first and the newest as well.
        sampled = sampled_rows(source, weights, calibration, how.seed, 0, 0)
    for number, (w, rows) in enumerate(zip(kept, sampled, strict=True)):
        made.append(suited(w.to(torch.float64), rows, how.cache, how.seed + number))
        progress("suiting rows", number + 1, len(kept))
    return made


def sampled_rows(
    source: SourceModel, weights: Sequence[LatentWeights | None], text: Passages, seed: int, sinks: int, newest: int
) -> Iterator[RowSamples]:
    """Rows of every converted layer on some text, and the gradients of what the model would say itself.

    Args:
        source: The model that was converted.
        weights: Its converted layers; ``None`` for one that stays.
        text: Tokens.
        seed: Draws the model's own words.
        sinks, newest: Tokens that are seen as they are: the first are left out, and what sees the newest has no part.
    """
    student, converted = _student(source, weights)
    watches = [_Watch(sinks, newest) for _ in converted]
    for attention, watch in zip(converted.values(), watches, strict=True):
        attention.watch = watch
    generator = torch.Generator(source.device).manual_seed(seed)
    count = max(1, min(len(text), SAMPLED_TOKENS // text.length))
    for row in torch.linspace(0, len(text) - 1, count).long().tolist():
        hidden_TD = student.learn(source.embed(text[row : row + 1]))
        hidden_TD.backward(_by_hidden(student, hidden_TD.detach(), generator))
        for watch in watches:
            watch.gather(sinks)
    # One layer at a time: what it takes is let go of after it.
    return (watch.samples() for watch in watches)


def _by_hidden(student: Student, hidden_TD: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient of minus the log-likelihood of tokens that are drawn from what the model predicts."""
    parts = []
    for part_nD in hidden_TD.split(student.at_once):
        part_nD = part_nD.clone().requires_grad_(True)
        with torch.enable_grad():
            logits_nV = student.head(part_nD)
        p_nV = logits_nV.detach().float().softmax(-1)
        drawn_n1 = torch.multinomial(p_nV, 1, generator=generator)
        by_logits_nV = p_nV.scatter_add_(1, drawn_n1, -torch.ones_like(drawn_n1, dtype=p_nV.dtype))
        parts += torch.autograd.grad(logits_nV, part_nD, by_logits_nV.to(logits_nV.dtype))
    return torch.cat(parts)


class _Costs:
    """What it costs to round one half of one layer's rows, in nats per token."""

    def __init__(
        self,
        source: SourceModel,
        weights: Sequence[LatentWeights | None],
        layers: Sequence[Components],
        trial: Sequence[Plan],
        text: Passages,
        how: Coding,
    ) -> None:
        parts = iter(zip(layers, trial, strict=True))
        coded = [None if w is None else apply_plan(w, *next(parts), how.sinks, how.newest) for w in weights]
        self._student, converted = _student(source, coded)
        self._converted = list(converted.items())
        self._watches = [_Watch(how.sinks, how.newest, w.code) for w in coded if w is not None]
        # What enters the layer that is measured, and how far it has come.
        self._entering, self._at = source.embed(text[: max(1, TRIED_TOKENS // text.length)]), 0
        self._reference = list(self._student.log_probs(self._student.run(self._entering)))

    def of(self, number: int, half: str) -> float:
        """For one half of the ``number``-th converted layer; layers are asked for in order."""
        (index, attention), watch = self._converted[number], self._watches[number]
        self._entering = self._student.through(self._entering, self._at, index)
        # Of all layers one rounds; the others need not tell rows as they are stored from rows as they are.
        self._at, watch.half, attention.watch = index, half, watch
        made_nD = self._student.run(self._entering, start=index)
        attention.watch = None
        return self._student.divergence(made_nD, self._reference)
