"""What every command has in common: how it parses, shows how far it is, and prints.

``app`` is what commands are added to.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from latentize.errors import OptionError, OutputError

if TYPE_CHECKING:
    from latentize.progress import Progress

__all__ = [
    "AsJson",
    "CacheFormat",
    "Data",
    "Keep",
    "Model",
    "app",
    "console",
    "emit",
    "facts_table",
    "kept",
    "numbers",
    "printing",
    "progress_bar",
    "status",
]

app = typer.Typer(
    help="The same model, a smaller KV cache: turns attention into multi-head latent attention (MLA).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Numbers that are printed one by one, at most.
_READ = 4
# What is printed is what people have named things: brackets and colons in it are no style.
_PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
console = Console(**_PLAIN)
# Progress goes to stderr, so that stdout can be piped.
status = Console(stderr=True, **_PLAIN)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder with a checkpoint, a GGUF file, or a hub id.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Data = Annotated[
    list[str] | None,
    typer.Option(
        help="Text: .txt, .md, .jsonl or .parquet, a folder, - for stdin, or a hub data set. Repeat for several."
    ),
]
CacheFormat = Annotated[
    str | None,
    typer.Option(
        metavar="LATENT[+ROPE]",
        help="Cache in bf16, fp16, fp32, fp8, int8 or int4; as int4 or int4+bf16. auto: as the checkpoint says.",
    ),
]
Keep = Annotated[str | None, typer.Option(help="Share of the source's cached values to keep, as 25% or 0.25.")]


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A progress bar on a terminal; a line a step elsewhere."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
    )
    with Progress(*columns, console=status, disable=not status.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def tell(what: str, done: int, total: int, detail: str = "") -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total, detail="")
            bar.update(tasks[what], completed=done, detail=detail)
            if not status.is_terminal:
                print(f"{what}: {done}/{total}  {detail}".rstrip(), file=sys.stderr, flush=True)

        yield tell


def emit(entries: Any, as_json: bool, *tables: Table) -> None:
    with printing():
        if as_json:
            print(json.dumps(entries))
        for table in () if as_json else tables:
            console.print(table)


@contextmanager
def printing() -> Iterator[None]:
    """What is printed in here is out afterwards.

    Raises:
        OutputError: it is not.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read it has enough.
        raise
    except OSError as error:
        # Python would try again at its end.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OutputError(
            f"the result cannot be printed: {error.strerror}", code="LZ405", where="stdout", fix="make room there"
        ) from error


@contextmanager
def kept(model: str, kind: str, result: dict[str, Any]) -> Iterator[None]:
    """Print in here: what was measured is added to the model's report afterwards, printed or not."""
    from latentize.api import extend_report

    try:
        yield
    finally:
        extend_report(model, kind, result)


def _short(value: Any) -> Any:
    """Numbers that nobody reads one by one are only counted; ``--json`` has them."""
    if isinstance(value, dict):
        return {name: _short(entry) for name, entry in value.items()}
    several = isinstance(value, list | tuple) and len(value) > _READ
    return f"{len(value)} numbers" if several and all(isinstance(entry, float) for entry in value) else value


def facts_table(title: str, rows: dict[str, Any]) -> Table:
    # A title is folded to the table's width; a path should not be.
    width = min(len(title), console.width)
    table = Table(title=title, show_header=False, title_justify="left", min_width=width)
    for name, value in rows.items():
        table.add_row(name, str(_short(value)))
    return table


def numbers(text: str, where: str) -> list[int]:
    """Numbers of an option that takes several, as ``512,2048``.

    Raises:
        OptionError: it is something else.
    """
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise OptionError(f"'{text}' is not a list of numbers", where=where, fix="as 512,2048")
    return found
