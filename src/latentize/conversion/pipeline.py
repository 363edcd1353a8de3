"""Layer by layer: statistics, conversion, refinement, and what they did to the model's predictions.

Several streams of hidden states move through the source together. One calibration stream stays the source's; with
refinement a second is what the model has become so far, so that each layer learns on the inputs that it will see.
The evaluation text runs as the source, as the closed form and as what is saved; so the final loss and KL are those
of the whole converted model, and no second model is ever in memory.

N sequences, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from latentize.attention.latent import LatentWeights
from latentize.attention.spec import AttentionSpec
from latentize.checkpoint import Journal
from latentize.conversion.draft import Draft, DraftedLayer, naming_layer, observe
from latentize.conversion.kept import Made, once
from latentize.evaluation.losses import Quality, compare_streams
from latentize.formats.base import FormatWriter, LatentWriter
from latentize.formats.layer import ConvertedLayer
from latentize.methods.closed_form import linear_fit
from latentize.methods.pooling import pool_heads
from latentize.methods.registry import needs
from latentize.methods.setting import Setting
from latentize.modeling.attention import LatentAttention
from latentize.modeling.precision import Use
from latentize.modeling.source import SourceLayer, SourceModel, Stream
from latentize.progress import Progress, silent
from latentize.text.tokens import Passages
from latentize.training.polish import Polish, polish
from latentize.training.refine import Refinement
from latentize.training.relative import stream_error

__all__ = [
    "CLOSED",
    "REFINED_TOKENS",
    "RMS_TOKENS",
    "Converted",
    "Effort",
    "MadeLayer",
    "Massive",
    "convert_latent",
    "convert_pooled",
    "run_through",
]

# A token is called massive whose residual stream is so many times as large as the median token's.
MASSIVE = 20.0
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
    """

    refinement: Refinement | None = None
    polish: Polish | None = None


class Massive(NamedTuple):
    """Tokens of the evaluation text whose residual stream is massive after a layer.

    Attributes:
        source: In the source.
        lost: In the source, and no longer in the converted model.
        made: In the converted model only.
    """

    source: int
    lost: int
    made: int


@dataclass
class Converted:
    """What a conversion measured.

    Attributes:
        quality: On the evaluation text, the source as reference.
        closed_form: The same before anything was refined, or ``None`` where nothing was.
        linear_fit: The same with the nearest linear projections and nothing compressed, or ``None`` where the
            source's are linear, or stay as they are.
        errors: For each layer the mean relative error of a token in the residual stream that leaves it, ``‖h -
            h_source‖² / max(‖h‖², ‖h_source‖²)``, on the evaluation text: in closed form, and as saved.
        massive: For each layer how many tokens are massive there.
        calibration_tokens: Tokens that statistics and refinement came from.
        facts: For each layer what a report shows of its closed form.
    """

    quality: Quality
    closed_form: Quality | None = None
    linear_fit: Quality | None = None
    errors: list[tuple[float, float]] = field(default_factory=list)
    massive: list[Massive] = field(default_factory=list)
    calibration_tokens: int = 0
    facts: list[dict[str, Any]] = field(default_factory=list)


def _massive(text: Stream, reference: Stream) -> Massive:
    """Which tokens are massive in both models."""
    here_NT, there_NT = (_is_massive(stream.hidden_NTD) for stream in (text, reference))
    return Massive(int(there_NT.sum()), int((there_NT & ~here_NT).sum()), int((here_NT & ~there_NT).sum()))


def _is_massive(hidden_NTD: Tensor) -> Tensor:
    norm_NT = torch.stack([h_TD.norm(dim=-1) for h_TD in hidden_NTD])
    return norm_NT > MASSIVE * norm_NT.median()


@torch.no_grad()
def convert_latent(
    source: SourceModel,
    settings: Sequence[Setting],
    sink: LatentWriter,
    calibration: Passages,
    selection: Passages,
    evaluation: Passages,
    effort: Effort | None = None,
    progress: Progress = silent,
    journal: Journal | None = None,
) -> Converted:
    """Convert every layer to MLA and hand it to ``sink``.

    What is refined is kept in the journal; the closed form takes less time than its place on the disk is worth.

    Args:
        source: The model.
        settings: What to do with each layer.
        sink: Rounds weights to what it saves, and saves them.
        calibration: Tokens for statistics and refinement.
        selection: Tokens that tell whether polishing helps.
        evaluation: Tokens that the result is measured on.
        effort: What to do beyond the closed form.
        progress: Told after each layer, and each step of the polish.
        journal: Keeps what took long.
    """
    effort = effort or Effort()
    first = _LayerByLayer(source, settings, sink, calibration, effort.refinement, journal)
    make: _Make = first
    if effort.polish is not None:
        make = _polished(source, first, calibration, selection, effort.polish, sink, progress)
    result = run_through(source, make, sink, evaluation, progress)
    result.calibration_tokens, result.facts = calibration.tokens_NT.numel(), first.facts
    return result


