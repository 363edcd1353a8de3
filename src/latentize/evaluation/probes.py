"""How much of a distant text reaches the prediction: of a model, and of what it was made from.

All-or-nothing says nothing of a small model: it seldom gets a whole answer right, and so does whatever was made of it.
Two graded numbers do. The *score* is the share of the answer's tokens that are the most likely one, given those before
them. The *gain* is how much more likely the answer is, in nats per token, than where the text lacks what it depends on:
0 if nothing of it arrives, and what the model knows of answers in general cancels. Models are compared example by
example, so that the error of what was lost is smaller than that of either gain.

N examples, T tokens of a context, V vocabulary.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from latentize.errors import OptionError
from latentize.evaluation.predict import Predict, longest_context, predictor
from latentize.evaluation.puzzles import PUZZLES, placed
from latentize.modeling.load import load_model
from latentize.progress import Progress, silent
from latentize.text.documents import Data
from latentize.text.drawing import draw_all
from latentize.text.tokenizer import load_tokenizer

__all__ = ["DEPTHS", "LENGTHS", "Answer", "Example", "answers", "examples", "probe", "summary"]

LENGTHS, DEPTHS = (512, 1024, 2048), (0.1, 0.5, 0.9)
# Tokens that go through a model at once.
_AT_ONCE = 4096


@dataclass(frozen=True)
class Example:
    """A puzzle in its text.

    Attributes:
        probe, length, depth: Which.
        tokens: The context, question and answer at its end.
        without: The same without what the answer depends on.
        answer: Tokens of the answer.
    """

    probe: str
    length: int
    depth: float
    tokens: list[int]
    without: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Answer:
    """What a model makes of an example.

    Attributes:
        score: Share of the answer's tokens that are the most likely ones.
        control: The same without what the answer depends on.
        gain: Nats per token of the answer, above those without it.
    """

    score: float
    control: float
    gain: float


def examples(tokenizer: Any, data: Data, *, lengths: Sequence[int], samples: int, seed: int = 0) -> list[Example]:
    """All puzzles at all lengths and depths, the same whenever tokenizer, text and seed are.

    Args:
        tokenizer: A transformers tokenizer.
        data: As for :func:`latentize.evaluation.quality.evaluate`.
        lengths: Tokens of the contexts.
        samples: Of each puzzle, length and depth.
        seed: Draws text, names, values and places.

    Raises:
        DataError: the text is shorter than a context, or a context than a puzzle.
    """

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    found = []
    for length in lengths:
        rows = draw_all(tokenizer, data, tokens=samples * length, sequence_length=length, seed=seed).tolist()
        for name, make in PUZZLES.items():
            for depth in DEPTHS:
                for n in range(samples):
                    draw = Random(f"{seed}, {name}, {length}, {depth}, {n}")
                    puzzle = make(draw, encode)
                    tokens, without = placed(puzzle, rows[n % len(rows)], depth, draw)
                    found.append(Example(name, length, depth, tokens, without, puzzle.answer))
    return found


@torch.no_grad()
def answers(predict: Predict, asked: Sequence[Example]) -> Iterator[Answer]:
    """What a model makes of examples of one length.

    Args:
        predict: The model.
        asked: Examples.
    """
    contexts_NT = torch.tensor([row for example in asked for row in (example.tokens, example.without)])
    count = max(len(example.answer) for example in asked)
    # The last token of the answer predicts nothing that is asked.
    log_p_NaV = predict(contexts_NT, count + 1)[:, :-1].float().log_softmax(-1).cpu()
    for example, (with_aV, without_aV) in zip(asked, log_p_NaV.unflatten(0, (-1, 2)), strict=True):
        answer_a = torch.tensor(example.answer)
        with_aV, without_aV = with_aV[-len(answer_a) :], without_aV[-len(answer_a) :]
        gain = with_aV.gather(1, answer_a[:, None]) - without_aV.gather(1, answer_a[:, None])
        yield Answer(
            score=float((with_aV.argmax(-1) == answer_a).double().mean()),
            control=float((without_aV.argmax(-1) == answer_a).double().mean()),
            gain=float(gain.double().mean()),
        )


def _all_answers(predict: Predict, asked: Sequence[Example], what: str, progress: Progress) -> list[Answer]:
    found: list[Answer] = []
    while len(found) < len(asked):
        length = asked[len(found)].length
        batch = asked[len(found) :][: max(1, _AT_ONCE // (2 * length))]
        found += answers(predict, [example for example in batch if example.length == length])
        progress(what, len(found), len(asked), f"{length} tokens")
    return found


def probe(
    model: Path,
    reference: Path | None = None,
    *,
    data: Data = (),
    lengths: Sequence[int] | None = None,
    samples: int = 4,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    cache: str | None = None,
    window: int | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Probe a model, and its source beside it.

    Args:
        model, reference: Folders; the tokenizer is the model's.
        lengths: Tokens of the contexts; by default those of ``LENGTHS`` that the model was made for.
        samples: Of each puzzle, length and depth.
        seed: Draws them.
        data, device, dtype, cache, window, progress: As for :func:`latentize.evaluation.quality.evaluate`.

    Returns:
        As :func:`summary`.

    Raises:
        OptionError: contexts that are longer than the model's, a cache or a window for a model without latents.
        DataError: the text, or a context, is too short.
    """
    loaded = load_model(model, dtype=dtype, device=device)
    longest = longest_context(loaded)
    lengths = lengths or [n for n in LENGTHS if n <= longest] or [longest]
    if max(lengths) > longest:
        raise OptionError(
            f"contexts of {max(lengths):,} tokens, the model was made for {longest:,}",
            where="--lengths",
            fix="leave out the longest",
        )
    asked = examples(load_tokenizer(model), data, lengths=lengths, samples=samples, seed=seed)
    found = _all_answers(predictor(loaded, cache=cache, window=window), asked, "probing", progress)
    del loaded
    expected = None
    if reference is not None:
        source = predictor(load_model(reference, dtype=dtype, device=device))
        expected = _all_answers(source, asked, "probing the source", progress)
    entries = {"lengths": list(lengths), "depths": list(DEPTHS), "samples": samples, "seed": seed}
    return {**entries, **summary(asked, found, expected)}


