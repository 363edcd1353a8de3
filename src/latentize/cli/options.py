"""Options of a command that are fields of a recipe: declared there once, with what they mean."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from latentize.recipe import Request

__all__ = ["options_of"]


def options_of(recipe: type[Request], *, leave_out: Sequence[str] = ()) -> Callable[[Callable[..., None]], Any]:
    """Give a command an option for every field of a recipe, in the place of its parameter ``given``.

    The command gets those that were given, by name. What a field means is its help, and its default is said.

    Args:
        recipe: Its fields are described.
        leave_out: Fields that only a file or Python sets.
    """
    fields = {name: info for name, info in recipe.model_fields.items() if name not in leave_out}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**arguments: Any) -> None:
            values = {name: arguments.pop(name) for name in fields}
            given = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if v not in (None, [])}
            command(given=given, **arguments)

        signature = inspect.signature(command, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for name, parameter in signature.parameters.items():
            own = [_parameter(recipe.option(field), *item) for field, item in zip(fields, fields.items(), strict=True)]
            parameters += own if name == "given" else [parameter]
        # Those without a default come first, as Python wants it; typer shows arguments before options in any case.
        parameters.sort(key=lambda p: p.default is not inspect.Parameter.empty)
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _parameter(option: str, name: str, info: FieldInfo) -> inspect.Parameter:
    kind, names = _kind(info.annotation), [option]
    if kind is bool and info.default is None:
        # It may be left open, switched on, or switched off.
        names = [f"{names[0]}/--no-{name.replace('_', '-')}"]
    # Zero is a default like any other, and equal to False.
    known = info.default is not False and info.default not in (None, ())
    described = " ".join((info.description or "").split())
    help_text = f"{described}{f' Default: {info.default}.' if known else ''}".replace("``", "")
    annotation = Annotated[kind | None, typer.Option(*names, help=help_text)]
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=annotation)


def _kind(annotation: Any) -> Any:
    """What is parsed on the command line; the recipe checks what it means."""
    origin, members = get_origin(annotation), [a for a in get_args(annotation) if a is not NoneType]
    if origin in (Union, UnionType):
        return _kind(members[0])
    if origin is Literal or annotation is float:
        # A share may be a percentage.
        return str
    if origin is tuple:
        return list[str]
    return annotation
