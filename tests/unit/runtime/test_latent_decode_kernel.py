"""The Triton kernels without a GPU: interpreted over random shapes, and compiled to PTX."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from latentize.runtime.codecs import FORMATS
from latentize.runtime.kernels.launch import split_count

ROOT = Path(__file__).parents[3]
# Of a query's sum, relative to its largest value.
LIMITS = {"float32": 1e-4, "float16": 2e-3}
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="2026-11-24: triton is not installed (extra: triton)"
)


def printed(script: str, *args: object) -> list[dict[str, Any]]:
    """The JSON lines of a process of its own: whether Triton interprets is settled when it is imported."""
    command = [sys.executable, str(ROOT / "tests" / script), *map(str, args)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def within_limits(found: list[dict[str, Any]]) -> None:
    for made in found:
        assert max(made["error"], made["lse_error"]) <= LIMITS[made["dtype"]], made


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("latent", FORMATS)
def test_interpreted_over_random_shapes(latent: str) -> None:
    """22 configurations of each format: ranks, heads, windows, sinks, masks, lengths, several new tokens."""
    found = printed("interpreted.py", "--latent", latent, "--count", 22)
    assert len(found) == 22 and sum(made["queries"] for made in found) > 140
    within_limits(found)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_codes_interpreted_over_random_plans(seed: int) -> None:
    """60 plans each, of the 200 that docs/runtime.md tells of: widths, ranks, roped keys, exact rows first and last,
    padding, masks, lengths."""
    found = printed("interpreted.py", "--latent", "coded", "--count", 60, "--seed", seed)
    # Sequences and heads are drawn, too: four queries of a plan that see something, on average, are enough.
    assert len(found) == 60 and sum(made["queries"] for made in found) > 4 * 60
    within_limits(found)


@needs_triton
@pytest.mark.slow
def test_compiled_for_a_gpu_that_is_not_there() -> None:
    """``python tests/compiled.py`` compiles all variants; these are the ones with most shared memory, and others.

    99 KiB is what a program may take on Ampere's consumer chips, and on Ada's.
    """
    plain = [f"{kind}, 512+64, 32 queries, plain" for kind in ("bf16+bf16 in bf16", "int4+int8 in bf16")]
    every = "int8+int8 in fp16, 512+64, 32 queries, everything, aligned"
    codes = [f"{what} in bf16, 512+64, 32 queries, masked" for what in ("codes", "apart")]
    found = printed("compiled.py", "--capability", 86, "--match", *plain, every, *codes, "merge in bf16")
    assert len(found) == 8
    for made in found:
        assert made["ptx"] > 1000 and 0 < made["shared"] <= 99 << 10, made


@pytest.mark.parametrize(
    ("rows", "programs", "processors", "expected"),
    [(10, 1, 132, 1), (16_384, 1, 132, 64), (16_384, 264, 132, 1), (1 << 20, 1, 132, 128), (4096, 4, 132, 16)],
)
def test_splits(rows: int, programs: int, processors: int, expected: int) -> None:
    assert split_count(rows, programs, processors) == expected
