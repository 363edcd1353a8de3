"""A conversion is a sequence of layers, each made when the one before it has been written.

Two streams of calibration text move through the source together. One stays the source's. The other is what the model
has become so far, so that each layer learns on the inputs that it will see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from latentize.attention.latent import LatentWeights
from latentize.checkpoint import Journal
from latentize.conversion.coding import Coding, Suiting, code_rows, suited_rows
from latentize.conversion.draft import Draft, DraftedLayer, naming_layer, observe
from latentize.conversion.kept import cached
from latentize.conversion.measured import CLOSED, LINEAR, Converted, MadeLayer, write_and_measure
from latentize.formats.base import FormatWriter, LatentWriter
from latentize.formats.layer import ConvertedLayer
from latentize.methods.closed_form import linear_fit
from latentize.methods.pooling import pool_heads
from latentize.methods.registry import needs
from latentize.methods.setting import Setting
from latentize.modeling.attention import LatentAttention
from latentize.modeling.layer import SourceLayer, Stream
from latentize.modeling.source import SourceModel
from latentize.processes import ALONE, Team
from latentize.progress import Progress, silent
from latentize.text.tokens import Passages
from latentize.training.polish import Polish, polish
from latentize.training.refine import Refinement
from latentize.training.relative import stream_error

__all__ = ["REFINED_TOKENS", "RMS_TOKENS", "Effort", "convert_latent", "convert_pooled"]

# Calibration tokens that tell how large latents get.
RMS_TOKENS = 16_384
# Calibration tokens that layers are refined on, at most: a second stream of them goes through every layer.
REFINED_TOKENS = 196_608


@dataclass(frozen=True)
class Effort:
    """What is done beyond the closed form.

    Attributes:
        refinement: Of each layer, or ``None``.
        polish: Of the whole model, or ``None``.
        coding: Of cached rows, or ``None``.
        suiting: Of rows to a cache, or ``None``.
    """

    refinement: Refinement | None = None
    polish: Polish | None = None
    coding: Coding | None = None
    suiting: Suiting | None = None

    @property
    def whole(self) -> bool:
        """Whether anything is done to all layers together."""
        return any(step is not None for step in (self.polish, self.coding, self.suiting))


@torch.no_grad()
def convert_latent(
    source: SourceModel,
    settings: Sequence[Setting],
    writer: LatentWriter,
    calibration: Passages,
    selection: Passages,
    evaluation: Passages,
    effort: Effort | None = None,
    progress: Progress = silent,
    journal: Journal | None = None,
    team: Team = ALONE,
) -> Converted:
    """Convert every layer to MLA, and write and measure each as it is made.

    What is refined is kept in the journal; the closed form takes less time than its place on the disk is worth.

    Args:
        source: The model.
        settings: What to do with each layer.
        writer: Rounds weights to what it saves, and saves them.
        calibration: Tokens for statistics and refinement.
        selection: Tokens that tell whether polishing helps.
        evaluation: Tokens that the result is measured on.
        effort: What to do beyond the closed form.
        progress: Told after each layer, and each step of the polish.
        journal: Keeps what took long.
        team: Processes that share the texts; the first one writes.
    """
    effort, facts = effort or Effort(), []

    def layers() -> Iterator[MadeLayer]:
        # Held by who makes the layers, so that its texts go with the last of them.
        drafting = _Drafting(source, settings, calibration, effort, journal, facts, team)
        if not effort.whole:
            return _layer_by_layer(source, drafting, writer)
        return _as_a_whole(source, drafting, writer, calibration, selection, effort, progress)

    result = write_and_measure(source, layers(), writer, evaluation, progress, team)
    result.calibration_tokens, result.facts = calibration.tokens_NT.numel(), facts
    return result


class _Drafting:
    """Closed form and refinement of one layer after the other, and the text on its way through source and result.

    Attributes:
        own: The calibration text as the source has it.
        draft: The same as the result has it.
        facts: For each layer so far what a report shows of its closed form.
    """

    def __init__(
        self,
        source: SourceModel,
        settings: Sequence[Setting],
        calibration: Passages,
        effort: Effort,
        journal: Journal | None,
        facts: list[dict[str, Any]],
        team: Team,
    ) -> None:
        self.settings, self.journal, self.facts = settings, journal, facts
        self.team, self.device = team, source.device
        # This process's share.
        self.calibration = calibration = calibration.share(team)
        # Where nothing is left out the closed form is exact, whatever its statistics are: a little text does, unless
        # the polish wants to know how the source continues all of it.
        self._exact = all(setting.whole for setting in settings)
        little = _sequences(RMS_TOKENS // team.size, calibration)
        self.own: Stream = source.embed(calibration[:little] if self._exact and not effort.polish else calibration)
        # Without refinement nothing is learnt from the converted stream but how large its latents get, and of layers
        # that change once more not even that.
        most = REFINED_TOKENS if effort.refinement else 0 if effort.whole else RMS_TOKENS
        few = _sequences(most // team.size, calibration)
        refinement = effort.refinement and effort.refinement.shared(calibration.length, team)
        self.draft = Draft(refinement, self.own[:few], team)

    def weights(self, layer: SourceLayer) -> tuple[DraftedLayer, dict[str, LatentWeights]]:
        """The converted layer, and what it was on its way, by name, in float32."""
        assert layer.spec is not None and layer.weights is not None
        refines, setting = self.draft.refinement is not None, self.settings[layer.index]
        few = len(self.draft.text) if refines else 0
        inherited = stream_error(self.draft.text, self.own[:few], self.team) if refines else 0.0
        needed = needs(setting, layer.spec)
        observed = observe(layer, self.own, needed, residual=few, exact=self._exact, team=self.team)
        made = self.draft.convert(layer, observed, setting, self.journal, inherited)
        self.facts.append(made.closed.describe())
        stages = {}
        if refines:
            stages[CLOSED] = made.closed.weights.to(torch.float32)
        if setting.linear:
            with naming_layer(layer.index):
                stages[LINEAR] = linear_fit(layer.weights, layer.spec, observed.stats).to(torch.float32)
        return made, stages

    def stay(self, layer: SourceLayer) -> None:
        """Take the source's text through a layer that stays as it is."""
        layer.run(self.own)
        self.facts.append({})

    def ended(self) -> Stream:
        """The text as it leaves the source's last layer; neither text is held here any longer."""
        own, nothing = self.own, self.own[:0].clone()
        self.own, self.draft = nothing, Draft(None, nothing)
        return own