# Names of what a layer was on its way.
CLOSED, _LINEAR = "closed form", "linear fit"


@dataclass(frozen=True)
class MadeLayer:
    """A converted layer.

    Attributes:
        result: For the writer.
        attention: As saved; ``None`` where the layer stays as it is.
        stages: What it was before, by name; the same names in every converted layer.
    """

    result: ConvertedLayer
    attention: nn.Module | None
    stages: dict[str, nn.Module] = field(default_factory=dict)


class _Make(Protocol):
    """Makes the layers of a converted model, in order."""

    def __call__(self, layer: SourceLayer) -> MadeLayer: ...

    def advance(self, layer: SourceLayer, attention: nn.Module | None) -> None:
        """Take its own text through what was made of the layer."""
        ...

    def release(self) -> None:
        """Let go of all streams."""
        ...


class _LayerByLayer:
    """Closed form and refinement, one layer after the other."""

    def __init__(
        self,
        source: SourceModel,
        settings: Sequence[Setting],
        sink: LatentWriter,
        calibration: Passages,
        refinement: Refinement | None,
        journal: Journal | None = None,
    ) -> None:
        self.journal = journal
        self.own: Stream | None = source.embed(calibration)
        # Without refinement nothing is learnt from the converted stream but how large its latents get.
        few = max(1, (REFINED_TOKENS if refinement else RMS_TOKENS) // calibration.length)
        self.draft: Draft | None = Draft(refinement, self.own[:few])
        self.facts: list[dict[str, Any]] = []
        self.settings, self.sink = settings, sink

    def weights(self, layer: SourceLayer) -> tuple[DraftedLayer, dict[str, LatentWeights]]:
        """The converted layer, and what it was on its way, by name, in float32."""
        assert self.own is not None and self.draft is not None
        assert layer.spec is not None and layer.weights is not None
        refines, setting = self.draft.refinement is not None, self.settings[layer.index]
        few = len(self.draft.text) if refines else 0
        inherited = stream_error(self.draft.text, self.own[:few]) if refines else 0.0
        seen = observe(layer, self.own, needs(setting, layer.spec), residual=few)
        made = self.draft.convert(layer, seen, setting, once(self.journal, f"layer {layer.index}"), inherited)
        self.facts.append(made.closed.describe())
        stages = {}
        if refines:
            stages[CLOSED] = made.closed.weights.to(torch.float32)
        if setting.linear:
            with naming_layer(layer.index):
                stages[_LINEAR] = linear_fit(layer.weights, layer.spec, seen.stats).to(torch.float32)
        return made, stages

    def stay(self, layer: SourceLayer) -> None:
        """Take the source's text through a layer that stays as it is."""
        assert self.own is not None
        layer.run(self.own)
        self.facts.append({})

    def __call__(self, layer: SourceLayer) -> MadeLayer:
        assert self.draft is not None
        if layer.spec is None:
            self.stay(layer)
            return MadeLayer(ConvertedLayer(layer.index, layer.tensors), None)
        made, stages = self.weights(layer)
        return _made(layer, made.refined, stages, self.draft, self.sink)

    def advance(self, layer: SourceLayer, attention: nn.Module | None) -> None:
        assert self.draft is not None
        self.draft.advance(layer, attention)

    def release(self) -> None:
        self.own = self.draft = None


class _Given:
    """Layers whose weights are known already."""

    def __init__(
        self,
        draft: Draft,
        final: Sequence[LatentWeights | None],
        stages: Sequence[dict[str, LatentWeights]],
        sink: LatentWriter,
    ) -> None:
        self.draft: Draft | None = draft
        self.final, self.stages, self.sink = final, stages, sink

    def __call__(self, layer: SourceLayer) -> MadeLayer:
        assert self.draft is not None
        final = self.final[layer.index]
        if final is None:
            return MadeLayer(ConvertedLayer(layer.index, layer.tensors), None)
        return _made(layer, final, self.stages[layer.index], self.draft, self.sink)

    def advance(self, layer: SourceLayer, attention: nn.Module | None) -> None:
        assert self.draft is not None
        self.draft.advance(layer, attention)

    def release(self) -> None:
        self.draft = None
        self.final, self.stages = [], []


def _made(
    layer: SourceLayer, final: LatentWeights, stages: dict[str, LatentWeights], draft: Draft, sink: LatentWriter
) -> MadeLayer:
    """The layer as it is saved."""
    final = sink.oriented(final, layer.index)
    result = ConvertedLayer(layer.index, layer.tensors, final, latent_rms=draft.latent_rms(layer, final))
    attention = LatentAttention.from_weights(sink.saved(result))
    return MadeLayer(result, attention, {name: LatentAttention.from_weights(w) for name, w in stages.items()})


def _polished(
    source: SourceModel,
    first: _LayerByLayer,
    calibration: Passages,
    selection: Passages,
    how: Polish,
    sink: LatentWriter,
    progress: Progress,
) -> _Given:
    """All layers, refined one by one and then polished together."""
    stages: list[dict[str, LatentWeights]] = []
    refined: list[LatentWeights | None] = []
    for layer in source.layers():
        assert first.draft is not None
        if layer.spec is None:
            first.stay(layer)
            first.draft.advance(layer, None)
            stages.append({})
            refined.append(None)
            continue
        made, passed = first.weights(layer)
        first.draft.advance(layer, LatentAttention.from_weights(made.refined.to(torch.float32)))
        stages.append(passed)
        refined.append(made.refined)
        progress("refining layers", layer.index + 1, source.spec.layers, made.news)
        del layer, made, passed
    assert first.own is not None
    # Only what the source makes of the text is needed from here on.
    first.draft = None

    def make(teacher_NTD: Tensor = first.own.hidden_NTD) -> Made:
        return polish(source, refined, calibration, teacher_NTD, selection, how, progress), ""

    learnt, _ = once(first.journal, "polish")(make)
    converted = iter(learnt)
    final = [None if w is None else next(converted) for w in refined]
    # It holds the stream.
    del make
    first.release()
    few = calibration[: max(1, RMS_TOKENS // calibration.length)]
    draft = Draft(None, source.embed(few))
    return _Given(draft, final, stages, sink)


class _Pooled:
    """Mean-pooled kv heads."""

    def __init__(self, spec: AttentionSpec, kv_heads: int, dtype: torch.dtype) -> None:
        self.spec, self.kv_heads, self.dtype = spec, kv_heads, dtype

    def __call__(self, layer: SourceLayer) -> MadeLayer:
        assert layer.weights is not None
        pooled = pool_heads(layer.weights, self.kv_heads).to(self.dtype)
        # The same heads, repeated, fit into the layer that is there.
        repeat = self.spec.num_kv_heads // self.kv_heads
        attention = layer.with_kv_heads(pooled.to(torch.float32), repeat)
        return MadeLayer(ConvertedLayer(layer.index, layer.tensors, grouped=pooled), attention)

    def advance(self, layer: SourceLayer, attention: nn.Module | None) -> None:
        pass

    def release(self) -> None:
        pass


@torch.no_grad()
def convert_pooled(
    source: SourceModel,
    kv_heads: int,
    sink: FormatWriter,
    evaluation: Passages,
    progress: Progress = silent,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> Converted:
    """Mean-pool the kv heads of every layer. It needs no calibration."""
    return run_through(source, _Pooled(source.spec.attention, kv_heads, dtype), sink, evaluation, progress)


def run_through(
    source: SourceModel, make: _Make, sink: FormatWriter, evaluation: Passages, progress: Progress
) -> Converted:
    reference = source.embed(evaluation)
    hidden, before = reference.clone(), {}
    errors: list[tuple[float, float]] = []
    massive: list[Massive] = []
    for layer in source.layers():
        made = make(layer)
        sink.layer(made.result)
        attention, stages = made.attention, made.stages
        # In float64, and written: it need not be there beside activations.
        del made
        make.advance(layer, attention)
        for name in {**before, **stages}:
            if name not in before:
                before[name] = reference.clone()
            # Of the closed form nothing is said but how far off it was.
            layer.run(before[name], stages.get(name), Use.LEARNT if name == CLOSED else Use.MEASURED)
        layer.run(reference)
        layer.run(hidden, attention)
        after = stream_error(hidden, reference)
        errors.append((stream_error(before[CLOSED], reference) if CLOSED in before else after, after))
        massive.append(_massive(hidden, reference))
        progress("converting layers", layer.index + 1, source.spec.layers, _shown(*errors[-1]))
        # The next layer is read before these names are bound again.
        del layer, attention, stages
    make.release()
    sink.no_more_layers()
    head, vocab = source.head(), source.spec.vocab_size

    streams = [stream.hidden_NTD for stream in (hidden, *before.values())]
    final, *others = compare_streams(streams, reference.hidden_NTD, evaluation.tokens_NT, head, vocab_size=vocab)
    earlier = dict(zip(before, others, strict=True))
    return Converted(final, earlier.get(CLOSED), earlier.get(_LINEAR), errors, massive)


def _shown(before: float, after: float) -> str:
    return f"error {after:.4f}" if before == after else f"error {before:.4f} → {after:.4f}"
