"""Metrics where people watch them: TensorBoard or trackio, by accelerate's trackers. They are in JSONL in any case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentize.errors import OptionError

__all__ = ["TRACKERS", "Tracking"]

TRACKERS = ("tensorboard", "trackio")


class Tracking:
    """Passes numbers on, if it was asked to.

    Args:
        name: One of ``TRACKERS``, or ``None``.
        out: Where the result will be; TensorBoard's files go to ``runs/`` beside it.

    Raises:
        OptionError: no such tracker, or it is not installed.
    """

    def __init__(self, name: str | None, out: Path) -> None:
        self._tracker: Any = None
        if name is None:
            return
        if name not in TRACKERS:
            raise OptionError(f"no such tracker: '{name}'", where="--track", fix=" or ".join(TRACKERS))
        try:
            from accelerate import PartialState
            from accelerate.tracking import LOGGER_TYPE_TO_CLASS

            # Its trackers ask it which process they are in.
            PartialState(cpu=True)
            options = {"logging_dir": out.parent / "runs"} if name == "tensorboard" else {}
            self._tracker = LOGGER_TYPE_TO_CLASS[name](out.name, **options)
            self._tracker.start()
        except ImportError as error:
            raise OptionError(
                f"{name} is not there: {error}", where="--track", fix=f"pip install accelerate {name}"
            ) from None

    def note(self, step: int, entries: dict[str, Any]) -> None:
        """The numbers of a step; those of a look under ``held_out/``."""
        if self._tracker is not None:
            looked = {f"held_out/{k}": v for k, v in entries.get("held_out", {}).items()}
            plain = {k: v for k, v in entries.items() if isinstance(v, int | float)}
            self._tracker.log({**plain, **looked}, step=step)

    def end(self) -> None:
        """All was passed on."""
        if self._tracker is not None:
            self._tracker.finish()
