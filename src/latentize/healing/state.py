"""Where a healing stands, on disk: kill it at any moment and it goes on as if nothing had been.

A folder beside the output holds what it was asked for, its metrics and the last state. A state is what learns, the
optimisers' moments and the best that was seen, in PyTorch's distributed format, so that any number of processes can go
on with it. It is complete before it takes the place of the one before.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from latentize.checkpoint.journal import locked, sync
from latentize.checkpoint.places import require_folder, require_new
from latentize.errors import OptionError, OutputError
from latentize.healing.parallel import Team
from latentize.healing.tracking import Tracking

__all__ = ["Workspace"]

_LEARNT = StateDictOptions(ignore_frozen_params=True, strict=False)


class Workspace:
    """The folder of a healing that is not finished; it is made by :meth:`begin`.

    Args:
        out: Where the result will be.
        request: What decides the result; a state of another request is refused.
        resume: Go on with what is there.
        team: The processes.
        track: Where else metrics go; see :class:`latentize.healing.tracking.Tracking`.

    Raises:
        OutputError: ``out`` exists, or something is there and ``resume`` was not asked for.
        OptionError: what is there was asked for something else.
    """

    def __init__(
        self, out: Path, request: dict[str, Any], *, resume: bool, team: Team, track: str | None = None
    ) -> None:
        self.folder = out.with_name(out.name + ".healing")
        self.metrics = self.folder / "metrics.jsonl"
        self._request, self._state, self._team = self.folder / "request.json", self.folder / "state", team
        require_new(out)
        require_folder(out)
        wanted = json.dumps(request, indent=2, sort_keys=True) + "\n"
        there = self._request.is_file()
        if there and not resume:
            raise OutputError(
                "an unfinished healing is there",
                code="LZ411",
                where=str(self.folder),
                fix="go on with --resume, or remove it",
            )
        self._wanted = wanted
        self._lock: TextIO | None = None
        self._require_same()
        self._tracking = Tracking(track if team.leads else None, out)

    def begin(self) -> None:
        """Make the folder, if it is not there yet; it stays locked until :meth:`release`.

        Raises:
            OutputError: it cannot be written.
            ResumeError: another healing is at it.
        """
        # Nobody may make it while another one still looks whether it is there.
        self._team.wait()
        if self._team.leads:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock = locked(self.folder / "lock")
                if not self._request.is_file():
                    self._request.write_text(self._wanted)
            except OSError as error:
                raise OutputError(
                    f"cannot be written: {error.strerror}", code="LZ402", where=str(self.folder)
                ) from error
            # One that began since this one looked, and is gone again.
            self._require_same()
        self._team.wait()

    def release(self) -> None:
        """Nobody is at it any more."""
        if self._lock is not None:
            self._lock.close()

    def _require_same(self) -> None:
        if self._request.is_file() and self._request.read_text() != self._wanted:
            raise OptionError(
                "the unfinished healing was asked for something else",
                code="LZ412",
                where=str(self._request),
                fix="use the same models and options, or remove the folder and start again",
            )

    def write(
        self, step: int, student: Any, optimisers: list[Any], best: dict[str, Any], facts: dict[str, Any]
    ) -> None:
        """Keep the state after ``step`` steps."""
        new, old = self.folder / "state.new", self.folder / "state.old"
        if self._team.leads:
            shutil.rmtree(new, ignore_errors=True)
        self._team.wait()
        with _quietly():
            save(self._tensors(student, optimisers, best), checkpoint_id=str(new))
        self._team.wait()
        if self._team.leads:
            (new / "facts.json").write_text(json.dumps({"step": step, **facts}))
            shutil.rmtree(old, ignore_errors=True)
            if self._state.exists():
                self._state.rename(old)
            new.rename(self._state)
            sync(self.folder)
            shutil.rmtree(old, ignore_errors=True)
        self._team.wait()

    def read(self, student: Any, optimisers: list[Any], best: dict[str, Any]) -> dict[str, Any] | None:
        """Restore the last state, in place; what was kept with it, or ``None`` if there is none yet."""
        found = next((p for p in (self._state, self.folder / "state.old") if (p / "facts.json").is_file()), None)
        if found is None:
            self._cut_metrics(-1)
            return None
        tensors = self._tensors(student, optimisers, best)
        with _quietly():
            load(tensors, checkpoint_id=str(found))
        set_model_state_dict(student, tensors["model"], options=_LEARNT)
        for number, optimiser in enumerate(optimisers):
            set_optimizer_state_dict(student, optimiser, tensors[f"optimiser {number}"], options=_LEARNT)
        for name, tensor in best.items():
            tensor.copy_(tensors["best"][name])
        facts = json.loads((found / "facts.json").read_text())
        self._cut_metrics(facts["step"])
        return facts

    def _tensors(self, student: Any, optimisers: list[Any], best: dict[str, Any]) -> dict[str, Any]:
        moments = {
            f"optimiser {n}": get_optimizer_state_dict(student, o, options=_LEARNT) for n, o in enumerate(optimisers)
        }
        return {"model": get_model_state_dict(student, options=_LEARNT), **moments, "best": best}

    def _cut_metrics(self, step: int) -> None:
        """Forget what was done after the state."""
        if self._team.leads and self.metrics.is_file():
            lines = self.metrics.read_text().splitlines()
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            self.metrics.write_text("".join(line + "\n" for line in kept))

    def note(self, step: int, **entries: Any) -> None:
        """One line of metrics."""
        if self._team.leads:
            with self.metrics.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"step": step, **entries}) + "\n")
            self._tracking.note(step, entries)

    def remove(self) -> None:
        """All is done."""
        self._tracking.end()
        self._team.wait()
        if self._team.leads:
            shutil.rmtree(self.folder)


@contextmanager
def _quietly() -> Iterator[None]:
    """PyTorch warns that there is one process only; that may be so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def learnt(student: Any) -> dict[str, Any]:
    """What learns, gathered from all processes onto the first one's CPU."""
    options = StateDictOptions(ignore_frozen_params=True, full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(student, options=options)
