"""What a machine holds of a model, and how fast it could decode at best.

A decode step reads every weight but the input embedding once, and the cache once; with the bandwidth of the memory
that gives the least time of a step (the roofline). Where the arithmetic of the machine is known, the time that it
takes is the least, if that is longer. A prediction is a bound, not a measurement: ``latentize bench`` measures.

Of latent attention everything is counted as the portable format stores it: a query has an un-roped part of a whole head
beside its roped one, up-projections are those of all query heads and are read at each step (absorbed decode), the
output head is not tied; a model that has it as it comes is counted as it is stored. Its cache is counted once, for keys
and values together. Of mixtures of experts a step reads what some sequence of the batch is sent to, where all experts
are as likely.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from latentize.attention.spec import kv_cache_bytes
from latentize.families import LatentModel, ModelSpec
from latentize.formats.portable import model_reasons
from latentize.planning.cache_sizes import STANDARD, CacheSize, as_json, kept_bytes
from latentize.planning.devices import Machine

__all__ = ["Capacity", "capacities", "describe", "with_small_caches"]


@dataclass(frozen=True)
class Capacity:
    """A way to keep the context, on a machine.

    Attributes:
        weight_bytes: Of the whole model with this attention.
        step_bytes: What a decode step reads at the given context and batch.
        fits: Whether weights and cache do, at the given context and batch.
        max_context: Tokens that fit at the given batch; ``None``: any number, as nothing grows. What the model was
            trained for is another question.
        max_batch: Sequences that fit at the given context.
        tokens_per_second: At most, of all sequences together; ``None`` where it does not fit.
        bound: ``memory`` or ``arithmetic``: what that is bound by.
        speedup: Over the model as it is, at the same context and batch; ``None`` where either does not fit.
        max_batch_tokens_per_second: At most, with as many sequences as fit.
        max_batch_bound: What that is bound by.
        max_batch_speedup: Over the model as it is with as many as fit of that.
        break_even_context: Tokens from which a step reads less than one of the model as it is, at the given batch; 0:
            always; ``None``: never, or it is the model as it is.
        kernels: What runs it.
    """

    weight_bytes: int
    step_bytes: int
    fits: bool | None = None
    max_context: int | None = None
    max_batch: int | None = None
    tokens_per_second: float | None = None
    bound: str | None = None
    speedup: float | None = None
    max_batch_tokens_per_second: float | None = None
    max_batch_bound: str | None = None
    max_batch_speedup: float | None = None
    break_even_context: int | None = None
    kernels: str = ""


@dataclass(frozen=True)
class _Load:
    """What a mechanism asks of a machine.

    Attributes:
        stored: Bytes of all weights.
        read: Bytes of those that any step reads.
        routed: Bytes of the experts that tokens choose from.
        chosen: The share of them that a token is sent to.
        weight_flops: Of a step for each sequence.
        cache_bytes: Of a cached token, all layers that are converted.
        kept, kept_window: Of a cached token in those that stay as they are, or in an index, and how many these keep.
        cache_flops: Of attending to it.
        window: Tokens that are kept at most.
        attended: Tokens that a step attends to at most, where an index chooses them.
    """

    stored: int
    read: int
    weight_flops: float
    cache_bytes: float
    cache_flops: float
    window: float = math.inf
    routed: int = 0
    chosen: float = 0.0
    kept: float = 0.0
    kept_window: float = 0
    attended: float = math.inf

    def weights(self, batch: int) -> float:
        """Bytes of the weights that a step reads: of experts those that any sequence is sent to, if all are alike."""
        return self.read + self.routed * (1 - (1 - self.chosen) ** batch)

    def cache(self, context: int, batch: int) -> float:
        """Bytes that are held."""
        return self._cached(min(context, self.window), context, batch)

    def step(self, context: int, batch: int) -> float:
        """Bytes that a step reads, weights and cache."""
        seen = min(context, self.window, self.attended)
        return self.weights(batch) + self._cached(seen, context, batch)

    def _cached(self, tokens: float, context: int, batch: int) -> float:
        return (self.cache_bytes * tokens + self.kept * min(context, self.kept_window)) * batch

    def seconds(self, machine: Machine, context: int, batch: int) -> tuple[float, str]:
        """The least time of a decode step, and what it is spent on."""
        assert machine.bytes_per_second is not None
        memory = self.step(context, batch) / machine.bytes_per_second
        flops = batch * (self.weight_flops + self.cache_flops * min(context, self.window, self.attended))
        arithmetic = flops / machine.flops_per_second if machine.flops_per_second else 0.0
        return max((memory, "memory"), (arithmetic, "arithmetic"))


def _attention_parameters(model: ModelSpec, row: CacheSize) -> int:
    """Of one layer, biases and norms of the source included only where the source's attention stays."""
    a = model.attention
    # They stay in any case.
    more = a.gated * a.num_heads * a.head_dim * a.hidden_size + a.sinks * a.num_heads
    if row.latent is None:
        assert row.kv_heads is not None
        sizes = (a.num_heads + row.kv_heads) * a.head_dim
        biases = (sizes + row.kv_heads * a.head_dim) * a.qkv_bias + a.hidden_size * a.o_bias
        norms = (sizes if a.qk_norm_across else 2 * a.head_dim) * a.qk_norm
        # One projection may make both keys and values.
        once = row.kv_heads * a.head_dim * a.hidden_size * a.v_norm
        return 2 * sizes * a.hidden_size - once + biases + norms + more
    rank, rope = row.latent
    query = a.num_heads * (a.head_dim + rope) * a.hidden_size
    down, up = (rank + rope) * a.hidden_size + rank, rank * a.num_heads * 2 * a.head_dim
    return query + down + up + a.num_heads * a.head_dim * a.hidden_size + more


