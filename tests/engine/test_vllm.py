"""vLLM on the CPU computes what transformers does, with the settings that docs/engines.md gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.engine.conftest import Record
from tests.models import portable

import latentize
from latentize.errors import EngineError

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture(autouse=True)
def _engine(needs: Callable[[str], None]) -> None:
    needs("vllm")


@pytest.mark.parametrize("name", ["random 512 + 64", "random 160 + 32, 6 heads", "converted 32 + 32"])
def test_logprobs_and_greedy_tokens(models: Callable[[str], Path], record: Record, name: str) -> None:
    """10 prompts in float32; latents are absorbed at 512 + 64, expanded otherwise."""
    found = record(name, latentize.verify(models(name), engine="vllm"))
    assert found["largest_logprob_error"] <= 1e-4
    assert found["kl"] <= 1e-6
    assert found["greedy_identical"] == found["prompts"] == 10
    assert ("expanded" in found["settings"]["latents"]) == (name != "random 512 + 64")


def test_sizes_that_its_cpu_backend_has_not(tmp_path: Path) -> None:
    folder = portable(tmp_path, heads=4, rank=44, rope=20, nope=32, value=32)
    with pytest.raises(EngineError, match="512 \\+ 64, or heads of"):
        latentize.verify(folder, engine="vllm", prompts=1, new_tokens=2)