def summary(asked: Sequence[Example], found: Sequence[Answer], expected: Sequence[Answer] | None) -> dict[str, Any]:
    """Means and their standard errors.

    Returns:
        ``rows``, one for each puzzle and length, and ``cells``, one for each depth besides: ``probe, length, depth,
        examples, score, control, gain``, the reference's ``reference_score, reference_control, reference_gain``, and
        ``gain_lost``, the mean of the differences; each with ``_error``, and ``None`` where there is no reference.
    """
    groups: dict[tuple[str, int, float | None], list[int]] = {}
    for number, example in enumerate(asked):
        for depth in (None, example.depth):
            groups.setdefault((example.probe, example.length, depth), []).append(number)
    entries, order = [], list(PUZZLES)
    for (name, length, depth), members in sorted(groups.items(), key=lambda g: (order.index(g[0][0]), g[0][1])):
        entry: dict[str, Any] = {"probe": name, "length": length, "depth": depth, "examples": len(members)}
        depths = [asked[n].depth for n in members]
        for prefix, given in (("", found), ("reference_", expected)):
            for what in ("score", "control", "gain"):
                values = None if given is None else [getattr(given[n], what) for n in members]
                entry |= _mean(prefix + what, values, depths)
        lost = None if expected is None else [expected[n].gain - found[n].gain for n in members]
        entries.append(entry | _mean("gain_lost", lost, depths))
    return {
        "rows": [entry for entry in entries if entry["depth"] is None],
        "cells": [entry for entry in entries if entry["depth"] is not None],
    }


def _mean(name: str, values: Sequence[float] | None, depths: Sequence[float]) -> dict[str, float | None]:
    """Depths are chosen, not drawn: what lies between them is no error of the mean."""
    if values is None:
        return {name: None, f"{name}_error": None}
    strata = [[v for v, d in zip(values, depths, strict=True) if d == depth] for depth in set(depths)]
    error = None
    if all(len(stratum) > 1 for stratum in strata):
        error = math.sqrt(sum(len(stratum) * statistics.variance(stratum) for stratum in strata)) / len(values)
    return {name: statistics.fmean(values), f"{name}_error": error}
