"""Sizes layer by layer, for a format that can hold them: values go where losing them costs most.

Each layer is converted alone, in a model that is otherwise the source's. Its price at an equal share, or at a smaller
one where that is exact, is the KL of that model's predictions on held-out calibration text; at another rank it changes
as the error does that the layer makes in the residual stream, after a short refinement. While errors are small prices
add up, so the best sizes for a given total are those where one value more is worth the same in every layer. Values
move between layers until that is so. Where errors are large, prices do not add up: then fewer moves, and none, are
compared with it, on what the model predicts with all layers converted.

N sequences, T tokens, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from latentize.attention.spec import AttentionSpec
from latentize.conversion.draft import Observed, alone, is_exact, observe
from latentize.conversion.search import SEARCH_TOKENS, as_good, divergences, learnt_alone, short_refinement
from latentize.evaluation.losses import compare_streams
from latentize.methods.closed_form import conversion
from latentize.methods.registry import needs
from latentize.methods.setting import Setting
from latentize.modeling.attention import LatentAttention
from latentize.modeling.layer import SourceLayer, Stream
from latentize.modeling.precision import Use
from latentize.modeling.source import SourceModel
from latentize.processes import ALONE, Team
from latentize.progress import Progress, silent
from latentize.text.tokens import Passages
from latentize.training.refine import Refinement

__all__ = [
    "STREAM_BYTES",
    "TRIAL_TOKENS",
    "TRIED",
    "allocate",
    "exchange",
    "predicting_best",
    "price",
    "where_exact",
]

# Ranks that are tried, and the least and the most that a layer may get, relative to an equal share.
TRIED = (0.5, 1.0, 1.5)
_LEAST, _MOST = 0.25, 2.0
# What else a layer keeps at least, of an equal share, where the sum of all prices is above so many nats per token.
_FEWER_MOVES, _ADDS_UP = (0.5, 1.0), 0.1
# Steps that a rank is made of, at least, and what a move has to gain, relative to a sum above one: rounding must not
# decide.
_FINENESS, _WORTH = 12, 1e-9
# Prices that are told apart. What is not a number has overflowed, and costs most.
_CHEAPEST, _DEAREST = 1e-12, 1e12
# Relative error of a layer that may be rounding, where text is followed in bfloat16.
_MAY_BE_ROUNDING = 1e-3
# Held-out tokens that prices are measured on, and a bound on the hidden states of all layers' trials.
TRIAL_TOKENS, STREAM_BYTES = 2048, 1 << 30


@torch.no_grad()
def allocate(
    source: SourceModel,
    candidates: Sequence[Setting],
    calibration: Passages,
    selection: Passages,
    refines: bool = False,
    progress: Progress = silent,
    team: Team = ALONE,
) -> tuple[list[Setting], list[dict[int, float]]]:
    """A setting for every layer that is converted; together they keep no more than equal shares would.

    Args:
        source: The model.
        candidates: Equal shares: splits of one budget into latent and roped key. Each layer takes the one that serves
            it best, before ranks are moved between layers.
        calibration: Tokens for statistics.
        selection: Tokens to compare on; never those that are reported on.
        refines: Whether layers will be refined.
        progress: Told after each layer.
        team: Processes that share what is tried; each has all of the text.

    Returns:
        The settings, and for each layer the price in nats per token of the ranks that were tried.
    """
    spec, layers = source.spec.attention, source.spec.layers
    calibration = calibration[: max(1, SEARCH_TOKENS // calibration.length)]
    short = short_refinement(calibration.length)
    none = replace(short, steps=0)
    fitting = min(TRIAL_TOKENS // selection.length, STREAM_BYTES // (4 * selection.length * spec.hidden_size * layers))
    selection = selection[: max(1, fitting)]
    own, reference = source.embed(calibration), source.embed(selection)
    equal, trials, errors, tested = [], [], [], []
    for layer in source.layers():
        for trial in trials:
            layer.run(trial, use=Use.LEARNT)
        if layer.spec is None:
            layer.run(own, use=Use.LEARNT)
            layer.run(reference, use=Use.LEARNT)
            continue
        sized = _sized(layer, own, reference, candidates, short if refines else none, team)
        progress("sizing layers", layer.index + 1, layers)
        for found, one in zip((equal, trials, errors, tested), sized, strict=True):
            found.append(one)
    logits, vocab = source.head(), source.spec.vocab_size
    tokens_NT, right_NTD = selection.tokens_NT, reference.hidden_NTD
    prices = []
    compared = compare_streams([t.hidden_NTD for t in trials], right_NTD, tokens_NT, logits, vocab_size=vocab)
    for test, found, error in zip(tested, compared, errors, strict=True):
        # A layer that makes no error costs nothing, whatever rounding has made of its predictions.
        one = max(found.kl, 0.0) / found.tokens / error[test] if error[test] > short.enough else 0.0
        prices.append({rank: one * wrong for rank, wrong in error.items()})
    known = [price(measured) for measured in prices]
    moved = [_moved(equal, known, least, spec) for least in (_LEAST, *_FEWER_MOVES)]
    best = moved[0]
    if sum(at(setting.kv_lora_rank) for at, setting in zip(known, best, strict=True)) > _ADDS_UP:
        distinct, how = list(dict.fromkeys(moved)), short if refines else none
        best = predicting_best(source, distinct, calibration, selection, how, progress, team)
    return list(best), prices


def _moved(
    equal: Sequence[Setting], prices: Sequence[Callable[[int], float]], least: float, spec: AttentionSpec
) -> tuple[Setting, ...]:
    """Settings with values moved between layers, each of which keeps a share of what it had at least."""
    bounds = [(_rank(setting, least, spec), _rank(setting, _MOST, spec)) for setting in equal]
    ranks = exchange([setting.kv_lora_rank for setting in equal], prices, bounds)
    return tuple(replace(setting, kv_lora_rank=rank) for setting, rank in zip(equal, ranks, strict=True))


@torch.no_grad()
def predicting_best(
    source: SourceModel,
    sized: Sequence[tuple[Setting, ...]],
    calibration: Passages,
    selection: Passages,
    how: Refinement,
    progress: Progress = silent,
    team: Team = ALONE,
) -> tuple[Setting, ...]:
    """Of several settings for all layers those that predict best with all of them converted, each learnt alone; of
    those that are as good the last."""
    if len(sized) == 1:
        return sized[0]
    own, reference, mine = source.embed(calibration), source.embed(selection), team.mine(sized)
    streams, converted = [reference.clone() for _ in mine], source.spec.converted
    for layer in source.layers():
        layer.run(reference, use=Use.LEARNT)
        if layer.spec is None:
            for stream in (own, *streams):
                layer.run(stream, use=Use.LEARNT)
        else:
            number = converted.index(layer.index)
            learnt_alone(layer, own, [settings[number] for settings in mine], streams, how)
        progress("comparing sizes of all layers", layer.index + 1, source.spec.layers)
    found = divergences(source, streams, reference, selection, fast=source.precision.narrow(Use.LEARNT))
    kl = team.told(team.gathered(found, len(sized)))
    return next(one for one, lost in reversed(list(zip(sized, kl, strict=True))) if as_good(lost, min(kl)))


def _sized(
    layer: SourceLayer,
    own: Stream,
    reference: Stream,
    candidates: Sequence[Setting],
    how: Refinement,
    team: Team,
) -> tuple[Setting, Stream, dict[int, float], int]:
    """Ranks of one layer, tried; both texts are taken through it.

    Args:
        layer: The source's.
        own: Calibration text as it enters the layer.
        reference: Held-out text as it enters the layer.
        candidates: Equal shares.
        how: Steps of a trial.
        team: Processes that share candidates and ranks.

    Returns:
        The best equal share, the held-out text after one trial, the error at every rank, and that trial's rank.
    """
    spec = layer.spec
    assert spec is not None
    none, text, trial = replace(how, steps=0), own.clone(), reference.clone()
    observed = observe(layer, own, needs(candidates[0], spec), residual=len(own))
    layer.run(reference, use=Use.LEARNT)
    mine = [alone(layer, text, observed, setting, none).after for setting in team.mine(candidates)]
    wrong = dict(zip(candidates, team.gathered(mine, len(candidates)), strict=True))
    best = min(wrong, key=wrong.__getitem__)
    ranks = sorted({_rank(best, share, spec) for share in TRIED} | {best.kv_lora_rank})
    tried = {rank: alone(layer, text, observed, replace(best, kv_lora_rank=rank), how) for rank in team.mine(ranks)}
    after = team.gathered([made.after for made in tried.values()], len(ranks))
    error = dict(zip(ranks, after, strict=True))
    measure = partial(_closed_form, layer, text, observed, best)
    error = team.told(where_exact(error, measure, _rank(best, _LEAST, spec)))
    # Rounding says nothing of what an error costs.
    wrong_at = [rank for rank in ranks if rank <= best.kv_lora_rank and error[rank] > how.enough]
    test = max(wrong_at, default=ranks[0])
    made = team.of(ranks.index(test), tried[test].weights if test in tried else None, str(trial.hidden_NTD.device))
    layer.run(trial, LatentAttention.from_weights(made), use=Use.LEARNT)
    return best, trial, error, test


def _closed_form(layer: SourceLayer, text: Stream, observed: Observed, setting: Setting, rank: int) -> float:
    """The error of a layer in closed form at a rank; zero where it is only rounding."""
    setting = replace(setting, kv_lora_rank=rank)
    assert layer.weights is not None and layer.spec is not None
    if is_exact(layer, text, conversion(layer.weights, layer.spec, observed.stats, setting).weights):
        return 0.0
    return alone(layer, text, observed, setting, Refinement(steps=0)).after


def where_exact(error: dict[int, float], measure: Callable[[int], float], least: int) -> dict[int, float]:
    """Errors by rank, of a layer that becomes exact: with the least rank that loses nothing and others below it.

    Between a rank that loses something and one that does not, the logarithm of the error is not straight but falls to
    rounding at once. A layer that is given fewer values than that, as the line would have it, is no longer exact.

    Args:
        error: Errors of the ranks that were tried.
        measure: The error at any rank, zero where it is only rounding.
        least: The least rank that a layer may get.

    Returns:
        The same errors where none of them is rounding.
    """
    exact, wrong = max(error), least - 1
    if not error[exact] <= _MAY_BE_ROUNDING or measure(exact) > 0:
        return error
    found = {}
    while exact - wrong > 1:
        middle = (exact + wrong) // 2
        found[middle] = measure(middle)
        exact, wrong = (exact, middle) if found[middle] > 0 else (middle, wrong)
    return {rank: 0.0 if rank >= exact else at for rank, at in sorted({**found, exact: 0.0, **error}.items())}


def _rank(setting: Setting, share: float, spec: AttentionSpec) -> int:
    """This share of a setting's rank, as far as there is something to compress."""
    most = min(spec.cache_values - setting.qk_rope_head_dim, spec.hidden_size)
    return max(1, min(most, round(share * setting.kv_lora_rank)))


