"""Writing an output folder so that it is either whole or not there.

Everything goes into ``OUT.partial-<id>`` beside ``OUT``, or into a folder inside it where a journal is kept; the index,
then the config, then the manifest with the hashes come last; one rename makes it ``OUT``.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

from latentize.checkpoint.base import is_finite
from latentize.checkpoint.gguf import is_gguf, save_gguf_tokenizer
from latentize.checkpoint.journal import Journal, sync
from latentize.checkpoint.manifest import MANIFEST_NAME, Manifest, sha256
from latentize.checkpoint.opening import told_config
from latentize.checkpoint.places import require_new
from latentize.checkpoint.reader import INDEX_NAME, SINGLE_NAME
from latentize.errors import NumericsError, OutputError
from latentize.paths import expanded

__all__ = ["NoFolder", "OutputFolder"]

# What gathers in memory before it is written; so files are smaller than is usual.
SHARD_BYTES = 256 << 20
_SHARD = "shard-"
_LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*")
# Where transformers looks for chat templates beside the default one.
_TEMPLATES = "additional_chat_templates/*.jinja"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def has_tokenizer_code(source: Path) -> bool:
    """Whether the tokenizer of a checkpoint is made by code that lies beside it."""
    try:
        entries = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    # It may be absent; one that is damaged is told when it is loaded.
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(entries, dict) and bool(entries.get("auto_map"))


def copied_files(source: Path, *, processor: bool = False) -> list[Path]:
    """Files of a checkpoint that belong to the tokenizer, to generation and to the licence.

    Args:
        source: Its folder.
        processor: Whether those that say how to see and hear are wanted as well.
    """
    licence = [path for pattern in _LICENCE_FILES for path in sorted(source.glob(pattern))]
    licence += sorted(source.glob("*.py")) if has_tokenizer_code(source) else []
    named = (source / name for name in (*_TOKENIZER_FILES, *(_PROCESSOR_FILES if processor else ())))
    return [path for path in (*named, *sorted(source.glob(_TEMPLATES)), *licence) if path.is_file()]


def save_rest_of_tokenizer(source: Path, folder: Path) -> None:
    """Save what transformers saves of a tokenizer where the folder lacks it; what it has was copied, and stays.

    Args:
        source: A folder with a tokenizer.
        folder: Where to.
    """
    from transformers import AutoTokenizer

    if has_tokenizer_code(source):
        # Not to be run here; its files are copied.
        return
    with TemporaryDirectory() as made:
        # It was loaded for its text. What cannot be saved is there as it was in the source.
        try:
            # Without the last transformers asks whoever sits there whether the model's code may be run.
            options: dict[str, Any] = {**told_config(source), "local_files_only": True, "trust_remote_code": False}
            AutoTokenizer.from_pretrained(source, **options).save_pretrained(made)
        except MemoryError:
            raise
        except Exception:
            return
        for path in sorted(p for p in Path(made).rglob("*") if p.is_file()):
            there = folder / path.relative_to(made)
            if not there.exists():
                there.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, there)


class NoFolder:
    """In the place of an :class:`OutputFolder` in a process that writes nothing."""

    def add(self, name: str, tensor: Any) -> None: ...

    def make_room(self, size: int) -> None: ...


class OutputFolder:
    """A checkpoint being written.

    Use as a context manager: leaving it by an exception removes the partial folder. With a journal that is the
    journal's to do, and shards that it knows to be finished are not written again.

    Args:
        out: Final folder; must not exist.
        shard_bytes: Tensors are flushed to a file when this much has gathered.
        journal: Of a conversion that can be resumed; it has begun.

    Raises:
        OutputError: ``out`` exists, or its parent cannot be written.
    """

    def __init__(self, out: Path, *, shard_bytes: int = SHARD_BYTES, journal: Journal | None = None) -> None:
        self.out, self._journal = expanded(out).absolute(), journal
        require_new(self.out)
        self.partial = self.out.with_name(f"{self.out.name}.partial-{uuid.uuid4().hex[:8]}")
        if journal is not None:
            assert journal.folder is not None
            self.partial = journal.folder / "out"
        try:
            self.partial.mkdir(parents=True, exist_ok=journal is not None)
            # Config and index come last, in a conversion that goes on as well.
            for path in self.partial.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif not path.name.startswith(_SHARD):
                    path.unlink()
        except OSError as error:
            raise OutputError(
                f"cannot create the output folder: {error.strerror}",
                code="LZ402",
                where=str(out),
                fix="choose a folder that can be written",
            ) from error
        self._shard_bytes = shard_bytes
        self._pending: dict[str, Any] = {}
        self._pending_bytes = 0
        self._shards: list[dict[str, int]] = []

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._journal is None and self.partial.exists():
            shutil.rmtree(self.partial, ignore_errors=True)

    def _unwritten(self, what: str, error: BaseException, path: Path) -> OutputError:
        reason = getattr(error, "strerror", None) or str(error)
        kept = self._journal is not None and self._journal.worth
        fix = "make room on the disk, or choose another" + ("; then go on with --resume" if kept else "")
        return OutputError(f"cannot {what}: {reason}", code="LZ403", where=str(path), fix=fix)

    def add(self, name: str, tensor: Any) -> None:
        """Append one tensor; it is on disk at the latest when the folder is finished.

        Raises:
            NumericsError: it holds NaN or infinity.
            OutputError: writing fails.
        """
        if tensor.is_floating_point() and not is_finite(tensor):
            raise NumericsError("a converted weight is not finite", where=f"tensor {name}")
        size = tensor.numel() * tensor.element_size()
        self.make_room(size)
        self._pending[name] = tensor.detach().contiguous()
        self._pending_bytes += size
        # Nothing will go into the same file: it need not wait for what comes next.
        if self._pending_bytes >= self._shard_bytes:
            self._flush()

    def make_room(self, size: int) -> None:
        """Write what has gathered now, if a tensor of ``size`` bytes would not go into the same file.

        Raises:
            OutputError: writing fails.
        """
        if self._pending and self._pending_bytes + size > self._shard_bytes:
            self._flush()

    def _flush(self) -> None:
        from safetensors.torch import save_file

        if not self._pending:
            return
        number, sizes = len(self._shards), {n: t.numel() * t.element_size() for n, t in self._pending.items()}
        path, step = self._shard_path(number), f"shard {number}"
        if self._journal is None or self._journal.facts(step) != sizes:
            try:
                save_file(self._pending, str(path), metadata={"format": "pt"})
                # safetensors lets nobody else read it; the folder says who may.
                path.chmod(self.partial.stat().st_mode & 0o666)
                sync(path)
            except Exception as error:
                raise self._unwritten("write weights", error, path) from error
            if self._journal is not None:
                self._journal.note(step, sizes, path)
        self._shards.append(sizes)
        self._pending, self._pending_bytes = {}, 0

    def _shard_path(self, number: int) -> Path:
        return self.partial / f"{_SHARD}{number:05d}.safetensors"

    def copy_tokenizer(self, source: Path, *, processor: bool = False) -> None:
        """Copy the files that belong to the tokenizer, to generation and to the licence, where the source has them.

        Args:
            source: A folder; or a GGUF file, of which they are made.
            processor: As of :func:`copied_files`.

        Raises:
            OutputError: writing fails.
        """
        if is_gguf(source):
            try:
                save_gguf_tokenizer(source, self.partial)
            except OSError as error:
                raise self._unwritten("write the tokenizer", error, self.partial) from error
            return
        for path in copied_files(source, processor=processor):
            try:
                there = self.partial / path.relative_to(source)
                there.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, there)
            except OSError as error:
                raise self._unwritten("copy the tokenizer", error, path) from error
        try:
            save_rest_of_tokenizer(source, self.partial)
        except OSError as error:
            raise self._unwritten("write the tokenizer", error, self.partial) from error

    def write_text(self, name: str, text: str) -> None:
        try:
            # A name may hold what UTF-8 has not.
            (self.partial / name).write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise self._unwritten("write", error, self.partial / name) from error

    def finish_model(self, config: dict[str, Any]) -> None:
        """Write what is left of the weights, index and config: from then on the partial folder can be loaded.

        Raises:
            OutputError: writing fails.
        """
        self._flush()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        try:
            for number, tensors in enumerate(self._shards):
                name = SINGLE_NAME if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
                self._shard_path(number).rename(self.partial / name)
                weight_map.update(dict.fromkeys(tensors, name))
            if count > 1:
                total = sum(sum(t.values()) for t in self._shards)
                index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
                self.write_text(INDEX_NAME, json.dumps(index, indent=2) + "\n")
            self.write_text("config.json", json.dumps(config, indent=2) + "\n")
        except OSError as error:
            raise self._unwritten("finish the output", error, self.out) from error
        self._shards = []

    def finish(self, config: dict[str, Any], manifest: Manifest, last: Callable[[Path], object] | None = None) -> None:
        """Write what :meth:`finish_model` has not written yet, then the manifest, and rename to the final name.

        Args:
            config: ``config.json``.
            manifest: Gets the hashes.
            last: Called with the folder before it is renamed; may add files that the manifest does not hash.

        Raises:
            OutputError: writing fails; nothing is left at ``out``.
        """
        if self._pending or self._shards:
            self.finish_model(config)
        try:
            manifest.files = {n: sha256(p) for n, p in self._files().items() if n != MANIFEST_NAME}
            self.write_text(MANIFEST_NAME, manifest.dumps())
            if last is not None:
                last(self.partial)
            for path in sorted(self.partial.rglob("*")):
                sync(path)
            sync(self.partial)
            self._rename()
            sync(self.out.parent)
        except OSError as error:
            raise self._unwritten("finish the output", error, self.out) from error

    def _files(self) -> dict[str, Path]:
        """All files that are written, by their path in the folder."""
        found = sorted(path for path in self.partial.rglob("*") if path.is_file())
        return {path.relative_to(self.partial).as_posix(): path for path in found}

    def _rename(self) -> None:
        try:
            self.partial.rename(self.out)
        except OSError as error:
            if not os.path.lexists(self.out):
                raise
            kept = self._journal is not None and self._journal.worth
            raise OutputError(
                "something else has been written there meanwhile",
                code="LZ406",
                where=str(self.out),
                fix="move it away, " + ("then go on with --resume" if kept else "or choose another folder"),
            ) from error
