"""How an engine would serve a model, by its sizes: before anybody rents a GPU."""

from __future__ import annotations

from typing import Any

from latentize.engines.contracts import contract, machine_of, served, sizes_of, usual_cache
from latentize.errors import EngineError, UnsupportedModelError
from latentize.families import LatentModel, ModelSpec
from latentize.planning.reading import read_spec

__all__ = ["planned_serving", "required_serving", "serving"]


def serving(model: str, where: str, *, cache: str | None = None, tensor_parallel: int = 1) -> dict[str, Any]:
    """What an engine does with a portable model, by its sizes: ``latentize inspect --for``. Reads no weights.

    Args:
        model: A folder, a ``config.json``, or a hub id.
        where: ``ENGINE`` or ``ENGINE@MACHINE``, as ``vllm@h100``.
        cache: Format of its cache: bf16, fp16, fp8, or one of llama.cpp's. By default that of the model.
        tensor_parallel: Ranks that share the heads.

    Returns:
        What is read, for what, ``served`` and ``fast`` of all phases, ``phases`` as ``Served.describe`` has them, what
        becomes of scaled RoPE, where latents are with several ranks, and what to do ``instead``.

    Raises:
        OptionError: no such engine or machine, or heads that ranks cannot share.
        UnsupportedModelError: the model has no latent attention that engines know.
    """
    engine, _, hardware = where.partition("@")
    table, machine, spec = contract(engine), machine_of(engine, hardware or None), read_spec(model)
    if not isinstance(spec, LatentModel):
        raise UnsupportedModelError(
            "engines serve latents of DeepSeek's layout, and this model has none", where=model,
            fix="convert it first, in the portable format",
        )  # fmt: skip
    sizes = sizes_of(spec.attention, tensor_parallel)
    dtype = str(spec.config.get("dtype") or spec.config.get("torch_dtype") or "bfloat16")
    cache = cache or usual_cache(engine, dtype)
    phases = served(engine, machine, sizes, cache=cache, dtype=dtype)
    kind = spec.rope.rope_type
    return {
        "engine": engine,
        "version": table.version,
        "read": table.read,
        "machine": hardware or machine,
        "hardware": machine,
        "sizes": sizes,
        "cache": cache,
        "dtype": dtype,
        "fast": all(phase.fast for phase in phases),
        "served": all(phase.refused is None for phase in phases),
        "phases": [phase.describe() for phase in phases],
        "rope": None if kind == "default" else table.rope.get(kind, table.rope.get("others")),
        "latent_on_ranks": table.tensor_parallel,
        "instead": table.instead,
    }


def required_serving(model: str, where: str) -> dict[str, str]:
    """Which backends will run, phase by phase, as ``served_prefill`` and ``served_decode``, and what would become of
    scaled RoPE (``scaled_rope``): ``latentize verify --for``.

    Raises:
        EngineError: the engine would refuse the sizes.
        OptionError, UnsupportedModelError: as for :func:`serving`.
    """
    facts, found = serving(model, where), {}
    for phase in facts["phases"]:
        if phase["refused"]:
            padded = ", ".join(f"{size} {value}" for size, value in (phase["fast_if_padded"] or {}).items())
            fix = f"latentize convert SOURCE --for {where}" + (f", which pads: {padded}" if padded else "")
            raise EngineError(f"{phase['phase']} is refused: {phase['refused']}", where=f"{model}, {where}", fix=fix)
        speed = "made for these sizes" if phase["fast"] else "made for any sizes, slower"
        found[f"served_{phase['phase']}"] = f"{phase['backend']}, {speed}"
    return found | ({"scaled_rope": facts["rope"]} if facts["rope"] else {})


def planned_serving(model: str, spec: ModelSpec | LatentModel, keep: float, where: str, ranks: int) -> dict[str, Any]:
    """What an engine would do with a model, or with what ``convert --for`` would make of it: ``latentize plan --for``.

    Args:
        model, spec: Its name, and what it is.
        keep: Share of the source's cached values.
        where: ``ENGINE`` or ``ENGINE@MACHINE``.
        ranks: That share the heads.
    """
    if isinstance(spec, LatentModel):
        return serving(model, where, tensor_parallel=ranks)
    # Not at the top: they import torch, and a plan without an engine does without.
    from latentize.conversion.serving import fit, fitting_settings
    from latentize.methods.method import budget_of
    from latentize.recipe import Recipe

    recipe = Recipe.build(keep=keep, serve_on=where)
    setting = fitting_settings(recipe, spec.attention)[0]
    made = fit(recipe, spec.attention, setting.kv_lora_rank, setting.qk_rope_head_dim, ranks)
    s = made.sizes
    cached = f"latents of {s.kv_lora_rank} and roped keys of {s.qk_rope_head_dim}"
    heads = f"{s.num_heads} heads of {s.qk_nope_head_dim} un-roped dimensions, values of {s.v_head_dim}"
    chosen = f"convert --for {where} would make {cached}; {heads}"
    return {
        "where": where,
        "sizes": sizes_of(made.sizes, ranks),
        "fast": all(phase.fast for phase in made.phases),
        "served": all(phase.refused is None for phase in made.phases),
        "phases": [phase.describe() for phase in made.phases],
        "notes": [chosen, *made.notes(budget_of(recipe, spec.attention))],
    }
