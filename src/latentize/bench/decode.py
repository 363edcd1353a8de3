"""Prefill and decode of several models, interleaved, against what the memory could deliver.

A decode step reads all weights once and the whole cache once. The bytes of both, over the bandwidth that a plain copy
reaches on the same machine, are the least time that it could take (the roofline); the share is that over what it took.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from latentize.machine import multiplies_bfloat16, peak_rss_bytes
from latentize.progress import Progress, silent
from latentize.runtime.generate import cache_bytes

__all__ = ["Measurement", "Subject", "copy_bandwidth", "measure", "product_rate"]

# Prompt tokens that go through a model at once.
_PREFILL = 2048
# Of a prompt that is not timed, and decode steps that are not.
_FIRST, _WARMUP = 32, 2
_COPIED = 1 << 28


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Attributes:
        name: For the table.
        model: Loaded.
        new_cache: Makes the cache that it runs with.
    """

    name: str
    model: Any
    new_cache: Callable[[], Any]


@dataclass(frozen=True)
class Measurement:
    """One model at one context and batch.

    Attributes:
        name, context, batch: What.
        prefill_tokens_per_second: Over the whole prompt.
        decode_tokens_per_second: All sequences of the batch together, median step.
        milliseconds_per_token: Median decode step.
        cache_bytes: Of the tensors that the cache holds after the prompt.
        weight_bytes: That a step reads: all parameters but the input embedding.
        roofline_share: Least time over measured time of a decode step.
        peak_rss_bytes: Of the process so far.
    """

    name: str
    context: int
    batch: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    milliseconds_per_token: float
    cache_bytes: int
    weight_bytes: int
    roofline_share: float
    peak_rss_bytes: int

    def describe(self) -> dict[str, Any]:
        return asdict(self)


def copy_bandwidth(device: str = "cpu") -> float:
    """Bytes a second, read and written, of the best of some large copies."""
    source, target = (torch.zeros(_COPIED, dtype=torch.uint8, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        target.copy_(source)
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * _COPIED / best


def product_rate(device: str = "cpu") -> float:
    """Floating-point operations a second of the best of some products of 1,024² matrices, in bfloat16 where the
    machine multiplies that."""
    dtype = torch.bfloat16 if multiplies_bfloat16(torch.device(device).type) else torch.float32
    a, b = (torch.ones(1024, 1024, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        torch.mm(a, b)
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * 1024**3 / best


def _wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def _weight_bytes(model: Any) -> int:
    """A row of the input embedding is read, not the table; but a tied one is the output's table."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    if head is not None and head.weight is embedding.weight:
        return total
    return total - embedding.weight.numel() * embedding.weight.element_size()


@torch.no_grad()
def measure(
    subjects: Sequence[Subject],
    *,
    context: int,
    batch: int = 1,
    steps: int = 16,
    bandwidth: float | None = None,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress = silent,
) -> list[Measurement]:
    """Measure models that share a vocabulary on the same random tokens; each decode step in turn.

    Args:
        subjects: Models.
        context: Tokens of the prompt.
        batch: Sequences.
        steps: Decode steps that are timed, for each.
        bandwidth: Bytes a second; measured when not given.
        device: Where the models are.
        seed: Of the tokens.
        progress: Told after each prompt, and each step.
    """
    bandwidth = bandwidth or copy_bandwidth(device)
    generator = torch.Generator().manual_seed(seed)
    vocab = min(s.model.get_input_embeddings().weight.shape[0] for s in subjects)
    tokens = torch.randint(0, vocab, (batch, context + _WARMUP + steps), generator=generator).to(device)
    caches, prefill, sizes = [], [], []
    for number, subject in enumerate(subjects):
        # Whatever is made on first use is not the prompt's fault; a cache of codes stores nothing of a shorter one.
        _step(subject.model, tokens[:, : min(context, _FIRST)], subject.new_cache())
        cache = subject.new_cache()
        started = time.perf_counter()
        for part in tokens[:, :context].split(_PREFILL, dim=1):
            _step(subject.model, part, cache)
        _wait(device)
        prefill.append(time.perf_counter() - started)
        caches.append(cache)
        sizes.append(cache_bytes(cache))
        progress(f"prompts of {context}", number + 1, len(subjects), subject.name)
    took: list[list[float]] = [[] for _ in subjects]
    for step in range(_WARMUP + steps):
        token = tokens[:, context + step : context + step + 1]
        for subject, cache, times in zip(subjects, caches, took, strict=True):
            started = time.perf_counter()
            _step(subject.model, token, cache)
            _wait(device)
            times.append(time.perf_counter() - started)
        progress(f"decoding at {context}", step + 1, _WARMUP + steps)
    rows = []
    for subject, first, times, size in zip(subjects, prefill, took, sizes, strict=True):
        step_time, weights = statistics.median(times[_WARMUP:]), _weight_bytes(subject.model)
        rows.append(
            Measurement(
                name=subject.name,
                context=context,
                batch=batch,
                prefill_tokens_per_second=batch * context / first,
                decode_tokens_per_second=batch / step_time,
                milliseconds_per_token=1e3 * step_time,
                cache_bytes=size,
                weight_bytes=weights,
                roofline_share=(weights + size) / bandwidth / step_time,
                peak_rss_bytes=peak_rss_bytes(),
            )
        )
    return rows


def _step(model: Any, ids: Tensor, cache: Any) -> None:
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
