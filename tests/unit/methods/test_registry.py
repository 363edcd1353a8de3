"""Every method that a recipe may name is there."""

from __future__ import annotations

from typing import get_args

from latentize.methods.registry import METHODS
from latentize.recipe import Method


def test_recipes_name_all_methods_and_no_other() -> None:
    assert set(METHODS) == set(get_args(Method))
    assert all(method.name == name for name, method in METHODS.items())