def _latent_load(model: LatentModel, row: CacheSize, context: int, weight_bits: float) -> _Load:
    """Of a model that has latent attention as it comes, with whatever rank a row has."""
    a, e = model.attention, model.experts
    if row.latent is None:
        per_token = 2 * a.num_heads * (a.qk_head_dim + a.v_head_dim)
    else:
        model = model.with_rank(row.latent[0])
        per_token = 2 * a.num_heads * (2 * row.latent[0] + row.latent[1])
    always = model.attention_parameters + model.other_parameters
    always -= 0 if model.tied else model.vocab_size * a.hidden_size
    chosen = 0.0 if e is None else min(1.0, e.per_token / e.routed)
    return _Load(
        stored=round(model.parameters * weight_bits / 8),
        read=round(always * weight_bits / 8),
        routed=round(model.routed_parameters * weight_bits / 8),
        chosen=chosen,
        weight_flops=2.0 * (always + chosen * model.routed_parameters),
        cache_bytes=kv_cache_bytes(row.values_per_token_layer, layers=model.attending, tokens=1, bits=row.bits),
        cache_flops=float(per_token * model.attending),
        window=(window := row.tokens if row.tokens < context else math.inf),
        kept=kv_cache_bytes(model.index_values, layers=1, tokens=1),
        kept_window=window,
        attended=math.inf if model.indexer is None else model.indexer.chosen,
    )


def _load(model: ModelSpec | LatentModel, row: CacheSize, context: int, weight_bits: float) -> _Load:
    if isinstance(model, LatentModel):
        return _latent_load(model, row, context, weight_bits)
    a, embedding = model.attention, model.vocab_size * model.attention.hidden_size
    converted = tuple(f"{model.layer_prefix(layer)}{model.module('attention')}." for layer in model.converted)
    sizes = {n: math.prod(shape) for n, shape in model.tensor_shapes().items() if not n.startswith(converted)}
    routed = sum(size for name, size in sizes.items() if ".experts." in name)
    total = sum(sizes.values()) + len(converted) * _attention_parameters(model, row)
    # The portable format unties the output head, the native one does not. A tied embedding is read, as the head.
    tied = model.tied and (row.latent is None or bool(model_reasons(model)))
    total += embedding * (model.tied and not tied)
    read = total - routed - embedding * (not tied)
    if row.latent is None:
        per_token = 4 * a.num_heads * a.head_dim
    else:
        per_token = 2 * a.num_heads * (2 * row.latent[0] + row.latent[1])
    return _Load(
        stored=round(total * weight_bits / 8),
        read=round(read * weight_bits / 8),
        routed=round(routed * weight_bits / 8),
        chosen=model.active_experts,
        weight_flops=2.0 * (read + model.active_experts * routed),
        cache_bytes=kv_cache_bytes(row.values_per_token_layer, layers=len(converted), tokens=1, bits=row.bits),
        cache_flops=float(per_token * len(converted)),
        window=row.tokens if row.tokens < context else math.inf,
        kept=kept_bytes(model, tokens=1, bits=row.bits if row.latent is None else 16),
        kept_window=model.window or 0,
    )


