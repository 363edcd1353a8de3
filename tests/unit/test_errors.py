"""Codes: each has an entry, each entry is raised somewhere, and the documentation is what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from latentize import errors

ROOT = Path(__file__).parents[2]
SOURCES = {p: p.read_text(encoding="utf-8") for p in (ROOT / "src").rglob("*.py") if p.name != "errors.py"}


def classes() -> list[type[errors.LatentizeError]]:
    return [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.LatentizeError)]


def test_every_code_that_is_raised_is_described() -> None:
    used = {code for text in SOURCES.values() for code in re.findall(r'"(LZ\d{3})"', text)}
    used |= {c.code for c in classes()} - {"LZ000"}
    assert used == set(errors.CODES)


@pytest.mark.parametrize("kind", [c.__name__ for c in classes() if c is not errors.LatentizeError])
def test_every_class_is_raised(kind: str) -> None:
    assert any(f"{kind}(" in text for text in SOURCES.values())


def test_the_documentation_is_made_of_them() -> None:
    assert (ROOT / "docs" / "errors.md").read_text(encoding="utf-8") == errors.documentation()


def test_an_error_says_code_what_where_and_how_to_mend_it() -> None:
    said = str(errors.OptionError("no", where="--here", fix="so", code="LZ303"))
    assert said.split("\n") == ["LZ303 no", "  where: --here", "  fix:   so"]
