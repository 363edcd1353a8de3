"""Perplexity, and distance to the source, of a model as it lies on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from latentize.errors import DataError
from latentize.evaluation.detail import Evaluation
from latentize.evaluation.predict import Predict, predictor
from latentize.modeling.load import load_model
from latentize.processes import ALONE, Team
from latentize.progress import Progress, silent
from latentize.text.documents import Data, Split
from latentize.text.drawing import Part, draw, draw_all
from latentize.text.tokenizer import load_tokenizer

__all__ = ["evaluate", "measure"]

# Logits of this many tokens exist at once, for each of the two models.
_TOKENS_AT_ONCE = 2048


def evaluate(
    model: Path,
    reference: Path | None = None,
    *,
    data: Data = (),
    tokens: int = 32_768,
    sequence_length: int = 512,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    cache: str | None = None,
    window: int | None = None,
    split: Split | None = None,
    progress: Progress = silent,
    team: Team = ALONE,
) -> Evaluation:
    """Measure a model on held-out text.

    Args:
        model: Folder of the model.
        reference: Folder of the source, for KL and agreement.
        data: Text files or data sets, all of which is used; without any, the held-out part of the Python
            standard library's text, which no conversion looks at.
        tokens: How many.
        sequence_length: Context that predictions are made in.
        device: Where.
        dtype: Precision to run in.
        cache: ``LATENT[+ROPE]``: predict from a cache of these formats, as generation would.
        window: Predict from a cache of so many tokens, and the first four.
        split: Which part of ``data``; by default all of it.
        progress: Told after each batch.
        team: Processes that share the batches.

    Raises:
        OptionError: a cache format or a window for a model without latents.
        DataError: the two models do not share a vocabulary, or the text is too short.
        CheckpointError: a model cannot be loaded.
    """
    tokenizer = load_tokenizer(model)
    if split is None:
        rows = draw_all(tokenizer, data, tokens=tokens, sequence_length=sequence_length)
    else:
        (rows,) = draw(tokenizer, data, [Part(split, tokens)], sequence_length=sequence_length)
    subject = predictor(load_model(model, dtype=dtype, device=device), cache=cache, window=window)
    source = None if reference is None else predictor(load_model(reference, dtype=dtype, device=device))
    return measure([subject], source, rows, device=device, progress=progress, team=team)[0]


@torch.no_grad()
def measure(
    subjects: Sequence[Predict],
    source: Predict | None,
    tokens_NT: Tensor,
    *,
    device: str = "cpu",
    what: str = "evaluating",
    progress: Progress = silent,
    team: Team = ALONE,
) -> list[Evaluation]:
    """Measure predictions against one reference, which predicts once for all.

    Args:
        subjects: What is measured.
        source: The reference.
        tokens_NT: Sequences.
        device: Where the models are.
        what: The progress is of.
        progress: Told after each batch.
        team: Processes that share the batches; each gets what all have found.

    Raises:
        DataError: the models do not share a vocabulary.
    """
    totals = [Evaluation.empty(compared=source is not None) for _ in subjects]
    batches = team.mine(tokens_NT.split(max(1, _TOKENS_AT_ONCE // tokens_NT.shape[1])))
    for number, batch in enumerate(batches):
        batch = batch.to(device)
        expected = None if source is None else source(batch, 0)[:, :-1]
        for at, subject in enumerate(subjects):
            logits = subject(batch, 0)[:, :-1]
            if expected is not None and expected.shape != logits.shape:
                raise DataError(
                    f"the models have different vocabularies ({logits.shape[-1]} and {expected.shape[-1]})",
                    where="--reference",
                    fix="compare a converted model with the one that it was made from",
                )
            totals[at] = totals[at] + Evaluation.of(logits, expected, batch[:, 1:])
        progress(what, number + 1, len(batches))
    first, *others = team.gather(totals)
    for more in others:
        first = [total + one for total, one in zip(first, more, strict=True)]
    return first
