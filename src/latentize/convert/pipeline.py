"""Layer by layer: statistics, conversion, and what it did to the model's predictions.

Several streams of hidden states move through the source together. The calibration stream stays the source's. The
evaluation text runs twice, as the source and as what the model has become so far; so the final loss and KL are
those of the whole converted model, and no second model is ever in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from latentize.attention.grouped import AttentionWeights
from latentize.attention.latent import LatentWeights
from latentize.attention.module import LatentAttention
from latentize.calibrate.stats import CalibrationStats
from latentize.convert.methods import Setting, convert_layer
from latentize.convert.pooling import pool_heads
from latentize.convert.quality import Quality, compare_streams
from latentize.convert.source import Recorded, SourceLayer, SourceModel

__all__ = ["Converted", "LayerResult", "Progress", "Sink", "choose", "convert_latent", "convert_pooled"]


_SEARCH_TOKENS = 8192


class Progress(Protocol):
    """Told how far a long step is."""

    def __call__(self, what: str, done: int, total: int) -> None: ...


def silent(what: str, done: int, total: int) -> None:
    """A progress that says nothing."""


@dataclass
class LayerResult:
    """One converted layer.

    Attributes:
        index: Its number.
        source: The source's layer, tensors as stored.
        latent: MLA weights in float64, or ``None`` for head pooling.
        grouped: Pooled weights, or ``None``.
        latent_rms: Largest and mean root mean square of a token's latent on the calibration text.
        error: ``‖attn(x) - attn_source(x)‖² / var``, on the evaluation text, inputs of the source.
    """

    index: int
    source: SourceLayer
    latent: LatentWeights | None = None
    grouped: AttentionWeights | None = None
    latent_rms: tuple[float, float] = (0.0, 0.0)
    error: float = 0.0


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
        errors: Relative attention error of each layer.
        calibration_tokens: Tokens that statistics came from.
    """

    quality: Quality
    errors: list[float] = field(default_factory=list)
    calibration_tokens: int = 0


def _gather(layer: SourceLayer, hidden_NTD: Tensor, setting: Setting) -> tuple[CalibrationStats, list[Tensor]]:
    """Advance the calibration stream and take the statistics that a method needs."""
    inputs = layer.run(hidden_NTD, record=True).inputs
    weights = layer.weights if setting.needs_norms else None
    stats = CalibrationStats.of(inputs[0], weights)
    for x_BTD in inputs[1:]:
        stats = stats + CalibrationStats.of(x_BTD, weights)
    return stats, inputs


def _relative_error(layer: SourceLayer, attention: nn.Module, recorded: Recorded) -> float:
    wrong, size = 0.0, 0.0
    for x_BTD, y_BTD in zip(recorded.inputs, recorded.outputs, strict=True):
        wrong += float((layer.attend(attention, x_BTD) - y_BTD).double().square().sum())
        size += float((y_BTD - y_BTD.mean((0, 1))).double().square().sum())
    return wrong / size


def _latent_rms(w: LatentWeights, inputs: list[Tensor]) -> tuple[float, float]:
    down_rD = w.kv_a_rD.float()
    squares = torch.cat([(x_BTD @ down_rD.T).square().mean(-1).flatten() for x_BTD in inputs])
    return float(squares.max()) ** 0.5, float(squares.mean()) ** 0.5


@torch.no_grad()
def choose(
    source: SourceModel,
    candidates: list[Setting],
    calibration_NT: Tensor,
    selection_NT: Tensor,
    progress: Progress = silent,
) -> tuple[Setting, list[tuple[Setting, float]]]:
    """The candidate nearest to the source on held-out calibration text, and what each scored.

    One pass over the source, with a converted stream for every candidate.

    Args:
        source: The model.
        candidates: Settings, the same for all layers.
        calibration_NT: Tokens for statistics.
        selection_NT: Tokens to compare on; never those that are reported on.
        progress: Told after each layer.

    Returns:
        The best, and ``(setting, KL from the source in nats per token)`` of all.
    """
    if len(candidates) == 1:
        return candidates[0], []
    # Ranking candidates takes fewer statistics than converting with one.
    calibration = source.embed(calibration_NT[: max(1, _SEARCH_TOKENS // calibration_NT.shape[1])])
    reference = source.embed(selection_NT)
    streams = [reference.clone() for _ in candidates]
    for layer in source.layers():
        stats, _ = _gather(layer, calibration, candidates[0])
        layer.run(reference)
        for setting, hidden in zip(candidates, streams, strict=True):
            latent = convert_layer(layer.weights, source.spec.attention, stats, setting).to(torch.float32)
            layer.run(hidden, attention=LatentAttention.from_weights(latent))
        progress("comparing settings", layer.index + 1, source.spec.layers)
    del calibration, layer
    logits = source.head()
    scored = []
    for setting, hidden in zip(candidates, streams, strict=True):
        quality = compare_streams(hidden, reference, selection_NT, logits, vocab_size=source.spec.vocab_size)
        kl = quality.kl / quality.tokens
        # A setting that overflows is worse than any that does not.
        scored.append((setting, kl if kl == kl else float("inf")))
    return min(scored, key=lambda pair: pair[1])[0], scored


@torch.no_grad()
def convert_latent(
    source: SourceModel,
    setting: Setting,
    sink: Sink,
    calibration_NT: Tensor,
    evaluation_NT: Tensor,
    progress: Progress = silent,
) -> Converted:
    """Convert every layer to MLA and hand it to ``sink``.

    Args:
        source: The model.
        setting: What to do.
        sink: Rounds weights to what it saves, and saves them.
        calibration_NT: Tokens for statistics.
        evaluation_NT: Tokens that the result is measured on.
        progress: Told after each layer.
    """
    spec = source.spec.attention
    calibration = source.embed(calibration_NT)

    def make(layer: SourceLayer) -> tuple[LayerResult, nn.Module]:
        stats, inputs = _gather(layer, calibration, setting)
        latent = convert_layer(layer.weights, spec, stats, setting)
        result = LayerResult(layer.index, layer, latent=latent, latent_rms=_latent_rms(latent, inputs))
        return result, LatentAttention.from_weights(sink.saved(result))

    result = _convert(source, make, sink, evaluation_NT, progress)
    result.calibration_tokens = calibration_NT.numel()
    return result


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
    spec = source.spec.attention

    def make(layer: SourceLayer) -> tuple[LayerResult, nn.Module]:
        pooled = pool_heads(layer.weights, kv_heads).to(dtype)
        # The same heads, repeated, fit into the layer that is there.
        repeat = spec.num_kv_heads // kv_heads
        return LayerResult(layer.index, layer, grouped=pooled), layer.with_kv_heads(pooled.to(torch.float32), repeat)

    return _convert(source, make, sink, evaluation_NT, progress)


def _convert(
    source: SourceModel,
    make: Callable[[SourceLayer], tuple[LayerResult, nn.Module]],
    sink: Sink,
    evaluation_NT: Tensor,
    progress: Progress,
) -> Converted:
    reference = source.embed(evaluation_NT)
    hidden = reference.clone()
    errors: list[float] = []
    for layer in source.layers():
        result, attention = make(layer)
        recorded = layer.run(reference, record=True)
        result.error = _relative_error(layer, attention, recorded)
        layer.run(hidden, attention=attention)
        sink.layer(result)
        errors.append(result.error)
        progress("converting layers", layer.index + 1, source.spec.layers)
    quality = compare_streams(hidden, reference, evaluation_NT, source.head(), vocab_size=source.spec.vocab_size)
    return Converted(quality, errors)
