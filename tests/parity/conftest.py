"""The four kinds of models that are held against a plain one, converted once."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.common import SMALL, text_file
from tests.models import pico, portable
from tests.parity.pair import KINDS, Pair

import latentize


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, family in (("native", "llama"), ("native, kept layers", "gemma3_text")):
        folder = tmp_path_factory.mktemp(family)
        source = pico(folder, family)
        data = (text_file(folder),)
        latentize.convert(source, folder / "out", format="native", keep=0.5, data=data, **SMALL)
        made[name] = folder / "out"
    # A norm like any other: a linear one's factors make gradients hard to compare.
    sizes = {"heads": 4, "rank": 14, "rope": 8, "nope": 12, "value": 10, "linear": False}
    made["portable"] = portable(tmp_path_factory.mktemp("portable"), **sizes)
    return made


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Pair:
    return Pair(request.param, folders)
