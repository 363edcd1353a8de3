"""Writing an output folder so that it is either whole or not there.

Everything goes into ``OUT.partial-<id>`` beside ``OUT``; the index, then the config, then the manifest with
the hashes come last; one rename makes it ``OUT``.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from latentize.checkpoint.manifest import MANIFEST_NAME, Manifest, sha256
from latentize.checkpoint.reader import INDEX_NAME, SINGLE_NAME
from latentize.errors import OutputError

__all__ = ["OutputFolder"]

# What gathers in memory before it is written; so files are smaller than is usual.
SHARD_BYTES = 256 << 20
_LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def sync(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder, before anything else is done."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class OutputFolder:
    """A checkpoint being written.

    Use as a context manager: leaving it by an exception removes the partial folder.

    Args:
        out: Final folder; must not exist.
        shard_bytes: Tensors are flushed to a file when this much has gathered.

    Raises:
        OutputError: ``out`` exists, or its parent cannot be written.
    """

    def __init__(self, out: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
        self.out = out.expanduser().absolute()
        if self.out.exists():
            raise OutputError("the output folder exists already", where=str(out), fix="remove it, or choose another")
        self.partial = self.out.with_name(f"{self.out.name}.partial-{uuid.uuid4().hex[:8]}")
        try:
            self.partial.mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"cannot create the output folder: {error.strerror}", where=str(out)) from error
        self._shard_bytes = shard_bytes
        self._pending: dict[str, Any] = {}
        self._pending_bytes = 0
        self._shards: list[dict[str, int]] = []

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.partial.exists():
            shutil.rmtree(self.partial, ignore_errors=True)

    def add(self, name: str, tensor: Any) -> None:
        """Append one tensor; it is on disk at the latest when the folder is finished."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._shard_bytes:
            self._flush()
        self._pending[name] = tensor.detach().contiguous()
        self._pending_bytes += size

    def _flush(self) -> None:
        from safetensors.torch import save_file

        if not self._pending:
            return
        path = self._shard_path(len(self._shards))
        try:
            save_file(self._pending, str(path), metadata={"format": "pt"})
            # safetensors lets nobody else read it; the folder says who may.
            path.chmod(self.partial.stat().st_mode & 0o666)
            sync(path)
        except Exception as error:
            raise OutputError(f"cannot write weights: {error}", where=str(path)) from error
        self._shards.append({n: t.numel() * t.element_size() for n, t in self._pending.items()})
        self._pending, self._pending_bytes = {}, 0

    def _shard_path(self, number: int) -> Path:
        return self.partial / f"shard-{number:05d}.safetensors"

    def copy_tokenizer(self, source: Path) -> None:
        """Copy the files that belong to the tokenizer, to generation and to the licence, where the source has them."""
        licence = [path.name for pattern in _LICENCE_FILES for path in sorted(source.glob(pattern))]
        for name in (*_TOKENIZER_FILES, *licence):
            if (source / name).is_file():
                shutil.copyfile(source / name, self.partial / name)

    def write_text(self, name: str, text: str) -> None:
        (self.partial / name).write_text(text, encoding="utf-8")

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
            raise OutputError(f"cannot finish the output: {error.strerror}", where=str(self.out)) from error
        self._shards = []

    def finish(self, config: dict[str, Any], manifest: Manifest) -> None:
        """Write what :meth:`finish_model` has not written yet, then the manifest, and rename to the final name.

        Raises:
            OutputError: writing fails; nothing is left at ``out``.
        """
        if self._pending or self._shards:
            self.finish_model(config)
        try:
            manifest.files = {p.name: sha256(p) for p in sorted(self.partial.iterdir()) if p.name != MANIFEST_NAME}
            self.write_text(MANIFEST_NAME, manifest.dumps())
            for path in self.partial.iterdir():
                sync(path)
            sync(self.partial)
            self.partial.rename(self.out)
            sync(self.out.parent)
        except OSError as error:
            raise OutputError(f"cannot finish the output: {error.strerror}", where=str(self.out)) from error
