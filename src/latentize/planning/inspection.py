"""What can be said of a model without running it."""

from __future__ import annotations

import math
from typing import Any

from latentize.checkpoint import Checkpoint, open_checkpoint, resolve
from latentize.errors import LatentizeError, OptionError, UnsupportedModelError
from latentize.families import LatentModel, ModelSpec, is_latent, latent_model, model_spec
from latentize.families.described import described
from latentize.families.stored import match_tensors
from latentize.planning import cache_sizes as arithmetic
from latentize.planning import capacity
from latentize.planning.devices import Machine, machine_of
from latentize.planning.reading import read_spec
from latentize.planning.serving import planned_serving
from latentize.recipe import parse_keep

__all__ = ["inspect", "plan"]


def plan(
    model: str,
    *,
    context: int | None = None,
    batch: int = 1,
    keep: Any = "25%",
    bytes: Any = None,
    window: int = 4096,
    device: str | None = None,
    reserve: Any = "10%",
    tensor_parallel: int = 1,
    serve_on: str | None = None,
    processes: int = 1,
    **machine: Any,
) -> dict[str, Any]:
    """What ``latentize plan --json`` prints.

    Args:
        model: A folder, a ``config.json``, a GGUF file, a hub id, or the name of a shape that ships.
        context: Tokens of each sequence; by default what the model was made for.
        batch: Sequences at a time.
        keep: Share of the source's cached values that the latent row has.
        bytes: Share of the source's bytes that coded rows have; without it there is no such row.
        window: Tokens of the sliding-window row.
        device: A machine by name; ``cpu`` is this one, measured. With one, or with numbers of one, the rows say what
            fits and how fast it could be.
        reserve: Share of its memory that is for something else.
        tensor_parallel: Ranks that share the heads; with several, rows say what each of them holds (``rank_bytes``).
        serve_on: ``ENGINE`` or ``ENGINE@MACHINE``; with it ``serving`` has the sizes that a conversion for that engine
            would choose, and the backends that would run.
        machine: ``memory``, ``bandwidth``, ``tflops``, ``weight_bits`` of :func:`devices.machine_of`.

    With a machine whose arithmetic is known, ``conversion`` has the time and memory of converting the model, with
    ``--fast`` and by default.

    Raises:
        OptionError: ``keep`` or ``reserve`` is no share, or the machine is not possible; no such engine.
        CheckpointError, ConfigError, UnsupportedModelError: as for reading any model.
    """
    share = _share(keep, "--keep", "25% or 0.25", least=1e-9)
    spec = read_spec(model)
    tokens = context or spec.max_positions
    options: dict[str, Any] = {"context": tokens, "batch": batch, "keep": share, "window": window}
    if isinstance(spec, LatentModel):
        rows = capacity.with_small_caches(arithmetic.plan_latent(spec, **options))
    else:
        coded = None if bytes is None else _share(bytes, "--bytes", "12.5% or 0.125", least=1e-9)
        if coded is not None:
            spec.attention.require_codes()
        rows = arithmetic.plan(spec, **options, coded=coded)
    facts = {"model": described(spec), "context": tokens, "batch": batch}
    facts |= {"tensor_parallel": tensor_parallel} if tensor_parallel > 1 else {}
    if serve_on is not None:
        facts["serving"] = planned_serving(model, spec, share, serve_on, tensor_parallel)
    kv_heads = 1 if isinstance(spec, LatentModel) else spec.attention.num_kv_heads

    def on_a_rank(entries: list[dict[str, Any]], rows: list[arithmetic.CacheSize]) -> list[dict[str, Any]]:
        if tensor_parallel == 1:
            return entries
        sizes = (arithmetic.rank_bytes(row, tensor_parallel, kv_heads) for row in rows)
        return [{**entry, "rank_bytes": size} for entry, size in zip(entries, sizes, strict=True)]

    reserved = _share(reserve, "--reserve", "10% or 0.1", least=0.0)
    where = machine_of(_this_machine() if device == "cpu" else device, reserve=reserved, **machine)
    if where is None:
        return {**facts, "rows": on_a_rank(arithmetic.as_json(rows), rows)}
    if isinstance(spec, ModelSpec):
        rows = capacity.with_small_caches(rows)
    found = capacity.capacities(spec, rows, where, context=tokens, batch=batch)
    planned = {**facts, **capacity.describe(where, rows, found)}
    planned["rows"] = on_a_rank(planned["rows"], rows)
    if isinstance(spec, ModelSpec) and where.flops_per_second:
        planned["conversion"] = _conversions(spec, share, where, here=device == "cpu", processes=processes)
    return planned


