"""A folder in the portable format, written once."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.models import portable


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rank 160, rope 32, six heads: nothing is a power of two that need not be."""
    return portable(tmp_path_factory.mktemp("gguf"), heads=6, rank=160, rope=32, nope=32, value=32)
