"""Where output goes: looked at before anything that takes long, and written whole or not at all."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path

from latentize.errors import OutputError

__all__ = ["append_line", "require_file", "require_folder", "require_new", "write_file"]

# What is unfinished lies beside the output, under its name and so many characters more.
_LONGER = len(".partial-00000000")
_CHOOSE = "choose a folder that can be written"


def require_new(out: Path) -> None:
    """That nothing has the name of an output folder, and that it is a name that a folder can have.

    Args:
        out: The folder; it may not even be a link that leads nowhere.

    Raises:
        OutputError: something is there, or the file system has no such names.
    """
    try:
        out.lstat()
    except (FileNotFoundError, NotADirectoryError):
        parent = _nearest(out)
        # ``os.path`` says no to names that are too long; ``pathlib`` raises.
        if len(os.fsencode(out.name)) + _LONGER > os.pathconf(parent, "PC_NAME_MAX"):
            raise OutputError(
                "the name of the output folder is too long", code="LZ402", where=str(out), fix="choose a shorter one"
            ) from None
        return
    except OSError as error:
        raise OutputError(
            f"cannot create the output folder: {error.strerror}", code="LZ402", where=str(out), fix=_CHOOSE
        ) from error
    raise OutputError(
        "the output folder exists already", code="LZ401", where=str(out), fix="remove it, or choose another"
    )


def require_folder(out: Path) -> Path:
    """That a folder can be made.

    Args:
        out: The folder, or a file that is to lie beside others.

    Returns:
        The nearest folder above it that is there.

    Raises:
        OutputError: nothing can be made there.
    """
    parent = _nearest(out)
    if not parent.is_dir() or not _can_write(parent):
        raise OutputError("the output folder cannot be made there", code="LZ402", where=str(parent), fix=_CHOOSE)
    return parent


def _can_write(folder: Path) -> bool:
    """Whether something can be made in a folder; what a file system allows is known only once it was tried."""
    if not os.access(folder, os.W_OK | os.X_OK):
        return False
    trial = folder / f".latentize-{uuid.uuid4().hex[:8]}"
    try:
        trial.mkdir()
        trial.rmdir()
    except OSError:
        return False
    return True


def _nearest(out: Path) -> Path:
    return next(folder for folder in out.expanduser().absolute().parents if os.path.exists(folder))


def require_file(path: Path) -> None:
    """That a file can be written, or written again.

    Raises:
        OutputError: its folder is not there or cannot be written, or it is no file.
    """
    path = path.expanduser().absolute()
    if not os.path.isdir(path.parent):
        reason = "there is no such folder"
    elif os.path.isdir(path):
        reason = "a folder has its name"
    elif not _can_write(path.parent) or (os.path.lexists(path) and not os.access(path, os.W_OK)):
        reason = "it cannot be written"
    elif len(os.fsencode(path.name)) + _LONGER > os.pathconf(path.parent, "PC_NAME_MAX"):
        reason = "its name is too long"
    else:
        return
    raise OutputError(
        f"the file cannot be written: {reason}", code="LZ405", where=str(path), fix="choose another place, or make it"
    )


def write_file(path: Path, text: str) -> None:
    """Write a file whole; where that fails, what was there before stays.

    Characters that UTF-8 has not, which names of files may hold, are written as their numbers.

    Raises:
        OutputError: writing fails.
    """
    path = path.expanduser().absolute()
    new = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        new.write_text(text, encoding="utf-8", errors="backslashreplace")
        # A link stays one.
        new.replace(path.resolve() if path.is_symlink() else path)
    except OSError as error:
        raise OutputError(f"the file cannot be written: {error.strerror}", code="LZ405", where=str(path)) from error
    finally:
        with suppress(OSError):
            new.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Append a line whole; where that fails, the file is as it was.

    Raises:
        OutputError: writing fails.
    """
    try:
        before = path.stat().st_size if path.exists() else None
        try:
            with path.open("a", encoding="utf-8", errors="backslashreplace") as stream:
                stream.write(line + "\n")
        except OSError:
            with suppress(OSError):
                path.unlink() if before is None else os.truncate(path, before)
            raise
    except OSError as error:
        raise OutputError(f"the file cannot be written: {error.strerror}", code="LZ405", where=str(path)) from error