def price(measured: dict[int, float]) -> Callable[[int], float]:
    """KL by rank: its logarithm is straight between measured ranks and beyond them, never rises, and has a floor.

    Args:
        measured: KL of the ranks that were tried.
    """
    ranks = sorted(measured)
    logs, least = [], math.log(_DEAREST)
    for rank in ranks:
        cost = measured[rank]
        least = min(least, math.log(max(cost, _CHEAPEST))) if cost < _DEAREST else least
        logs.append(least)

    def at(rank: int) -> float:
        if len(ranks) == 1:
            return math.exp(logs[0])
        right = min(max(1, sum(r < rank for r in ranks)), len(ranks) - 1)
        (r0, r1), (l0, l1) = ranks[right - 1 : right + 1], logs[right - 1 : right + 1]
        line = l0 + (l1 - l0) * (rank - r0) / (r1 - r0)
        return math.exp(min(max(line, math.log(_CHEAPEST)), 2 * math.log(_DEAREST)))

    return at


def exchange(
    ranks: Sequence[int], prices: Sequence[Callable[[int], float]], bounds: Sequence[tuple[int, int]]
) -> list[int]:
    """Move ranks between layers, a few at a time, while that lowers the sum of the prices. The total stays.

    Args:
        ranks: Where to begin.
        prices: KL by rank, for each layer.
        bounds: The least and the most of each.
    """
    ranks = list(ranks)
    step = 1 << max(0, int(math.log2(min(ranks) / _FINENESS)))
    while True:
        layers = list(enumerate(zip(ranks, prices, bounds, strict=True)))
        gain = {i: at(r) - at(r + step) for i, (r, at, (_, most)) in layers if r + step <= most}
        loss = {j: at(r - step) - at(r) for j, (r, at, (least, _)) in layers if r - step >= least}
        moves = [(gain[i] - loss[j], i, j) for i in gain for j in loss if i != j]
        worth, to, by = max(moves, default=(0.0, 0, 0))
        total = sum(at(r) for _, (r, at, _) in layers)
        # What is not a number is no gain.
        if not worth > _WORTH * max(1.0, total):
            return ranks
        ranks[to] += step
        ranks[by] -= step
