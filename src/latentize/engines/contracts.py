"""What inference engines take: read in their sources, kept as tables, asked before anybody rents a GPU.

A table (``contract_tables/*.json``) says of an engine, in the order in which it chooses, what each of its backends for
latent attention takes: hardware, sizes, formats of the cache, precisions; and beside them what no backend may lack.
Each entry names the file and the line that it was read from. Sizes are those of a rank: with tensor parallelism it has
a share of the heads and all of the latent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from latentize.attention.spec import LatentSpec
from latentize.errors import OptionError

__all__ = [
    "ENGINES",
    "HARDWARE",
    "Backend",
    "Contract",
    "Served",
    "contract",
    "machine_of",
    "served",
    "sizes_of",
    "usual_cache",
]

ENGINES = ("vllm", "sglang", "flashmla", "flashinfer", "llama.cpp", "mlx", "transformers")
# What tables call a machine, by the names that people have for it.
HARDWARE = {
    "a100": "sm80",
    "rtx3090": "sm86",
    "l40s": "sm89",
    "rtx4090": "sm89",
    "h100": "sm90",
    "h200": "sm90",
    "b200": "sm100",
    "rtx5090": "sm120",
    "mi300x": "cdna3",
    "cpu": "cpu",
    "apple": "apple",
}
_USUAL = {"mlx": "apple", "llama.cpp": "cpu", "transformers": "cpu"}
_PHASES = ("prefill", "decode")
# What zeros can be added to for nothing in the cache.
_PADDED = ("qk_nope_head_dim", "v_head_dim", "heads")


def _misses(size: int, wanted: Sequence[int] | Mapping[str, int]) -> bool:
    """Whether a size is not what a table has: one of several, or within bounds."""
    if isinstance(wanted, Mapping):
        low, high = wanted.get("least", 0), wanted.get("most", size)
        return not low <= size <= high or size % wanted.get("multiple_of", 1) != 0
    return size not in wanted


def _in_words(wanted: Sequence[int] | Mapping[str, int]) -> str:
    if not isinstance(wanted, Mapping):
        return " or ".join(map(str, wanted))
    words = {"least": "{} or more", "most": "{} at most", "multiple_of": "a multiple of {}"}
    return ", ".join(words[name].format(bound) for name, bound in wanted.items())


def _shape_in_words(shape: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_in_words(wanted)}" for name, wanted in shape.items())


@dataclass(frozen=True)
class Backend:
    """One way in which an engine attends, or what all of them need.

    Attributes:
        name: As the engine has it; or what happens where sizes are others.
        phase: ``prefill`` or ``decode``.
        hardware: As in :data:`HARDWARE`.
        shapes: Sizes that it takes, any of these; none is all.
        caches, dtypes: Formats of the cache, precisions of the model; none is all.
        fast: A kernel made for these sizes, not one for any.
        note: What to know beside.
        source: File and line.
    """

    name: str
    phase: str
    hardware: tuple[str, ...]
    source: str
    shapes: tuple[Mapping[str, Any], ...] = ()
    caches: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    fast: bool = False
    note: str = ""

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> Backend:
        several = {name: tuple(entry.get(name, ())) for name in ("hardware", "shapes", "caches", "dtypes")}
        name, fast = entry.get("name") or entry["otherwise"], entry.get("speed") == "fast"
        return cls(name, entry["phase"], source=entry["source"], fast=fast, note=entry.get("note", ""), **several)

    def declines(self, sizes: Mapping[str, int], cache: str, dtype: str) -> str | None:
        """Why it does not take this, in words; ``None`` if it does."""
        if self.caches and cache not in self.caches:
            return f"a cache in {cache}, not {', '.join(self.caches)}"
        if self.dtypes and dtype not in self.dtypes:
            return f"{dtype}, not {', '.join(self.dtypes)}"
        missed = [self.missed(sizes, shape) for shape in self.shapes]
        if not missed or not all(missed):
            return None
        fewest = min(missed, key=len)
        return "; ".join(f"{name} {sizes[name]}, not {_in_words(wanted)}" for name, wanted in fewest.items())

    @staticmethod
    def missed(sizes: Mapping[str, int], shape: Mapping[str, Any]) -> dict[str, Any]:
        """What a shape wants otherwise, by size."""
        return {name: wanted for name, wanted in shape.items() if _misses(sizes[name], wanted)}


@dataclass(frozen=True)
class Contract:
    """A table.

    Attributes:
        engine, version, commit, read: What was read, and when.
        limits: What must hold whatever backend is chosen.
        backends: In the order of choice.
        rope: What becomes of scaled RoPE, by its type.
        tensor_parallel: Where the latent is, with several ranks.
        instead: What may be done where latents are refused.
        experts: By what it chooses experts of DeepSeek's layouts right: ``sigmoid``, ``softmax``.
    """

    engine: str
    version: str
    commit: str
    read: str
    limits: tuple[Backend, ...]
    backends: tuple[Backend, ...]
    rope: Mapping[str, str]
    tensor_parallel: str
    instead: str
    experts: Sequence[str] = ("sigmoid",)


@cache
def contract(engine: str) -> Contract:
    """The table of an engine.

    Raises:
        OptionError: there is none of that name.
    """
    if engine not in ENGINES:
        raise OptionError(f"no table of '{engine}'", where="--for", fix=f"one of {', '.join(ENGINES)}, as vllm@h100")
    file = resources.files("latentize.engines") / "contract_tables" / f"{engine}.json"
    entries = json.loads(file.read_text(encoding="utf-8"))
    entries |= {name: tuple(map(Backend.read, entries[name])) for name in ("limits", "backends")}
    return Contract(**entries)


def sizes_of(spec: LatentSpec, tensor_parallel: int = 1) -> dict[str, int]:
    """What tables have conditions on, of a rank.

    Raises:
        OptionError: heads cannot be shared out.
    """
    if spec.num_heads % tensor_parallel:
        raise OptionError(
            f"{spec.num_heads} heads cannot be shared by {tensor_parallel} ranks", where="--tensor-parallel"
        )
    return {
        "kv_lora_rank": spec.kv_lora_rank,
        "qk_rope_head_dim": spec.qk_rope_head_dim,
        "qk_nope_head_dim": spec.qk_nope_head_dim,
        "v_head_dim": spec.v_head_dim,
        "row": spec.kv_lora_rank + spec.qk_rope_head_dim,
        "qk": spec.qk_nope_head_dim + spec.qk_rope_head_dim,
        "heads": spec.num_heads // tensor_parallel,
    }


@dataclass
class Served:
    """What becomes of one phase.

    Attributes:
        phase: ``prefill`` or ``decode``.
        backend: That will run, or ``None``.
        refused: What stops the engine, with its source, or ``None``.
        declined: Backends before it, and why each does not.
        padded: Sizes that zeros would have to fill for a fast backend; none where that is not enough, or not needed.
        padded_backend: That fast backend.
        made_for: What fast backends take, in words.
    """

    phase: str
    backend: Backend | None = None
    refused: str | None = None
    declined: list[tuple[str, str]] = field(default_factory=list)
    padded: dict[str, int] = field(default_factory=dict)
    padded_backend: str | None = None
    made_for: list[str] = field(default_factory=list)

    @property
    def fast(self) -> bool:
        return self.refused is None and self.backend is not None and self.backend.fast

    def describe(self) -> dict[str, Any]:
        chosen = None if self.refused else self.backend
        return {
            "phase": self.phase,
            "backend": chosen and chosen.name,
            "fast": self.fast,
            "note": chosen.note if chosen else "",
            "source": chosen.source if chosen else None,
            "refused": self.refused,
            "declined": [{"backend": name, "why": why} for name, why in self.declined],
            "fast_if_padded": self.padded or None,
            "padded_backend": self.padded_backend,
            "made_for": self.made_for,
        }


def machine_of(engine: str, hardware: str | None) -> str:
    """What tables call a machine.

    Raises:
        OptionError: nobody knows it.
    """
    name = hardware or _USUAL.get(engine, "h100")
    if name in HARDWARE:
        return HARDWARE[name]
    if name in HARDWARE.values():
        return name
    raise OptionError(f"no machine '{name}'", where="--for", fix=f"one of {', '.join(HARDWARE)}, as {engine}@h100")


def usual_cache(engine: str, dtype: str) -> str:
    """The format of an engine's cache where none is asked for: the model's own, as tables call it."""
    own = {"bfloat16": "bf16", "float16": "fp16", "float32": "f32"}
    return "f16" if engine == "llama.cpp" else own.get(dtype, "bf16")


def served(engine: str, machine: str, sizes: Mapping[str, int], *, cache: str, dtype: str) -> list[Served]:
    """What an engine does with a model of these sizes, for each phase that its table has.

    Args:
        engine: One of :data:`ENGINES`.
        machine: As tables call it.
        sizes: As of :func:`sizes_of`.
        cache: Format of its cache: bf16, fp16, fp8, or llama.cpp's.
        dtype: Precision of the model.
    """
    table = contract(engine)
    found = []
    for phase in _PHASES:
        made, able = Served(phase), [b for b in table.backends if b.phase == phase and machine in b.hardware]
        if not any(b.phase == phase for b in table.backends):
            continue
        for backend in able:
            why = backend.declines(sizes, cache, dtype)
            if why is None:
                made.backend = backend
                break
            made.declined.append((backend.name, why))
        limits = [b for b in table.limits if b.phase == phase and machine in b.hardware]
        made.refused = next(_broken(limits, sizes, cache, dtype), None)
        if made.backend is None and made.refused is None:
            made.refused = f"none of its backends takes this on {machine}"
        if not made.fast:
            fast = [b for b in able if b.fast]
            made.made_for = list(dict.fromkeys(_shape_in_words(shape) for b in fast for shape in b.shapes))
            _pad(made, fast, limits, sizes, cache, dtype)
        found.append(made)
    return found


def _broken(limits: Sequence[Backend], sizes: Mapping[str, int], cache: str, dtype: str) -> Iterator[str]:
    for limit in limits:
        # A limit that is about some formats says nothing of others.
        if limit.caches and cache not in limit.caches:
            continue
        why = limit.declines(sizes, cache, dtype)
        if why is not None:
            yield f"{limit.name} ({why}; {limit.source})"


def _pad(
    made: Served, fast: Sequence[Backend], limits: Sequence[Backend], sizes: Mapping[str, int], cache: str, dtype: str
) -> None:
    """Find the fewest zeros with which a fast backend takes it."""
    best = None
    for backend in fast:
        for shape in backend.shapes:
            wanted = _padded(sizes, shape)
            if wanted is None:
                continue
            trial = {**sizes, **wanted}
            trial["qk"] = trial["qk_nope_head_dim"] + trial["qk_rope_head_dim"]
            fits = backend.declines(trial, cache, dtype) is None and not any(_broken(limits, trial, cache, dtype))
            cost = trial["heads"] * (trial["qk"] + trial["v_head_dim"])
            if fits and wanted and (best is None or cost < best[0]):
                best = cost, wanted, backend.name
    if best is not None:
        _, made.padded, made.padded_backend = best


def _at_least(size: int, wanted: Sequence[int] | Mapping[str, int]) -> list[int]:
    """What a table has that is no smaller than a size; of bounds, the least."""
    if not isinstance(wanted, Mapping):
        return [one for one in wanted if one >= size]
    step = wanted.get("multiple_of", 1)
    least = -(-max(size, wanted.get("least", 0)) // step) * step
    return [least] if least <= wanted.get("most", least) else []


def _padded(sizes: Mapping[str, int], shape: Mapping[str, Any]) -> dict[str, int] | None:
    """Larger sizes that a shape wants, of those that zeros can fill; ``None`` if others are missed, too."""
    shape = dict(shape)
    if "qk" in shape and not isinstance(shape["qk"], Mapping):
        # The roped part is cached and stays: zeros go to the other.
        shape["qk_nope_head_dim"] = [qk - sizes["qk_rope_head_dim"] for qk in shape.pop("qk")]
    wanted = {}
    for name, choice in Backend.missed(sizes, shape).items():
        larger = [size for size in _at_least(sizes[name], choice) if size > sizes[name]]
        if name not in _PADDED or not larger:
            return None
        wanted[name] = min(larger)
    return wanted