def _sequences(tokens: int, text: Passages) -> int:
    """How many of a text's sequences are so many tokens; one at least, of any."""
    return max(1, tokens // text.length) if tokens else 0


def _layer_by_layer(source: SourceModel, drafting: _Drafting, writer: LatentWriter) -> Iterator[MadeLayer]:
    """Every layer as it is drafted."""
    for layer in source.layers():
        if layer.spec is None:
            drafting.stay(layer)
            made = _kept(layer)
        else:
            drafted, stages = drafting.weights(layer)
            made = _saved(layer, drafted.refined, stages, drafting.draft, writer)
        yield made
        drafting.draft.advance(layer, made.attention)
        made.let_go()


def _as_a_whole(
    source: SourceModel,
    drafting: _Drafting,
    writer: LatentWriter,
    calibration: Passages,
    selection: Passages,
    effort: Effort,
    progress: Progress,
) -> Iterator[MadeLayer]:
    """All layers, refined one by one, and then given bits and polished together."""
    stages: list[dict[str, LatentWeights]] = []
    refined: list[LatentWeights | None] = []
    for layer in source.layers():
        weights, passed, summary = _refined(layer, drafting)
        stages.append(passed)
        refined.append(weights)
        if weights is not None:
            progress("refining layers", layer.index + 1, source.spec.layers, summary)
    # Only what the source makes of the text is needed while all are polished.
    teacher, final = drafting.ended(), refined
    team, share = drafting.team, drafting.calibration
    if (coding := effort.coding) is not None:
        start = final
        # The first process alone.
        final = _together(
            start,
            "coding",
            drafting,
            lambda: code_rows(source, start, calibration, selection, coding, progress) if team.leads else (),
        )
    if (how := effort.polish) is not None:
        coded, target_NTD = final, teacher.hidden_NTD
        check = selection.share(team) if len(selection) >= team.size else selection
        how = how.shared(share.length, team)
        final = _together(
            coded, "polish", drafting, lambda: polish(source, coded, share, target_NTD, check, how, progress, team)
        )
    if (suiting := effort.suiting) is not None:
        plain = final
        final = _together(
            plain,
            "suiting",
            drafting,
            lambda: suited_rows(source, plain, calibration, suiting, progress) if team.leads else (),
        )
    draft = Draft(None, source.embed(share[: _sequences(RMS_TOKENS // team.size, share)]), team)
    for layer, w, passed in zip(source.layers(), final, stages, strict=True):
        made = _kept(layer) if w is None else _saved(layer, w, passed, draft, writer)
        yield made
        draft.advance(layer, made.attention)
        made.let_go()


def _refined(layer: SourceLayer, drafting: _Drafting) -> tuple[LatentWeights | None, dict[str, LatentWeights], str]:
    """A layer's weights, what it was on its way, and what refinement did; both texts have gone through it."""
    if layer.spec is None:
        drafting.stay(layer)
        drafting.draft.advance(layer, None)
        return None, {}, ""
    drafted, passed = drafting.weights(layer)
    drafting.draft.advance(layer, LatentAttention.from_weights(drafted.refined.to(torch.float32)))
    return drafted.refined, passed, drafted.summary


def _together(
    weights: Sequence[LatentWeights | None],
    step: str,
    drafting: _Drafting,
    compute: Callable[[], Sequence[LatentWeights]],
) -> list[LatentWeights | None]:
    """What is made of all converted layers at once, now or before an interruption; others stay ``None``."""
    journal, team = drafting.journal, drafting.team
    made = iter(cached(journal, step, lambda: (compute(), ""), team, drafting.device)[0])
    return [None if w is None else next(made) for w in weights]


def _kept(layer: SourceLayer) -> MadeLayer:
    """A layer that stays as it is."""
    return MadeLayer(layer, ConvertedLayer(layer.index, layer.tensors), None)


def _saved(
    layer: SourceLayer, final: LatentWeights, stages: dict[str, LatentWeights], draft: Draft, writer: LatentWriter
) -> MadeLayer:
    """The layer as it is saved."""
    final = writer.oriented(final, layer.index)
    converted = ConvertedLayer(layer.index, layer.tensors, final, latent_rms=draft.latent_rms(layer, final))
    attention = LatentAttention.from_weights(writer.saved(converted))
    before: dict[str, nn.Module] = {name: LatentAttention.from_weights(w) for name, w in stages.items()}
    return MadeLayer(layer, converted, attention, before)


@torch.no_grad()
def convert_pooled(
    source: SourceModel,
    kv_heads: int,
    writer: FormatWriter,
    evaluation: Passages,
    progress: Progress = silent,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> Converted:
    """Mean-pool the kv heads of every layer. It needs no calibration."""
    return write_and_measure(source, _pooled(source, kv_heads, dtype), writer, evaluation, progress)


def _pooled(source: SourceModel, kv_heads: int, dtype: torch.dtype) -> Iterator[MadeLayer]:
    for layer in source.layers():
        assert layer.weights is not None
        pooled = pool_heads(layer.weights, kv_heads).to(dtype)
        # The same heads, repeated, fit into the layer that is there.
        attention = layer.with_kv_heads(pooled.to(torch.float32), source.spec.attention.num_kv_heads // kv_heads)
        yield MadeLayer(layer, ConvertedLayer(layer.index, layer.tensors, grouped=pooled), attention)
