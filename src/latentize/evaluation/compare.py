"""Several models beside the one that they were made from: what each loses, for how many bytes of cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from latentize.evaluation.detail import Evaluation
from latentize.evaluation.grouped import SINKS, grouped_predictor
from latentize.evaluation.predict import Predict, predictor
from latentize.evaluation.quality import measure
from latentize.evaluation.quantized import quantized
from latentize.modeling.attention import LatentAttention
from latentize.modeling.load import load_model
from latentize.processes import ALONE, Team
from latentize.progress import Progress, silent
from latentize.runtime.accelerate import has_latents
from latentize.runtime.cache import cache_formats
from latentize.runtime.codecs import codec
from latentize.text.documents import Data
from latentize.text.drawing import draw_all
from latentize.text.tokenizer import load_tokenizer

__all__ = ["Compared", "compare", "marked"]

# Cache format and window.
Variant = tuple[str | None, int | None]

SOURCE = "the source"


@dataclass(frozen=True)
class Compared:
    """A model with a cache.

    Attributes:
        name: Of both.
        model: Where it lies.
        cache: Format; ``None`` is 16 bits.
        window: Tokens that are seen, beside the first four.
        cache_bytes_per_token: Of all layers, at the end of a sequence of the measured length, over its tokens.
        perplexity, excess_loss, kl, top1_agreement: As in ``latentize eval``.
        dominated_by: Another that loses no more for no more bytes; ``None`` where there is none.
    """

    name: str
    model: str
    cache: str | None
    window: int | None
    cache_bytes_per_token: float
    perplexity: float = 0.0
    excess_loss: float = 0.0
    kl: float = 0.0
    top1_agreement: float = 1.0
    dominated_by: str | None = None

    def measured(self, found: Evaluation) -> Compared:
        entries = found.describe()
        return replace(self, **{k: entries[k] for k in ("perplexity", "excess_loss", "kl", "top1_agreement")})


def marked(rows: Sequence[Compared]) -> list[Compared]:
    """The rows, each with the first that is no worse in bytes and in loss, and better in one of them."""

    def beats(a: Compared, b: Compared) -> bool:
        ours, theirs = ((r.cache_bytes_per_token, r.excess_loss) for r in (a, b))
        return ours != theirs and ours[0] <= theirs[0] and ours[1] <= theirs[1]

    return [replace(r, dominated_by=next((o.name for o in rows if beats(o, r)), None)) for r in rows]


def _cached_parts(model: Any) -> list[tuple[int, int]]:
    """Values that a token has in each of the two tensors of each layer's cache."""
    tokens = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    with torch.no_grad():
        cache = model(input_ids=tokens, use_cache=True).past_key_values
    return [(layer.keys[0, :, 0].numel(), layer.values[0, :, 0].numel()) for layer in cache.layers]


def _row_bytes(parts: Sequence[tuple[int, int]], cache: str | None, *, latents: bool) -> int:
    """Bytes of a token in all layers, scales included; keys and values are coded alike, roped keys with more bits."""
    formats = {"latent": "bf16", "rope": "bf16", **cache_formats(cache)}
    names = (formats["latent"], formats["rope" if latents else "latent"])
    stored = [
        tensor
        for sizes in parts
        for name, size in zip(names, sizes, strict=True)
        for tensor in codec(name, size).encode(torch.zeros(1, 1, size))
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in stored)


def _coded_bytes(model: Any, parts: Sequence[tuple[int, int]], length: int) -> float | None:
    """Bytes of a token in all layers, on average over a text, where the model's rows have codes of their own."""
    codes = {m.layer_idx: m.code() for m in model.modules() if isinstance(m, LatentAttention) and m.row_code}
    if not codes:
        return None
    total = 0.0
    for index, sizes in enumerate(parts):
        plain, code = 2 * sum(sizes), codes.get(index)
        exact = length if code is None else min(code.sinks + code.newest, length)
        total += plain * exact + (0 if code is None else code.row_bytes * (length - exact))
    return total / length


