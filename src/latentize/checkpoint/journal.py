"""What an unfinished conversion has finished, on disk: kill it at any moment and it goes on as if nothing had been.

``OUT.partial-<id>`` beside ``OUT`` holds what was asked for, a journal of finished steps with the tensors that took
long, and in ``out`` the output as far as it is written. A step is in the journal only when its file is on the disk.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from latentize.checkpoint.manifest import sha256
from latentize.checkpoint.places import require_new
from latentize.errors import LatentizeError, OutputError, ResumeError
from latentize.paths import expanded

__all__ = ["Journal", "locked", "sync"]

_REQUEST, _STEPS, _DONE = "request.json", "journal.jsonl", "done"


def sync(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder, before anything else is done."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def partial_folders(out: Path) -> list[Path]:
    """Folders of unfinished conversions to ``out``."""
    if not os.path.isdir(out.parent):
        return []
    names = [p for p in out.parent.iterdir() if p.name.startswith(f"{out.name}.partial-")]
    return sorted(p for p in names if (p / _REQUEST).is_file())


def bytes_in(folder: Path) -> int:
    """Of all files in a folder and those in it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class Journal:
    """The folder of an unfinished conversion; it is made by :meth:`begin`.

    Use as a context manager: leaving it removes the folder, unless an interruption or a full disk ends a conversion
    that has finished something.

    Args:
        out: Where the result will be.
        resume: Go on with what is there.

    Attributes:
        folder: Once it has begun.
        done: What :meth:`finish` was given, if ``out`` is whole and only its journal was not removed yet.

    Raises:
        OutputError: ``out`` exists.
        ResumeError: something is there and ``resume`` was not asked for, or there is more than one.
    """

    def __init__(self, out: Path, *, resume: bool = False) -> None:
        self.out = expanded(out).absolute()
        self._leftover: Path | None = None
        found = partial_folders(self.out)
        self.done = self._finished(found) if resume and os.path.exists(self.out) else None
        if self.done is None:
            require_new(self.out)
        if found and not resume:
            raise self._of_another(found[0])
        self.folder: Path | None = None
        self._found = found
        self._steps: dict[str, dict[str, Any]] = {}
        self._stream: TextIO | None = None
        self._went_on = False

    def _of_another(self, folder: Path) -> ResumeError:
        """What to say of an unfinished conversion that is not this one."""
        if at_work(folder):
            return ResumeError(
                "another conversion writes there", code="LZ413", where=str(folder), fix="wait for it, or end it first"
            )
        return ResumeError(
            "an unfinished conversion is there",
            code="LZ411",
            where=str(folder),
            fix="go on with --resume, or remove that folder",
        )

    def _finished(self, found: Iterable[Path]) -> dict[str, Any] | None:
        for folder in found:
            steps, _ = _read(folder / _STEPS)
            if _DONE in steps:
                self._leftover = folder
                return steps[_DONE]["facts"]
        return None

    def begin(self, request: Mapping[str, Any]) -> None:
        """Make the folder, or go on with the one of the same request.

        Args:
            request: What decides the bytes of the result, by name.

        Raises:
            ResumeError: what is there was asked for something else, or another process is at it.
            OutputError: the folder cannot be made.
        """
        wanted = json.dumps(request, indent=2, sort_keys=True) + "\n"
        identity = hashlib.sha256(wanted.encode()).hexdigest()[:8]
        self.folder = self.out.with_name(f"{self.out.name}.partial-{identity}")
        others = [path for path in self._found if path != self.folder]
        if others:
            raise self._of_another(others[0]) if at_work(others[0]) else _of_something_else(others[0], request)
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with _alone_in(self.folder.parent):
                # One that has begun since this one looked.
                later = [path for path in partial_folders(self.out) if path not in (self.folder, *self._found)]
                if later:
                    raise self._of_another(later[0])
                self.folder.mkdir(exist_ok=True)
                self._stream = locked(self.folder / _STEPS)
                if not (self.folder / _REQUEST).is_file():
                    # Complete before it has its name: whoever finds it can compare it.
                    new = self.folder / "request.new"
                    new.write_text(wanted, encoding="utf-8")
                    sync(new)
                    new.rename(self.folder / _REQUEST)
                    sync(self.folder)
        except OSError as error:
            raise OutputError(
                f"cannot create the output folder: {error.strerror}",
                code="LZ402",
                where=str(self.out),
                fix="choose a folder that can be written",
            ) from error
        self._steps, length = _read(self.folder / _STEPS)
        self._went_on = bool(self._steps)
        # A line that was being written when the process was killed.
        self._stream.truncate(length)

    @property
    def worth(self) -> bool:
        """Whether something was finished that took long."""
        return any(step["file"] for step in self._steps.values())

    def facts(self, step: str) -> Any:
        """What was noted with a finished step, or ``None``; one whose file is gone or damaged is not finished."""
        found = self._steps.get(step)
        if found is None or self.folder is None:
            return None
        if found["file"] is not None:
            path = self.folder / found["file"]
            if not path.is_file() or sha256(path) != found["sha256"]:
                return None
        return found["facts"]

    def tensors(self, step: str) -> tuple[dict[str, Any], Any] | None:
        """Tensors and facts of a finished step, or ``None``."""
        from safetensors.torch import load_file

        facts = self.facts(step)
        if facts is None or self.folder is None:
            return None
        return load_file(str(self.folder / self._steps[step]["file"])), facts

    def keep(self, step: str, tensors: Mapping[str, Any], facts: Any) -> None:
        """A step is finished, and these are its tensors.

        Raises:
            OutputError: they cannot be written.
        """
        from safetensors.torch import save_file

        assert self.folder is not None
        path = self.folder / f"{step.replace(' ', '-')}.safetensors"
        try:
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, str(path))
        except Exception as error:
            raise self._unwritten(str(error), path) from error
        self.note(step, facts, path)

    def note(self, step: str, facts: Any, path: Path | None = None) -> None:
        """A step is finished, and what it wrote is in ``path``.

        Raises:
            OutputError: that cannot be written.
        """
        assert self.folder is not None and self._stream is not None
        entry: dict[str, Any] = {"step": step, "file": None, "sha256": None, "facts": facts}
        try:
            if path is not None:
                sync(path)
                sync(path.parent)
                entry |= {"file": str(path.relative_to(self.folder)), "sha256": sha256(path)}
            self._stream.write(json.dumps(entry) + "\n")
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise self._unwritten(error.strerror or str(error), self.folder) from error
        self._steps[step] = entry

    def _unwritten(self, reason: str, path: Path) -> OutputError:
        fix = "make room on the disk" + (", then go on with --resume" if self.worth else "")
        return OutputError(f"cannot write what was finished: {reason}", code="LZ403", where=str(path), fix=fix)

    def finish(self, report: Any) -> None:
        """All is written; what follows is one rename."""
        self.note(_DONE, report)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What is wrong with the input will be wrong again.
        mended = not isinstance(error, LatentizeError) or isinstance(error, OutputError) or self._went_on
        kept = error is not None and mended and self.worth
        if self._stream is not None and not kept:
            self.remove()
        if self._stream is not None:
            self._stream.close()

    def remove(self) -> None:
        """Remove the folder, its journal last: until then it can be told what this is."""
        folder = self.folder or self._leftover
        assert folder is not None
        for path in folder.iterdir():
            if path.name not in (_REQUEST, _STEPS):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        for name in (_REQUEST, _STEPS):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def _of_something_else(folder: Path, request: Mapping[str, Any]) -> ResumeError:
    try:
        before = json.loads((folder / _REQUEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    other = [name for name in request if not isinstance(before, dict) or before.get(name) != request[name]]
    return ResumeError(
        f"the unfinished conversion is of something else: {', '.join(other)} differ",
        code="LZ412",
        where=str(folder),
        fix="use the same model, text and options, or remove that folder and start again",
    )


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """No two processes are in here at a time, where the file system can keep them apart."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def at_work(folder: Path) -> bool:
    """Whether a process is at an unfinished conversion."""
    try:
        with (folder / _STEPS).open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def locked(path: Path) -> TextIO:
    """The file, to append to; it stays locked until it is closed, or its process is gone."""
    stream = path.open("a", encoding="utf-8")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        raise ResumeError(
            "another process is at it",
            code="LZ413",
            where=str(path.parent),
            fix="wait for it, or end it first",
        ) from None
    return stream


def _read(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Finished steps by name, and how many bytes of the journal they are; what follows was never finished."""
    steps, length = {}, 0
    if not path.is_file():
        return steps, length
    with path.open("rb") as stream:
        for line in stream:
            try:
                entry = json.loads(line)
                steps[entry["step"]] = {key: entry[key] for key in ("file", "sha256", "facts")}
            except (ValueError, KeyError, TypeError):
                break
            if not line.endswith(b"\n"):
                break
            length += len(line)
    return steps, length
