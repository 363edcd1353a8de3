"""Arithmetic before doing anything: what the KV cache weighs, and what it would weigh.

No torch, no weights: a ``config.json`` is enough.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from latentize.attention.spec import kv_cache_bytes
from latentize.families import LatentModel, ModelSpec

__all__ = ["STANDARD", "CacheSize", "as_json", "kept_bytes", "plan", "plan_latent", "rank_bytes"]

GIB = 1 << 30
# Sizes that every engine's MLA kernels are made for (DeepSeek-V2 and V3).
STANDARD = (512, 64)


@dataclass(frozen=True)
class CacheSize:
    """A way to keep the context.

    Attributes:
        name: What it is.
        values_per_token_layer: Cached numbers per token and layer.
        bits: Of each.
        tokens: Tokens that are kept; a window keeps fewer than the context.
        cache_bytes: For all layers and the whole batch.
        ratio: The source's bytes over these.
        note: What to know about it.
        kept_bytes: Those among them of layers that stay as they are, or of an index.
        kv_heads: Key/value heads, where there are such.
        latent: ``(kv_lora_rank, qk_rope_head_dim)``, where there is one.
    """

    name: str
    values_per_token_layer: int
    bits: float
    tokens: int
    cache_bytes: int
    ratio: float
    note: str = ""
    kept_bytes: int = 0
    kv_heads: int | None = None
    latent: tuple[int, int] | None = None


def kept_bytes(model: ModelSpec, *, tokens: int, batch: int = 1, bits: float = 16) -> int:
    """Bytes that layers with a sliding window cache, which stay as they are; states of convolutions are not counted."""
    if model.window is None:
        return 0
    return kv_cache_bytes(
        model.kept_values, layers=model.sliding, tokens=min(tokens, model.window), batch=batch, bits=bits
    )


def plan(
    model: ModelSpec,
    *,
    context: int,
    batch: int = 1,
    keep: float = 0.25,
    window: int = 4096,
    coded: float | None = None,
) -> list[CacheSize]:
    """Bytes of the KV cache under every mechanism.

    The latent is counted once: it serves keys and values.

    Args:
        model: The source.
        context: Tokens of context.
        batch: Sequences at a time.
        keep: The budget of the MLA row, a share of the source's values.
        window: Tokens that the sliding-window row keeps.
        coded: Bytes of a row of ``--bytes``, a share of the source's.
    """
    a = model.attention
    layers = len(model.converted)
    source = kv_cache_bytes(a.cache_values, layers=layers, tokens=context, batch=batch)
    source += kept_bytes(model, tokens=context, batch=batch)
    rows: list[CacheSize] = []

    def add(name: str, values: int, *, bits: float = 16, tokens: int = context, **more: Any) -> None:
        size = kv_cache_bytes(values, layers=layers, tokens=tokens, batch=batch, bits=bits)
        kept = kept_bytes(model, tokens=tokens, batch=batch, bits=16 if "latent" in more else bits)
        rows.append(CacheSize(name, values, bits, tokens, size + kept, source / (size + kept), kept_bytes=kept, **more))

    def heads(name: str, count: int, **more: Any) -> None:
        add(name, 2 * count * a.head_dim, kv_heads=count, **more)

    heads(f"{a.kind} (the model as it is)", a.num_kv_heads)
    if a.num_kv_heads < a.num_heads:
        heads("MHA, for comparison", a.num_heads, note="a key and a value for every query head")
    for pooled in sorted((g for g in range(2, a.num_kv_heads) if a.num_kv_heads % g == 0), reverse=True):
        heads(f"GQA {pooled}", pooled, note="heads pooled; needs training to recover")
    if a.num_kv_heads > 1:
        heads("MQA", 1, note="heads pooled; needs training to recover")
    if window < context:
        heads(f"window {window}", a.num_kv_heads, tokens=window, note="forgets what is further back")
    # 32 numbers share a 16-bit scale and a 16-bit offset.
    for bits in (8, 4):
        note = "with scale and offset for each 32 values"
        heads(f"{a.kind} int{bits}", a.num_kv_heads, bits=bits + 1, note=note)
    if coded is not None:
        note = "all values, each in as many bits as it is worth; scales and exact tokens are counted"
        heads(f"coded, --bytes {100 * coded:.4g}%", a.num_kv_heads, bits=16 * coded, note=note)
    budget = max(1, int(keep * a.cache_values + 1e-9))
    add(f"MLA, --keep {100 * keep:.4g}%", budget, latent=_split(budget, a.head_dim))
    if sum(STANDARD) < a.cache_values:
        add("MLA 512+64", sum(STANDARD), latent=STANDARD, note="the one shape with fast kernels in every engine")
    return rows


def plan_latent(
    model: LatentModel, *, context: int, batch: int = 1, keep: float = 0.25, window: int = 4096
) -> list[CacheSize]:
    """The same for a model that has latent attention as it comes.

    Args:
        model: The source.
        context: Tokens of context.
        batch: Sequences at a time.
        keep: The budget of a row with a lower rank, a share of the source's values.
        window: Tokens that the sliding-window row keeps.
    """
    a = model.attention

    def index_bytes(tokens: int) -> int:
        return kv_cache_bytes(model.index_values, layers=1, tokens=tokens, batch=batch)

    source = kv_cache_bytes(model.cache_values, layers=model.attending, tokens=context, batch=batch)
    source += index_bytes(context)

    def row(name: str, rank: int | None, *, tokens: int = context, note: str = "") -> CacheSize:
        values = model.expanded_values if rank is None else rank + a.qk_rope_head_dim
        kept = index_bytes(tokens)
        size = kv_cache_bytes(values, layers=model.attending, tokens=tokens, batch=batch) + kept
        shape: dict[str, Any] = {"kv_heads": a.num_heads} if rank is None else {"latent": (rank, a.qk_rope_head_dim)}
        return CacheSize(name, values, 16, tokens, size, source / size, note, kept_bytes=kept, **shape)

    rows = [
        row("MLA (the model as it is)", a.kv_lora_rank),
        row("MHA, for comparison", None, note="the same model where keys and values of every head are cached"),
    ]
    if window < context:
        rows.append(row(f"window {window}", a.kv_lora_rank, tokens=window, note="forgets what is further back"))
    if a.kv_lora_rank > 1:
        rows.append(row(f"MLA, half the rank: {a.kv_lora_rank // 2}", a.kv_lora_rank // 2))
    rank = model.rank_within(keep)
    if rank >= 1:
        rows.append(row(f"MLA, --keep {100 * keep:.4g}%", rank))
    return rows


def rank_bytes(row: CacheSize, ranks: int, kv_heads: int) -> int:
    """Bytes that each of some ranks of tensor parallelism holds: its share of the heads, one at least, and all of a
    latent, as engines have it (``engines/contract_tables``).

    Args:
        row: The whole cache.
        ranks: How many share the query heads.
        kv_heads: Of the layers that stay as they are.
    """

    def share(size: int, heads: int | None) -> int:
        return size if heads is None else size * max(1, math.ceil(heads / ranks)) // heads

    return share(row.cache_bytes - row.kept_bytes, row.kv_heads) + share(row.kept_bytes, kv_heads)


def _split(budget: int, head_dim: int) -> tuple[int, int]:
    """A latent and a roped key of an eighth of the budget, the least that the calibrated method tries."""
    rope = min(2 * round(budget / 16), head_dim)
    return budget - rope, rope


def as_json(rows: list[CacheSize]) -> list[dict[str, Any]]:
    """Rows as plain values, with GiB beside bytes."""
    return [{**_plain(row), "gib": round(row.cache_bytes / GIB, 4)} for row in rows]


def _plain(row: CacheSize) -> dict[str, Any]:
    return {name: value for name, value in asdict(row).items() if name not in ("kv_heads", "latent", "kept_bytes")}