def _rows_of(
    name: str, path: str, model: Any, variants: Sequence[Variant], length: int
) -> tuple[list[Compared], list[Predict]]:
    """Rows of a model that are still to be measured, and how."""
    parts, latents, rows, predicts = _cached_parts(model), has_latents(model), [], []
    make = predictor if latents else grouped_predictor
    coded = _coded_bytes(model, parts, length)
    for cache, size in variants:
        stored = coded if cache is None and coded is not None else _row_bytes(parts, cache, latents=latents)
        kept = 1.0 if size is None else min(1.0, (size + SINKS) / length)
        full = name + (f", {cache}" if cache else "") + (f", window {size}" if size else "")
        rows.append(Compared(full, path, cache, size, kept * stored))
        predicts.append(make(model, cache=cache, window=size))
    return rows, predicts


def _quantized_rows(path: str, model: Any, caches: Sequence[str]) -> tuple[list[Compared], list[Predict], list[str]]:
    """The source with transformers' own quantised caches, where it can have them."""
    parts, notes = _cached_parts(model), []
    values = sum(map(sum, parts))
    rows, predicts = [], []
    for latent in dict.fromkeys(cache.split("+")[0] for cache in caches):
        found = quantized(model, latent, parts[0][0])
        if isinstance(found, str):
            notes.append(f"{SOURCE} with transformers' own {latent} is left out: {found}")
            continue
        rows.append(Compared(f"{SOURCE}, {found.name}", path, latent, None, values * found.bits / 8))
        predicts.append(found.predict)
    return rows, predicts, notes


def names_of(models: Sequence[str]) -> list[str]:
    """The last part of each path, or all of it where that does not tell them apart."""
    short = [Path(model).name or model for model in models]
    return [
        model if short.count(name) > 1 or name == SOURCE else name for name, model in zip(short, models, strict=True)
    ]


def compare(
    source: Path,
    models: dict[str, Path],
    *,
    caches: Sequence[str] = (),
    window: int | None = None,
    source_windows: Sequence[int] = (),
    data: Data = (),
    tokens: int = 32_768,
    sequence_length: int = 512,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress = silent,
    team: Team = ALONE,
) -> tuple[list[Compared], list[str], int]:
    """Measure models, with caches, against the one that they were made from, on the same held-out tokens.

    One model at a time is in memory beside the source.

    Args:
        source: Folder of the source.
        models: Folders by name.
        caches: ``LATENT[+ROPE]``: each model also with these.
        window: Each also with so many tokens, and the first four.
        source_windows: The source also with so many, in 16 bits.
        data, tokens, sequence_length, device, dtype, progress, team: As for
            :func:`latentize.evaluation.quality.evaluate`.

    Returns:
        Rows, the source's first; what could not be measured, in sentences; and how many predictions were.

    Raises:
        OptionError: an unknown cache format.
        DataError: a model has another vocabulary, or the text is too short.
        CheckpointError: a model cannot be loaded.
    """
    for cache in caches:
        cache_formats(cache)
    tokens_NT = draw_all(load_tokenizer(source), data, tokens=tokens, sequence_length=sequence_length)
    length = tokens_NT.shape[1]
    reference = load_model(source, dtype=dtype, device=device)
    expected = predictor(reference)
    variants: list[Variant] = [(c, size) for size in ((None, window) if window else (None,)) for c in (None, *caches)]
    narrow: list[Variant] = [(None, size) for size in source_windows if size != window]
    rows, predicts = _rows_of(SOURCE, str(source), reference, [*variants, *narrow], length)
    more, how, notes = _quantized_rows(str(source), reference, caches)
    rows, predicts = rows + more, predicts + how
    options: dict[str, Any] = {"device": device, "progress": progress, "team": team}
    found = measure(predicts, expected, tokens_NT, what=f"measuring {SOURCE}", **options)
    done = [row.measured(evaluation) for row, evaluation in zip(rows, found, strict=True)]
    for name, path in models.items():
        model = load_model(path, dtype=dtype, device=device)
        rows, predicts = _rows_of(name, str(path), model, variants, length)
        found = measure(predicts, expected, tokens_NT, what=f"measuring {name}", **options)
        done += [row.measured(evaluation) for row, evaluation in zip(rows, found, strict=True)]
    return marked(done), notes, tokens_NT.numel() - len(tokens_NT)


def as_json(rows: Sequence[Compared]) -> list[dict[str, Any]]:
    """Rows as plain values, with the share of the source's bytes."""
    whole = rows[0].cache_bytes_per_token
    return [{**asdict(row), "cache_share": row.cache_bytes_per_token / whole} for row in rows]