def _conversions(spec: ModelSpec, keep: float, machine: Machine, *, here: bool, processes: int) -> list[dict[str, Any]]:
    """What converting takes, in closed form and by default; nothing where the model cannot be converted so."""
    from latentize.conversion.rates import rates_of
    from latentize.machine import multiplies_bfloat16
    from latentize.planning.forecast import forecast, published_rates
    from latentize.recipe import Recipe

    rates = rates_of(spec, "cpu") if here else published_rates(machine, processes)
    found = []
    for fast in (True, False):
        try:
            faster = not here or multiplies_bfloat16("cpu")
            made = forecast(spec, Recipe.build(keep=keep, fast=fast), rates, faster=faster, processes=processes)
        except LatentizeError:
            return []
        found.append({"fast": fast, **made.describe(), **({"processes": processes} if processes > 1 else {})})
    return found


def _share(value: Any, where: str, example: str, *, least: float) -> float:
    share = parse_keep(value)
    try:
        share = float(share)
    except (TypeError, ValueError):
        share = -1.0
    if not least <= share <= 1:
        raise OptionError(f"'{value}' is not a share", where=where, fix=f"give {example}")
    return share


def _this_machine() -> Machine:
    """Measured: its memory, a large copy, a product of bfloat16 matrices."""
    import psutil

    from latentize.bench.decode import copy_bandwidth, product_rate

    return Machine(
        "this machine", psutil.virtual_memory().total, copy_bandwidth(), product_rate(), "measured here, now"
    )


def inspect(model: str) -> dict[str, Any]:
    """What ``latentize inspect --json`` prints. Reads headers, not weights."""
    from latentize.formats.portable import portable_reasons
    from latentize.methods.registry import settings
    from latentize.recipe import Recipe

    checkpoint = open_checkpoint(resolve(model))
    if is_latent(checkpoint.config):
        return _inspect_latent(checkpoint)
    spec = model_spec(checkpoint.config)
    match_tensors(checkpoint, spec)
    methods = []
    for method in ("calibrated", "transmla", "care", "mha2mla"):
        try:
            allowed = settings(Recipe.build(method=method), spec.attention)
        except LatentizeError as error:
            methods.append({"method": method, "result": "refused", "why": error.what})
            continue
        nearest = min(allowed, key=lambda setting: len(portable_reasons(spec, setting)))
        reasons = portable_reasons(spec, nearest)
        why = "; ".join(reasons or nearest.approximations(spec.attention))
        methods.append({"method": method, "result": "native" if reasons else "deepseek_v3", "why": why})
    facts = {**described(spec), "parameters": _stored(checkpoint)}
    if checkpoint.quantization is not None:
        facts["quantization"] = checkpoint.quantization
    if checkpoint.notes:
        facts["note"] = "; ".join(checkpoint.notes)
    return {**facts, "methods": methods}


def _stored(checkpoint: Checkpoint) -> int:
    return sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names())


def _inspect_latent(checkpoint: Checkpoint) -> dict[str, Any]:
    """Of a model that has latent attention: its rank can be lowered, or why not."""
    from latentize.modeling.latent_source import check_latent

    spec = latent_model(checkpoint.config)
    method = {"method": "lower rank", "result": spec.model_type, "why": "give --keep or --kv-lora-rank"}
    try:
        check_latent(checkpoint, spec)
    except UnsupportedModelError as error:
        method |= {"result": "refused", "why": error.what}
    return {**described(spec), "parameters": _stored(checkpoint), "methods": [method]}
