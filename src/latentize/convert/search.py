"""Which of the settings that a budget allows: tried on held-out calibration text."""

from __future__ import annotations

import torch

from latentize.attention.module import LatentAttention
from latentize.calibrate.tokens import Passages
from latentize.convert.draft import Draft, Seen, observe
from latentize.convert.methods import ladder_costs
from latentize.convert.progress import Progress, silent
from latentize.convert.quality import compare_streams
from latentize.convert.refine import Refinement
from latentize.convert.settings import Setting
from latentize.convert.source import SourceModel

__all__ = ["SEARCH_TOKENS", "best_strides", "choose", "short_refinement"]

# Ranking settings takes fewer tokens and steps than converting with one.
SEARCH_TOKENS = 8192


def short_refinement(refines: bool) -> Refinement | None:
    """What stands for the refinement of a conversion, where there will be one."""
    return Refinement(steps=24, rate=0.05, warmup=3) if refines else None


@torch.no_grad()
def choose(
    source: SourceModel,
    candidates: list[Setting],
    calibration: Passages,
    selection: Passages,
    refines: bool = False,
    progress: Progress = silent,
) -> tuple[Setting, list[tuple[Setting, float]]]:
    """The candidate nearest to the source on held-out calibration text, and what each scored.

    Sizes, each with two ladders (:func:`best_strides`), are compared by converting with each, and with a short
    refinement where layers will be refined: what that can repair, the closed form does not see.

    Args:
        source: The model.
        candidates: Settings, the same for all layers.
        calibration: Tokens for statistics.
        selection: Tokens to compare on; never those that are reported on.
        refines: Whether layers will be refined.
        progress: Told after each layer.

    Returns:
        The best, and ``(setting, KL from the source in nats per token)`` of all that were compared.
    """
    calibration = calibration[: max(1, SEARCH_TOKENS // calibration.length)]
    needed, refinement = candidates[0].needs(source.spec.attention), short_refinement(refines)
    # Where memory allows, and the same is wanted of them, layers are observed once for both choices.
    observed: dict[int, Seen] | None = None if refines or source.large else {}
    if any(setting.stride is not None for setting in candidates):
        candidates = best_strides(source, candidates, calibration, refines, progress, observed)
    if len(candidates) == 1:
        return candidates[0], []
    own = source.embed(calibration)
    drafts = [Draft(refinement, own) for _ in candidates]
    reference = source.embed(selection)
    streams = [reference.clone() for _ in candidates]
    for layer in source.layers():
        if layer.spec is None:
            for text in (own, reference, *streams, *(d.text for d in drafts if refinement is not None)):
                layer.run(text, fast=layer.rough)
            continue
        seen = observed.pop(layer.index) if observed else None
        seen = seen or observe(layer, own, needed, residual=refines)
        layer.run(reference, fast=layer.rough)
        for setting, draft, hidden in zip(candidates, drafts, streams, strict=True):
            attention = LatentAttention.from_weights(draft.convert(layer, seen, setting).refined.to(torch.float32))
            layer.run(hidden, attention, fast=layer.rough)
            if refinement is not None:
                draft.advance(layer, attention)
        progress("comparing settings", layer.index + 1, source.spec.layers)
        del layer, seen, attention
    del own, drafts
    logits, vocab, right_NTD = source.head(), source.spec.vocab_size, reference.hidden_NTD
    scored = []
    for setting, stream in zip(candidates, streams, strict=True):
        quality = compare_streams(stream.hidden_NTD, right_NTD, selection.tokens_NT, logits, vocab_size=vocab)
        kl = quality.kl / quality.tokens
        # A setting that overflows is worse than any that does not.
        scored.append((setting, kl if kl == kl else float("inf")))
    return min(scored, key=lambda pair: pair[1])[0], scored


def best_strides(
    source: SourceModel,
    candidates: list[Setting],
    calibration: Passages,
    refines: bool,
    progress: Progress,
    observed: dict[int, Seen] | None = None,
) -> list[Setting]:
    """For each pair of sizes the ladder that costs the logits least, all layers together, and beside it the widest.

    The cost counts what is lost before anything is repaired, most of it in layers with large logits. Where layers are
    refined much of that is repaired, and it may be worth more to reach every frequency.

    Args:
        source: The model.
        candidates: Settings with ladders.
        calibration: Tokens for statistics.
        refines: Whether layers will be refined.
        progress: Told after each layer.
        observed: Takes what was seen of each layer, by its number, for whoever needs it again.
    """
    needed, costs = candidates[0].needs(source.spec.attention), [0.0] * len(candidates)
    text = source.embed(calibration)
    for layer in source.layers():
        if layer.spec is None or layer.weights is None:
            layer.run(text, fast=layer.rough)
            continue
        seen = observe(layer, text, needed)
        for index, cost in enumerate(ladder_costs(layer.weights, layer.spec, seen.stats, candidates)):
            costs[index] += cost
        if observed is not None:
            observed[layer.index] = seen
        progress("choosing the ladder", layer.index + 1, source.spec.layers)
        del layer, seen
    by_size: dict[tuple[int, int], list[tuple[float, Setting]]] = {}
    for cost, setting in zip(costs, candidates, strict=True):
        by_size.setdefault((setting.kv_lora_rank, setting.qk_rope_head_dim), []).append((cost, setting))
    found = []
    for ladders in by_size.values():
        cheapest = min(ladders, key=lambda pair: pair[0])[1]
        widest = max((setting for _, setting in ladders), key=lambda setting: setting.stride or 0.0)
        found += [cheapest, widest] if refines and widest != cheapest else [cheapest]
    return found
