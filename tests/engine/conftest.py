"""Models for the engines, and a record of what they computed.

``LATENTIZE_ENGINE_RESULTS=FILE`` keeps every comparison; ``benchmarks/engine_tables.py`` makes the tables of the
documentation from it.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import portable

import latentize
from latentize.engines.run import engine_python
from latentize.errors import EngineError

ROOT = Path(__file__).parents[2]
Record = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Portable folders in bfloat16, and one in float16, by name; made when they are asked for."""
    made: dict[str, Path] = {}
    shapes = {
        "random 512 + 64": {"heads": 4, "rank": 512, "rope": 64},
        "random 160 + 32, 6 heads": {"heads": 6, "rank": 160, "rope": 32},
    }

    def make(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("engine")
            if name.startswith("converted 32 + 32"):
                sizes = {"kv_lora_rank": 32, "qk_rope_head_dim": 32, "tokens": 16_384}
                dtype = "float16" if name.endswith("float16") else "bfloat16"
                latentize.convert(ROOT / "models" / "tiny-llama-gqa", folder / "out", fast=True, dtype=dtype, **sizes)
                made[name] = folder / "out"
            else:
                made[name] = portable(folder, nope=32, value=32, stored=torch.bfloat16, **shapes[name])
        return made[name]

    return make


@pytest.fixture(scope="session")
def _results() -> Iterator[list[dict[str, Any]]]:
    results: list[dict[str, Any]] = []
    yield results
    path = os.environ.get("LATENTIZE_ENGINE_RESULTS")
    if path and results:
        made = {"date": datetime.date.today().isoformat(), "results": results}
        (ROOT / path).write_text(json.dumps(made, indent=1) + "\n")


@pytest.fixture
def record(_results: list[dict[str, Any]]) -> Record:
    """Keep a comparison: ``record(model, result)`` returns the result."""

    def keep(model: str, result: dict[str, Any]) -> dict[str, Any]:
        _results.append({"model": model, **result})
        return result

    return keep


@pytest.fixture(scope="session")
def needs() -> Callable[[str], None]:
    """Skip where an engine's environment is not on the machine."""

    def check(engine: str) -> None:
        os.environ.setdefault("LATENTIZE_ENGINES", str(ROOT / ".engines"))
        try:
            engine_python(engine)
        except EngineError as error:
            # `make test-engines` makes it.
            pytest.skip(f"2026-11-24: {error.what}; {error.fix}")

    return check
