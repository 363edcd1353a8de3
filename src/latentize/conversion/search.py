"""Which of the settings that a budget allows.

The published methods have few, and those are compared on what the whole converted model predicts. The calibrated
method has many, and most of them can be told apart much sooner, by what single layers lose: the error that a layer
converted alone makes in the residual stream, relative to each token's size. That is looked at in some layers only, in
closed form. The best few are then compared, after a short refinement of these layers, on what the model predicts with
all of them converted: among near ones the error is no guide, for a layer's error says little of where it matters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from latentize.conversion.draft import Observed, alone, naming_layer, observe
from latentize.evaluation.losses import compare_streams
from latentize.methods.calibrated import ladder_costs
from latentize.methods.closed_form import conversion
from latentize.methods.registry import needs
from latentize.methods.setting import Setting
from latentize.methods.statistics import Needed
from latentize.modeling.attention import LatentAttention
from latentize.modeling.layer import SourceLayer, Stream
from latentize.modeling.precision import Use
from latentize.modeling.source import SourceModel
from latentize.processes import ALONE, Team
from latentize.progress import Progress, silent
from latentize.text.tokens import Passages
from latentize.training.refine import Refinement

__all__ = [
    "FINALISTS",
    "LADDERS",
    "SEARCH_TOKENS",
    "as_good",
    "choose",
    "choose_by_layers",
    "divergences",
    "learnt_alone",
    "likely_ladders",
    "most_promising",
    "sampled_layers",
    "short_refinement",
]

# Ranking settings takes fewer tokens and steps than converting with one, and not every layer.
SEARCH_TOKENS = 8192
_LAYERS = 8
# Ladders of one size that are looked at beside the densest and the widest, and sizes that are compared further.
LADDERS, FINALISTS = 2, 3
# Settings within such a share of the least KL are as good after a short refinement. A long one makes more of a larger
# latent: two that were 0.6 % apart after 24 steps were 9 to 13 % apart, the other way, after 128.
_AS_GOOD = 0.05


def short_refinement(length: int) -> Refinement:
    """What stands for the refinement of a conversion.

    Args:
        length: Tokens of a sequence.
    """
    return Refinement(steps=24, warmup=3, probe=2048).suited(length)


def sampled_layers(layers: Sequence[int]) -> list[int]:
    """Of the layers that will be converted those that choices are made on: the first, the last, and evenly between."""
    count = min(_LAYERS, len(layers))
    if count == 1:
        return list(layers)
    return [layers[round(i * (len(layers) - 1) / (count - 1))] for i in range(count)]


@torch.no_grad()
def choose_by_layers(
    source: SourceModel,
    candidates: Sequence[Setting],
    calibration: Passages,
    selection: Passages,
    refines: bool,
    progress: Progress = silent,
    team: Team = ALONE,
) -> tuple[Setting, list[tuple[Setting, float]]]:
    """The candidate that predicts best of those that cost single layers least, and what each lost.

    Args:
        source: The model.
        candidates: Settings of the calibrated method, the same for all layers.
        calibration: Tokens for statistics; errors are measured on a part of them that refinement does not learn from.
        selection: Tokens to compare predictions on; never those that are reported on.
        refines: Whether layers will be refined: then the best few are, shortly, and of those that are as good then the
            one with the largest latent is taken.
        progress: Told after each layer.
        team: Processes that share the candidates; each has all of the text.

    Returns:
        The most promising, and ``(setting, KL from the source in nats per token)`` of all that were compared last, with
        some layers converted.
    """
    if len(candidates) == 1:
        return candidates[0], []
    calibration = calibration[: max(1, SEARCH_TOKENS // calibration.length)]
    candidates = likely_ladders(source, candidates, calibration, progress)
    short = short_refinement(calibration.length)
    none = replace(short, steps=0)
    scored = _errors(source, candidates, calibration, none, progress, "comparing settings", team)
    how = short if refines else none
    compared = _compared(source, team.told(_finalists(scored, refines)), calibration, selection, how, progress, team)
    return most_promising(compared, share=_AS_GOOD if refines else 0.0), compared


def most_promising(compared: Sequence[tuple[Setting, float]], *, share: float) -> Setting:
    """Of the settings that are as good as the best, the one with the largest latent.

    Args:
        compared: Settings and their KL.
        share: Of the least KL, by which others may exceed it.
    """
    least = min(kl for _, kl in compared)
    near = [pair for pair in compared if as_good(pair[1], least, share)]
    return min(near, key=lambda pair: (-pair[0].kv_lora_rank, pair[1]))[0]


def as_good(kl: float, least: float, share: float = _AS_GOOD) -> bool:
    """Whether a KL after a short refinement is no worse than the least, but for a share of it."""
    # Of what is exact rounding may leave less than nothing.
    return kl <= least + share * abs(least)


def _compared(
    source: SourceModel,
    finalists: Sequence[Setting],
    calibration: Passages,
    selection: Passages,
    how: Refinement,
    progress: Progress,
    team: Team,
) -> list[tuple[Setting, float]]:
    """KL of the model with some layers converted, each learnt alone, for every finalist."""
    own, reference, all_of_them = source.embed(calibration), source.embed(selection), finalists
    # Each process compares its own with the source.
    finalists = team.mine(finalists)
    streams, some = [reference.clone() for _ in finalists], set(sampled_layers(source.spec.converted))
    for layer in source.layers():
        layer.run(reference, use=Use.LEARNT)
        if layer.index in some:
            learnt_alone(layer, own, finalists, streams, how)
        else:
            for stream in (own, *streams):
                layer.run(stream, use=Use.LEARNT)
        progress("comparing the best settings", layer.index + 1, source.spec.layers)
    found = divergences(source, streams, reference, selection, fast=source.precision.narrow(Use.LEARNT))
    return list(zip(all_of_them, team.gathered(found, len(all_of_them)), strict=True))


def learnt_alone(
    layer: SourceLayer, own: Stream, finalists: Sequence[Setting], streams: Sequence[Stream], how: Refinement
) -> None:
    """Take each finalist's text through the layer as learnt with its setting, and the source's through its own."""
    assert layer.spec is not None and layer.weights is not None
    if not finalists:
        layer.run(own, use=Use.LEARNT)
        return
    entering = own.clone()
    observed = observe(layer, own, needs(finalists[0], layer.spec), residual=len(own))
    for setting, stream in zip(finalists, streams, strict=True):
        if how.steps:
            learnt = alone(layer, entering, observed, setting, how).weights
        else:
            # No error is asked for.
            with naming_layer(layer.index):
                learnt = conversion(layer.weights, layer.spec, observed.stats, setting).weights.to(torch.float32)
        layer.run(stream, LatentAttention.from_weights(learnt), use=Use.LEARNT)


def divergences(
    source: SourceModel, streams: Sequence[Stream], reference: Stream, text: Passages, *, fast: bool = False
) -> list[float]:
    """KL from the source in nats per token, of what each stream predicts; ``fast`` in bfloat16."""
    logits, vocab, right_NTD = source.head(), source.spec.vocab_size, reference.hidden_NTD
    hidden = [stream.hidden_NTD for stream in streams]
    # Rounded alike, so that it does not change which is best.
    with torch.autocast(right_NTD.device.type, torch.bfloat16, enabled=fast):
        qualities = compare_streams(hidden, right_NTD, text.tokens_NT, logits, vocab_size=vocab)
    found = [quality.kl / quality.tokens for quality in qualities]
    # What overflows is worse than anything that does not.
    return [kl if kl == kl else math.inf for kl in found]


def _finalists(scored: Sequence[tuple[Setting, float]], refines: bool) -> list[Setting]:
    """The best two sizes and the next that ropes less; of each the best ladder, and the widest if layers are refined.

    Refinement makes most of a latent that is a little larger, and of a ladder that reaches every frequency.
    """
    found: dict[tuple[int, int], list[Setting]] = {}
    for setting, _ in sorted(scored, key=lambda pair: pair[1]):
        found.setdefault((setting.kv_lora_rank, setting.qk_rope_head_dim), []).append(setting)
    sizes = list(found)
    best, others = sizes[: FINALISTS - 1], sizes[FINALISTS - 1 :]
    ropes_less = [size for size in others if size[1] < min(rope for _, rope in best)]
    best += [max(ropes_less, key=lambda size: size[1])] if ropes_less else others[:1]
    chosen = [(found[size][0], max(found[size], key=_width)) for size in best]
    return [s for pair in chosen for s in dict.fromkeys(pair[: 1 + refines])]


def _width(setting: Setting) -> float:
    """Stride of a ladder; free frequencies are as wide as is good for them."""
    return setting.stride or 0.0


def _some_layers(
    source: SourceModel, calibration: Passages, needed: Needed, progress: Progress, what: str
) -> Iterator[tuple[SourceLayer, Stream, Observed]]:
    """Some layers, the text as it enters each, and what was observed."""
    text, some = source.embed(calibration), set(sampled_layers(source.spec.converted))
    for layer in source.layers():
        if layer.index in some:
            yield _seen(layer, text, needed)
        elif layer.index < max(some):
            layer.run(text, use=Use.LEARNT)
        progress(what, layer.index + 1, source.spec.layers)
        if layer.index == max(some):
            return


def _seen(layer: SourceLayer, text: Stream, needed: Needed) -> tuple[SourceLayer, Stream, Observed]:
    """The layer, the text as it enters it, and what is observed on its way through."""
    entering = text.clone()
    return layer, entering, observe(layer, text, needed, residual=len(text))


def likely_ladders(
    source: SourceModel, candidates: Sequence[Setting], calibration: Passages, progress: Progress = silent
) -> list[Setting]:
    """For each pair of sizes the densest and the widest ladder, and those that cost the logits least.

    Args:
        source: The model.
        candidates: Settings of the calibrated method.
        calibration: Tokens for statistics.
        progress: Told after each layer.
    """
    by_size: dict[tuple[int, int], list[int]] = {}
    for index, setting in enumerate(candidates):
        by_size.setdefault((setting.kv_lora_rank, setting.qk_rope_head_dim), []).append(index)
    if max(map(len, by_size.values())) <= LADDERS:
        return list(candidates)
    costs = [0.0] * len(candidates)
    needed = needs(candidates[0], source.spec.attention)
    for layer, _, observed in _some_layers(source, calibration, needed, progress, "choosing the ladder"):
        assert layer.weights is not None and layer.spec is not None
        with naming_layer(layer.index):
            found = ladder_costs(layer.weights, layer.spec, observed.stats, list(candidates))
        # Logits of some layers are hundreds of times as large as those of others, and softmax bears as much more.
        mean = max(sum(found) / len(found), 1e-30)
        costs = [cost + one / mean for cost, one in zip(costs, found, strict=True)]
    likely = []
    for of_size in by_size.values():
        cheapest = sorted(of_size, key=lambda index: costs[index])[:LADDERS]
        widest = max(of_size, key=lambda index: _width(candidates[index]))
        likely += [candidates[i] for i in of_size if i in (*cheapest, widest) or candidates[i].stride in (1.0, None)]
    return likely


def _errors(
    source: SourceModel,
    candidates: Sequence[Setting],
    calibration: Passages,
    how: Refinement,
    progress: Progress,
    what: str,
    team: Team,
) -> list[tuple[Setting, float]]:
    """Mean relative error of a layer that is converted alone, for each candidate, after the steps of ``how``."""
    mine, count = team.mine(candidates), 0
    total = [0.0] * len(mine)
    needed = needs(candidates[0], source.spec.attention)
    for layer, text, observed in _some_layers(source, calibration, needed, progress, what):
        for index, setting in enumerate(mine):
            total[index] += alone(layer, text, observed, setting, how).after
        count += 1
    errors = team.gathered([error / count for error in total], len(candidates))
    return list(zip(candidates, errors, strict=True))


@torch.no_grad()
def choose(
    source: SourceModel,
    candidates: Sequence[Setting],
    calibration: Passages,
    selection: Passages,
    progress: Progress = silent,
) -> tuple[Setting, list[tuple[Setting, float]]]:
    """The candidate whose closed form is nearest to the source on held-out calibration text, and what each scored.

    Args:
        source: The model.
        candidates: Settings, the same for all layers.
        calibration: Tokens for statistics.
        selection: Tokens to compare on; never those that are reported on.
        progress: Told after each layer.

    Returns:
        The best, and ``(setting, KL from the source in nats per token)`` of all that were compared.
    """
    if len(candidates) == 1:
        return candidates[0], []
    calibration = calibration[: max(1, SEARCH_TOKENS // calibration.length)]
    reference = source.embed(selection)
    streams = [reference.clone() for _ in candidates]
    _closed_forms(source, candidates, source.embed(calibration), reference, streams, progress)
    scored = list(zip(candidates, divergences(source, streams, reference, selection), strict=True))
    return min(scored, key=lambda pair: pair[1])[0], scored


def _closed_forms(
    source: SourceModel,
    candidates: Sequence[Setting],
    own: Stream,
    reference: Stream,
    streams: Sequence[Stream],
    progress: Progress,
) -> None:
    """Take a text through the source, and through every candidate in closed form."""
    needed = needs(candidates[0], source.spec.attention)
    for layer in source.layers():
        if layer.spec is None or layer.weights is None:
            for text in (own, reference, *streams):
                layer.run(text)
            continue
        stats = observe(layer, own, needed).stats
        layer.run(reference)
        for setting, hidden in zip(candidates, streams, strict=True):
            with naming_layer(layer.index):
                weights = conversion(layer.weights, layer.spec, stats, setting).weights
            layer.run(hidden, LatentAttention.from_weights(weights.to(torch.float32)))
        progress("comparing settings", layer.index + 1, source.spec.layers)
