"""Every test starts from the same random state, hypothesis from the same examples; models are made once.

``HYPOTHESIS_PROFILE=many`` draws 500 examples, others at every run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from tests.common import text_file
from tests.models import pico

if os.environ.get("PYTEST_XDIST_WORKER"):
    # Two workers with two threads each on two cores wait for each other: five times slower.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

settings.register_profile("reproducible", derandomize=True, deadline=None, max_examples=60)
settings.register_profile("many", deadline=None, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "reproducible"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of text for calibration and evaluation."""
    return text_file(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Picomodels on disk, not to be changed: ``source(family, kv_heads, **config)``."""
    made: dict[str, Path] = {}

    def make(family: str = "llama", kv_heads: int = 2, **config: Any) -> Path:
        key = repr((family, kv_heads, sorted(config.items(), key=lambda item: item[0])))
        if key not in made:
            made[key] = pico(tmp_path_factory.mktemp(family), family, kv_heads, **config)
        return made[key]

    return make
