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
from typing import Protocol

import torch
from torch import Tensor, nn

from latentize.attention.grouped import AttentionWeights
from latentize.attention.latent import LatentWeights
from latentize.attention.module import LatentAttention
from latentize.convert.draft import Draft, DraftedLayer, observe
from latentize.convert.methods import Setting
from latentize.convert.polish import Polish, polish
from latentize.convert.pooling import pool_heads
from latentize.convert.progress import Progress, silent
from latentize.convert.quality import Quality, compare_streams
from latentize.convert.refine import Refinement
from latentize.convert.source import SourceLayer, SourceModel
from latentize.spec import AttentionSpec

__all__ = ["Converted", "Effort", "LayerResult", "Sink", "convert_latent", "convert_pooled"]


_RMS_TOKENS = 16_384


@dataclass(frozen=True)
class Effort:
    """What is done beyond the closed form.

    Attributes:
        refinement: Of each layer, or ``None``.
        polish: Of the whole model, or ``None``.
    """

    refinement: Refinement | None = None
    polish: Polish | None = None


@dataclass
class LayerResult:
    """One converted layer.

    Attributes:
        index: Its number.
        source: The source's layer, tensors as stored.
        latent: MLA weights, or ``None`` for head pooling.
        grouped: Pooled weights, or ``None``.
        latent_rms: Largest and mean root mean square of a token's latent on the calibration text.
    """

    index: int
    source: SourceLayer
    latent: LatentWeights | None = None
    grouped: AttentionWeights | None = None
    latent_rms: tuple[float, float] = (0.0, 0.0)


class Sink(Protocol):
    """Takes the layers as they are made: a writer of some format."""

    def saved(self, result: LayerResult) -> LatentWeights:
        """The weights of ``result`` as they will be when they are loaded again, in float32."""
        ...

    def layer(self, result: LayerResult) -> None:
        """Write the layer."""
        ...


@dataclass
class Converted:
    """What a conversion measured.

    Attributes:
        quality: On the evaluation text, the source as reference.
        closed_form: The same before anything was refined, or ``None`` where nothing was.
        errors: For each layer ``‖h - h_source‖² / ‖h_source - mean‖²`` of the residual stream that leaves it, on the
            evaluation text: in closed form, and as saved.
        calibration_tokens: Tokens that statistics and refinement came from.
    """

    quality: Quality
    closed_form: Quality | None = None
    errors: list[tuple[float, float]] = field(default_factory=list)
    calibration_tokens: int = 0


def _stream_error(hidden_NTD: Tensor, reference_NTD: Tensor) -> float:
    mean_D = reference_NTD.mean((0, 1))
    pairs = list(zip(hidden_NTD, reference_NTD, strict=True))
    wrong = sum(float((h - r).double().square().sum()) for h, r in pairs)
    return wrong / sum(float((r - mean_D).double().square().sum()) for _, r in pairs)


@torch.no_grad()
def convert_latent(
    source: SourceModel,
    settings: Sequence[Setting],
    sink: Sink,
    calibration_NT: Tensor,
    selection_NT: Tensor,
    evaluation_NT: Tensor,
    effort: Effort | None = None,
    progress: Progress = silent,
) -> Converted:
    """Convert every layer to MLA and hand it to ``sink``.

    Args:
        source: The model.
        settings: What to do with each layer.
        sink: Rounds weights to what it saves, and saves them.
        calibration_NT: Tokens for statistics and refinement.
        selection_NT: Tokens that tell whether polishing helps.
        evaluation_NT: Tokens that the result is measured on.
        effort: What to do beyond the closed form.
        progress: Told after each layer, and each step of the polish.
    """
    effort = effort or Effort()
    make: _Make = _LayerByLayer(source, settings, sink, calibration_NT, effort.refinement)
    if effort.polish is not None:
        make = _polished(source, make, calibration_NT, selection_NT, effort.polish, sink, progress)
    result = _convert(source, make, sink, evaluation_NT, progress)
    result.calibration_tokens = calibration_NT.numel()
    return result


