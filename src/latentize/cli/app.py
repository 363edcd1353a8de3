"""The command line. Each command parses, calls one function, and prints."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer

# Importing them adds their commands, in this order.
from latentize.cli import planning  # noqa: F401

# isort: split
from latentize.cli import making  # noqa: F401

# isort: split
from latentize.cli import measuring, using  # noqa: F401
from latentize.cli.console import app, status
from latentize.errors import LatentizeError, ResourceError

__all__ = ["app", "main"]


def _print_version(asked: bool) -> None:
    if asked:
        from latentize import __version__

        print(f"latentize {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Say which version this is.")
    ] = False,
) -> None: ...


# What the dynamic linker says where a library cannot be mapped.
_NO_MEMORY = ("failed to map segment", "Cannot allocate memory", "cannot allocate memory")


def _fail(error: LatentizeError) -> NoReturn:
    status.print(f"{error.code} ", style="red", end="")
    # Not folded: a path is there to be copied.
    status.print(str(error).removeprefix(error.code).lstrip(), soft_wrap=True)
    sys.exit(2)


@contextmanager
def _notes_on_stderr() -> Iterator[None]:
    """What there is to know about the text, as one line each and without the place in the code."""
    from latentize.text.documents import TextWarning

    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, TextWarning):
                status.print(f"note: {message}", markup=False, soft_wrap=True)
            else:
                others(message, category, *place, **more)

        warnings.showwarning = show
        yield


# What decides how threads wait for each other, of GNU's OpenMP and of LLVM's and Intel's.
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# How often a thread of GNU's looks again before it sleeps: some 20 microseconds, in which the others mostly are ready.
_LOOKS = 1000


def _sleep_soon() -> None:
    """Threads that wait for others soon sleep, unless the environment says how they should wait.

    By default they spin, and where another program has the processor that the others need they take what is left of it.
    To sleep at once costs a fifth of a step's time, as a step is hundreds of small products (docs/memory.md).
    OpenMP reads this once, when torch is imported.
    """
    if not any(name in os.environ for name in _WAITING):
        os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": f"{_LOOKS}"}


def main() -> None:
    """Entry point: user errors end with status 2 and no traceback."""
    _sleep_soon()
    for stream in (sys.stdout, sys.stderr):
        # A name may hold what the terminal has no letters for.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with _notes_on_stderr():
            app()
    except LatentizeError as error:
        _fail(error)
    except (MemoryError, ImportError) as error:
        # So little memory that not even the libraries fit.
        if isinstance(error, ImportError) and not any(words in str(error) for words in _NO_MEMORY):
            raise
        reason = (str(error) or "the system gives no more").splitlines()[0]
        lacking = ResourceError(f"memory does not suffice: {reason}", code="LZ422", where="this process")
        # Colours need memory, and so does what libraries that are half there do at the end.
        sys.stderr.write(f"{lacking}\n")
        sys.stderr.flush()
        os._exit(2)
