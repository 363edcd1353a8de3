"""Paths as users write them."""

from __future__ import annotations

from pathlib import Path

__all__ = ["expanded"]


def expanded(path: str | Path) -> Path:
    """A path whose ``~`` or ``~user`` is the home folder; that of an unknown user stays as it is, as in a shell.

    A shell leaves ``~`` alone in quotes, after ``=`` and in files, so every path that a user gives goes through here.

    Args:
        path: As it was given.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        # Absolute, so that nobody takes it for a user's name again.
        return Path(path).absolute()
