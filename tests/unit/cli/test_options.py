"""Options of a command are the fields of its recipe."""

from __future__ import annotations

from typing import Any

import pytest
import typer

from latentize.cli import app
from latentize.healing.recipe import Healing
from latentize.recipe import Recipe, Request

COMMANDS: list[tuple[str, type[Request], set[str]]] = [
    ("convert", Recipe, {"damping", "selection_tokens", "evaluation_tokens"}),
    ("heal", Healing, {"selection_tokens", "evaluation_tokens"}),
]


def options(command: str) -> dict[str, Any]:
    found = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    return {parameter.name: parameter for parameter in found.params}


@pytest.mark.parametrize(("command", "recipe", "left_out"), COMMANDS)
def test_every_field_is_an_option_that_says_what_it_means(
    command: str, recipe: type[Request], left_out: set[str]
) -> None:
    found = options(command)
    for name, field in recipe.model_fields.items():
        assert field.description, f"{recipe.__name__}.{name} says nothing"
        if name in left_out:
            assert name not in found
            continue
        assert found[name].help.startswith(" ".join(field.description.split()).replace("``", ""))
        assert recipe.option(name) in found[name].opts
        assert recipe.option(name) == {"serve_on": "--for"}.get(name, f"--{name.replace('_', '-')}")
        assert found[name].default is None, "what is not given is left to the recipe"
        if field.default is not False and field.default not in (None, ()):
            assert found[name].help.endswith(f"Default: {field.default}.")


def test_a_default_of_zero_is_said() -> None:
    assert options("convert")["seed"].help.endswith("Default: 0.")
    assert options("heal")["ce"].help.endswith("Default: 0.0.")


def test_a_switch_may_be_left_open() -> None:
    found = options("convert")
    assert found["polish"].secondary_opts == ["--no-polish"]
    assert found["fast"].secondary_opts == []
