"""Tables of what engines take, against the engines' own Python code on machines that pretend to be others."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from latentize.attention.spec import AttentionSpec, LatentSpec, RopeSpec
from latentize.conversion.serving import fit, fitting_settings
from latentize.engines.contracts import Backend, contract, served, sizes_of
from latentize.recipe import Recipe

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
# Name → hidden size, heads, and sizes: latent + rope, nope, value.
SHAPES = {
    "SmolLM2 512 + 64": (576, 9, 512, 64, 64, 128),
    "SmolLM2 256 + 64": (576, 9, 256, 64, 64, 128),
    "SmolLM2 256 + 64, not padded": (576, 9, 256, 64, 64, 64),
    "SmolLM2 224 + 64, not padded": (576, 9, 224, 64, 64, 64),
    "SmolLM2 160 + 32": (576, 9, 160, 32, 64, 128),
    "Llama-3-8B 512 + 64": (4096, 32, 512, 64, 128, 128),
    "Llama-3-8B 256 + 64": (4096, 32, 256, 64, 128, 128),
    "Qwen3-8B 512 + 64": (4096, 32, 512, 64, 128, 128),
    "Qwen3-8B 256 + 64": (4096, 32, 256, 64, 128, 128),
    "Mistral-Small 512 + 64": (5120, 32, 512, 64, 128, 128),
    "Mistral-Small 256 + 64": (5120, 32, 256, 64, 128, 128),
    # Heads that kernels cannot share out evenly, heads of another size, and what all kernels are made for.
    "Llama-3.2-3B 512 + 64": (3072, 24, 512, 64, 128, 128),
    "Llama-3.2-3B 256 + 64": (3072, 24, 256, 64, 128, 128),
    "Phi-3-mini 512 + 64": (3072, 32, 512, 64, 96, 96),
    "Phi-3-mini 256 + 64": (3072, 32, 256, 64, 96, 128),
    "448 + 64": (4096, 32, 448, 64, 128, 128),
    "512 + 128": (4096, 32, 512, 128, 128, 128),
    "192 + 64, value 256": (6144, 64, 512, 64, 192, 256),
    "DeepSeek-V3": (7168, 128, 512, 64, 128, 128),
}
MACHINES = ("sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "cpu")
# A cache of 16 bits is in the model's precision.
FORMATS = (
    ("bf16", "bfloat16"),
    ("fp16", "float16"),
    ("fp8", "bfloat16"),
    ("fp8", "float16"),
    ("bf16", "float32"),
)
ENGINES = ("vllm", "flashinfer", "sglang")
# What tables call it → what the engine does.
NAMES = {"CPU_SDPA": "CPU_SDPA_MLA"}


def _sizes(name: str) -> dict[str, int]:
    hidden, heads, rank, rope, nope, value = SHAPES[name]
    return sizes_of(LatentSpec(hidden, heads, rank, rope, nope, value, rope_heads=1, up_heads=heads, softmax_scale=1.0))


CASES = [
    {"shape": shape, "phase": phase, "machine": machine, "cache": cache, "dtype": dtype, **_sizes(shape)}
    for shape, phase, machine, (cache, dtype) in product(SHAPES, ("prefill", "decode"), MACHINES, FORMATS)
]


@functools.cache
def _asked(engine: str) -> dict[str, Any]:
    """Answers to all cases."""
    return _ask(engine, CASES)


def _ask(engine: str, cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Answers of an engine's code, from its own environment."""
    folder = Path(os.environ.setdefault("LATENTIZE_ENGINES", str(ROOT / ".engines"))) / engine
    python = folder.absolute() / "bin" / "python"
    if not python.exists() or (folder / ".unfinished").exists():
        pytest.skip(f"2026-11-29: there is no environment with {engine}; scripts/engines.sh {engine}")
    done = subprocess.run(
        [python, Path(__file__).with_name("shape_checks"), engine],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def _answers(engine: str, machine: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for case, answer in zip(CASES, _asked(engine)["cases"], strict=True):
        if case["machine"] == machine:
            yield case, answer


def _left_out(engine: str, backend: Backend) -> set[str]:
    """Conditions of a backend that cannot be asked here."""
    entries = _asked(engine)["left_out"]
    names = (f"{backend.phase}/{backend.name}", f"{backend.phase}/*")
    return {condition for name in names for condition in entries.get(name, {}).get("conditions", ())}


def _without(backend: Backend, conditions: set[str]) -> Backend:
    shapes = tuple({name: size for name, size in shape.items() if name not in conditions} for shape in backend.shapes)
    fields = {name: () for name in ("caches", "dtypes") if name in conditions}
    return replace(backend, shapes=shapes, **fields)


def _takes(backends: list[Backend], case: dict[str, Any]) -> bool:
    """Whether any entry of a backend takes a case."""
    able = [backend for backend in backends if case["machine"] in backend.hardware]
    return any(backend.declines(case, case["cache"], case["dtype"]) is None for backend in able)


@pytest.mark.parametrize(("engine", "machine"), list(product(ENGINES, MACHINES)))
def test_backend_by_backend(engine: str, machine: str) -> None:
    """What the code refuses the table does, and what it takes as far as it looks the table does, too."""
    table, wrong, compared = contract(engine).backends, [], 0
    for case, answer in _answers(engine, machine):
        for name in dict.fromkeys(backend.name for backend in table if backend.phase == case["phase"]):
            entries = [backend for backend in table if (backend.phase, backend.name) == (case["phase"], name)]
            left_out = _left_out(engine, entries[0])
            known = NAMES.get(name, name)
            if known not in answer["backends"]:
                # Whoever is not asked runs elsewhere, or nobody can ask it.
                assert "all" in left_out or not any(machine in backend.hardware for backend in entries), (name, case)
                continue
            refused, compared = answer["backends"][known], compared + 1
            full, asked = _takes(entries, case), _takes([_without(entry, left_out) for entry in entries], case)
            if (refused and full) or (not refused and not asked and "hardware" not in left_out):
                wrong.append((name, case["shape"], case["cache"], case["dtype"], refused or "is taken"))
    assert not wrong, "\n".join(map(str, wrong))
    assert compared or (engine, machine) == ("flashinfer", "cpu")


@pytest.mark.parametrize("machine", MACHINES)
def test_what_vllm_chooses(machine: str) -> None:
    """The backend that it takes by itself, or none where it, or what it has chosen, refuses."""
    wrong = []
    for case, answer in _answers("vllm", machine):
        made = {made.phase: made for made in served("vllm", machine, case, cache=case["cache"], dtype=case["dtype"])}
        found = made[case["phase"]].describe()["backend"]
        chosen = answer["chosen"]
        # Its kernel, which was not asked, may take fewer sizes.
        entries = [b for b in contract("vllm").backends if NAMES.get(b.name, b.name) == chosen]
        expected = chosen if chosen is not None and _takes(entries, case) else None
        if NAMES.get(found, found) != expected:
            wrong.append((case["phase"], case["shape"], case["cache"], case["dtype"], found, expected))
    assert not wrong, "\n".join(map(str, wrong))


def test_what_vllm_hands_to_flashinfer() -> None:
    """Which sizes FLASHINFER_MLA has is decided by FlashInfer's function, in two ways by the number of heads."""
    entries, wrong, through = [b for b in contract("vllm").backends if b.name == "FLASHINFER_MLA"], [], set()
    for (case, answer), (_, other) in zip(_answers("vllm", "sm100"), _answers("flashinfer", "sm100"), strict=True):
        if case["phase"] == "decode":
            through.add(answer["hands"])
            refused = answer["backends"]["FLASHINFER_MLA"] or other["handed"][answer["hands"]]
            if (refused is None) != _takes(entries, case):
                wrong.append((case["shape"], case["cache"], case["dtype"], refused or "is taken"))
    assert not wrong, "\n".join(map(str, wrong))
    assert through == {"auto", "cute-dsl"}


@pytest.mark.parametrize("machine", MACHINES)
def test_what_sglang_chooses(machine: str) -> None:
    """It looks at no size: the first of a table for a machine is its choice."""
    for case, answer in _answers("sglang", machine):
        of_phase = [backend for backend in contract("sglang").backends if backend.phase == case["phase"]]
        first = next(backend for backend in of_phase if machine in backend.hardware)
        assert answer["chosen"] == first.name, case


def test_what_sglang_hands_to_flashinfer() -> None:
    """It looks at no size, and FlashInfer's functions that it calls do; of its precisions the one that all have."""
    table, wrong, compared = contract("sglang").backends, [], set()
    for case, answer in zip(CASES, _asked("flashinfer")["cases"], strict=True):
        if (case["cache"], case["dtype"]) != ("bf16", "bfloat16"):
            continue
        found, machine = answer["backends"], case["machine"]
        asked = {
            ("decode", "trtllm_mla", "sm100"): answer.get("handed", {}).get("auto"),
            ("prefill", "trtllm_mla", "sm100"): found.get("trtllm-ragged"),
            # Where it is, fa3 comes first.
            ("decode", "flashinfer", machine): found.get("fa3") and found.get("fa2"),
        }
        for (phase, name, of), refused in asked.items():
            if (phase, of) == (case["phase"], machine) and machine != "cpu":
                entries = [backend for backend in table if (backend.phase, backend.name) == (phase, name)]
                compared.add((phase, name))
                if (refused is None) != _takes(entries, case):
                    wrong.append((phase, name, machine, case["shape"], refused or "is taken"))
    assert not wrong, "\n".join(map(str, wrong))
    assert compared == {("decode", "trtllm_mla"), ("prefill", "trtllm_mla"), ("decode", "flashinfer")}


# Name → heads, kv heads, size of a head, hidden size, and the share of its cache that is asked for.
SOURCES = {
    "SmolLM2": (9, 3, 64, 576, "85%"),
    "Llama-3-8B and Qwen3-8B": (32, 8, 128, 4096, "30%"),
    "Mistral-Small": (32, 8, 128, 5120, "30%"),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("engine", ENGINES)
def test_what_a_conversion_for_an_engine_becomes_is_taken(engine: str, source: str) -> None:
    """Whatever sizes ``convert --for`` chooses, some backend of the engine's own code takes them, in both phases."""
    heads, kv_heads, head_dim, hidden, keep = SOURCES[source]
    spec = AttentionSpec(hidden, heads, kv_heads, head_dim, RopeSpec(10_000.0, head_dim))
    cases = []
    for machine in MACHINES:
        recipe = Recipe.build(keep=keep, serve_on=f"{engine}@{machine}")
        if not any(machine in backend.hardware for backend in contract(engine).backends):
            continue
        setting = fitting_settings(recipe, spec)[0]
        made = fit(recipe, spec, setting.kv_lora_rank, setting.qk_rope_head_dim)
        refused = made.standing[0]
        # The one latent of vLLM's kernel for CPUs is larger than SmolLM2's whole cache.
        assert refused == ((engine, machine, source) == ("vllm", "cpu", "SmolLM2")), (machine, made)
        case = {"machine": machine, "cache": "bf16", "dtype": "bfloat16", **sizes_of(made.sizes)}
        cases += [] if refused else [{**case, "phase": phase} for phase in ("prefill", "decode")]
    for case, answer in zip(cases, _ask(engine, cases)["cases"], strict=True):
        taken = answer["chosen"] if "chosen" in answer else not all(answer["backends"].values())
        assert taken, (case, answer)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_left_out_has_a_reason(engine: str) -> None:
    for name, entry in _asked(engine)["left_out"].items():
        assert entry["why"] and entry["conditions"], name


def test_versions_are_those_of_the_tables() -> None:
    """vLLM for CPUs is a version behind the sources that its table was read from; others are those that were read."""
    versions = {engine: _asked(engine)["version"] for engine in ("flashinfer", "sglang")}
    assert versions == {engine: contract(engine).version for engine in versions}