class _Make(Protocol):
    """Makes the layers of a converted model, in order."""

    def __call__(self, layer: SourceLayer) -> tuple[LayerResult, nn.Module, nn.Module | None]:
        """The layer, its attention as saved, and where that is something else, in closed form."""
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
        sink: Sink,
        calibration_NT: Tensor,
        refinement: Refinement | None,
    ) -> None:
        self.own_NTD: Tensor | None = source.embed(calibration_NT)
        # Without refinement nothing is learnt from the converted stream but how large its latents get.
        few = len(calibration_NT) if refinement else max(1, _RMS_TOKENS // calibration_NT.shape[1])
        self.draft: Draft | None = Draft(source.spec.attention, refinement, self.own_NTD[:few])
        self.settings, self.sink, self.spec = settings, sink, source.spec.attention

    def weights(self, layer: SourceLayer) -> DraftedLayer:
        assert self.own_NTD is not None and self.draft is not None
        refines = self.draft.refinement is not None
        setting = self.settings[layer.index]
        seen = observe(layer, self.spec, self.own_NTD, setting.needs(self.spec), residual=refines)
        return self.draft.convert(layer, seen, setting)

    def __call__(self, layer: SourceLayer) -> tuple[LayerResult, nn.Module, nn.Module | None]:
        assert self.draft is not None
        closed, refined, _ = self.weights(layer)
        result = LayerResult(layer.index, layer, latent=refined, latent_rms=self.draft.latent_rms(layer, refined))
        attention = LatentAttention.from_weights(self.sink.saved(result))
        self.draft.advance(layer, attention)
        return result, attention, None if closed is refined else LatentAttention.from_weights(closed.to(torch.float32))

    def release(self) -> None:
        self.own_NTD = self.draft = None


class _Given:
    """Layers whose weights are known already."""

    def __init__(self, draft: Draft, pairs: list[tuple[LatentWeights, LatentWeights]], sink: Sink) -> None:
        self.draft: Draft | None = draft
        self.pairs, self.sink = pairs, sink

    def __call__(self, layer: SourceLayer) -> tuple[LayerResult, nn.Module, nn.Module | None]:
        assert self.draft is not None
        closed, final = self.pairs[layer.index]
        result = LayerResult(layer.index, layer, latent=final, latent_rms=self.draft.latent_rms(layer, final))
        attention = LatentAttention.from_weights(self.sink.saved(result))
        self.draft.advance(layer, attention)
        return result, attention, LatentAttention.from_weights(closed)

    def release(self) -> None:
        self.draft = None
        self.pairs = []


def _polished(
    source: SourceModel,
    first: _LayerByLayer,
    calibration_NT: Tensor,
    selection_NT: Tensor,
    how: Polish,
    sink: Sink,
    progress: Progress,
) -> _Given:
    """All layers, refined one by one and then polished together."""
    closed, refined = [], []
    for layer in source.layers():
        assert first.draft is not None
        made = first.weights(layer)
        first.draft.advance(layer, LatentAttention.from_weights(made.refined.to(torch.float32)))
        closed.append(made.closed.to(torch.float32))
        refined.append(made.refined)
        progress("refining layers", layer.index + 1, source.spec.layers, made.news)
        del layer, made
    assert first.own_NTD is not None
    final = polish(source, refined, calibration_NT, first.own_NTD, selection_NT, how, progress)
    first.release()
    few_NT = calibration_NT[: max(1, _RMS_TOKENS // calibration_NT.shape[1])]
    draft = Draft(first.spec, None, source.embed(few_NT))
    return _Given(draft, list(zip(closed, final, strict=True)), sink)


class _Pooled:
    """Mean-pooled kv heads."""

    def __init__(self, spec: AttentionSpec, kv_heads: int, dtype: torch.dtype) -> None:
        self.spec, self.kv_heads, self.dtype = spec, kv_heads, dtype

    def __call__(self, layer: SourceLayer) -> tuple[LayerResult, nn.Module, nn.Module | None]:
        pooled = pool_heads(layer.weights, self.kv_heads).to(self.dtype)
        # The same heads, repeated, fit into the layer that is there.
        repeat = self.spec.num_kv_heads // self.kv_heads
        attention = layer.with_kv_heads(pooled.to(torch.float32), repeat)
        return LayerResult(layer.index, layer, grouped=pooled), attention, None

    def release(self) -> None:
        pass


@torch.no_grad()
def convert_pooled(
    source: SourceModel,
    kv_heads: int,
    sink: Sink,
    evaluation_NT: Tensor,
    progress: Progress = silent,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> Converted:
    """Mean-pool the kv heads of every layer. It needs no calibration."""
    return _convert(source, _Pooled(source.spec.attention, kv_heads, dtype), sink, evaluation_NT, progress)


def _convert(source: SourceModel, make: _Make, sink: Sink, evaluation_NT: Tensor, progress: Progress) -> Converted:
    reference = source.embed(evaluation_NT)
    hidden, before = reference.clone(), None
    errors: list[tuple[float, float]] = []
    for layer in source.layers():
        result, attention, closed = make(layer)
        if closed is not None:
            before = reference.clone() if before is None else before
            layer.run(before, closed)
        layer.run(reference)
        layer.run(hidden, attention)
        sink.layer(result)
        after = _stream_error(hidden, reference)
        errors.append((after if before is None else _stream_error(before, reference), after))
        progress("converting layers", layer.index + 1, source.spec.layers, _shown(*errors[-1]))
        # The next layer is read before these names are bound again.
        del layer, result, attention, closed
    make.release()
    head, vocab = source.head(), source.spec.vocab_size
    quality = compare_streams(hidden, reference, evaluation_NT, head, vocab_size=vocab)
    if before is None:
        return Converted(quality, None, errors)
    return Converted(quality, compare_streams(before, reference, evaluation_NT, head, vocab_size=vocab), errors)


def _shown(before: float, after: float) -> str:
    return f"error {after:.4f}" if before == after else f"error {before:.4f} → {after:.4f}"