def with_small_caches(rows: Sequence[CacheSize]) -> list[CacheSize]:
    """The rows, and after each latent one that with 8 bits, and with 4 and roped keys in 8, as :class:`LatentCache`
    stores them: a scale of 16 bits for either part."""
    found = []
    for row in rows:
        found.append(row)
        if row.latent is None:
            continue
        for name, bits in (("int8", 8), ("int4+int8", 4)):
            mean = (bits * row.latent[0] + 8 * row.latent[1] + 32) / sum(row.latent)
            size = round((row.cache_bytes - row.kept_bytes) * mean / row.bits) + row.kept_bytes
            note = "latentize.LatentCache, inside transformers; engines do not read it"
            small = {"cache_bytes": size, "ratio": row.ratio * row.cache_bytes / size, "note": note}
            found.append(replace(row, name=f"{row.name}, {name}", bits=mean, **small))
    return found


def capacities(
    model: ModelSpec | LatentModel, rows: Sequence[CacheSize], machine: Machine, *, context: int, batch: int = 1
) -> list[Capacity]:
    """What every row of a plan means on a machine; the first row is the model as it is.

    Args:
        model: The source.
        rows: Of :func:`latentize.planning.cache_sizes.plan` at the same context and batch.
        machine: Where.
        context: Tokens of each sequence.
        batch: Sequences at a time.
    """
    loads = [_load(model, row, context, machine.weight_bits) for row in rows]
    found: list[Capacity] = []
    for row, load in zip(rows, loads, strict=True):
        c = _fitting(load, machine, context, batch)
        if found:
            c = replace(c, break_even_context=_break_even(load, loads[0], batch))
        if machine.bytes_per_second is not None:
            c = _timed(c, load, machine, context, batch)
            source = found[0] if found else c
            speedup = _over(c.tokens_per_second, source.tokens_per_second)
            full = _over(c.max_batch_tokens_per_second, source.max_batch_tokens_per_second)
            c = replace(c, speedup=speedup, max_batch_speedup=full)
        found.append(replace(c, kernels=_kernels(row)))
    return found


def _fitting(load: _Load, machine: Machine, context: int, batch: int) -> Capacity:
    step = round(load.step(context, batch))
    if machine.memory_bytes is None:
        return Capacity(load.stored, step)
    free = machine.memory_bytes * (1 - machine.reserve) - load.stored
    sequences = max(0, math.floor(free / load.cache(context, 1)))
    # Layers with a window take what they take; the rest is for those that grow.
    windows = math.isfinite(load.kept_window)
    growing = free - (load.kept * load.kept_window * batch if windows else 0)
    longest = max(0, math.floor(growing / ((load.cache_bytes + (0 if windows else load.kept)) * batch)))
    grows = longest < load.window
    return Capacity(load.stored, step, batch <= sequences, longest if grows else None, sequences)


def _timed(c: Capacity, load: _Load, machine: Machine, context: int, batch: int) -> Capacity:
    """How fast that is, where it fits or nobody asked."""
    if c.fits is not False:
        seconds, bound = load.seconds(machine, context, batch)
        c = replace(c, tokens_per_second=batch / seconds, bound=bound)
    if c.max_batch:
        seconds, bound = load.seconds(machine, context, c.max_batch)
        c = replace(c, max_batch_tokens_per_second=c.max_batch / seconds, max_batch_bound=bound)
    return c


def _over(rate: float | None, base: float | None) -> float | None:
    return None if rate is None or base is None else rate / base


def _break_even(load: _Load, source: _Load, batch: int) -> int | None:
    """Tokens of context where both read as many bytes a step."""
    if load.window < math.inf:
        return int(load.window)
    more, fewer = load.read - source.read, (source.cache_bytes - load.cache_bytes) * batch
    tokens = max(0, math.ceil(more / fewer)) if fewer > 0 else None
    return tokens if tokens is not None and tokens <= load.attended else None


def _kernels(row: CacheSize) -> str:
    if row.latent is None:
        return ""
    if row.bits != 16:
        return row.note
    if row.latent == STANDARD:
        return "the shape that FlashMLA, FlashInfer, TensorRT-LLM and vLLM's CPU backend have fast kernels for"
    return (
        "not the shape of the fast kernels (512+64): vLLM serves it by Triton MLA, in bf16 or fp16; "
        "latentize.accelerate does inside transformers"
    )


def describe(machine: Machine, rows: Sequence[CacheSize], found: Sequence[Capacity]) -> dict[str, Any]:
    """The keys that a machine adds to what ``latentize plan --json`` prints."""
    joined = [{**row, **asdict(c)} for row, c in zip(as_json(list(rows)), found, strict=True)]
    return {"machine": asdict(machine), "rows": joined}
