"""What others say of a checkpoint's bytes, where they do: the hub, or a manifest of ours.

A bit that flipped inside a tensor gives another finite number, which no structure forbids; only a checksum tells.
"""

from __future__ import annotations

import re
from pathlib import Path

from latentize.checkpoint.base import Checkpoint
from latentize.checkpoint.manifest import MANIFEST_NAME, Manifest, sha256
from latentize.checkpoint.streaming import remote_of
from latentize.errors import CheckpointError

__all__ = ["source_hashes"]

_SHA256 = re.compile(r"[0-9a-f]{64}")


def source_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """SHA-256 of the weight files, by name.

    Raises:
        CheckpointError: a file is not what the hub, or latentize, wrote.
    """
    source, found = checkpoint.path, {}
    if (remote := remote_of(source)) is not None:
        # They would have to be read for it; what the hub says of this commit is what is read.
        return {path.name: remote.hashes.get(path.name, remote.revision) for path in checkpoint.files}
    ours = Manifest.load(source).files if (source / MANIFEST_NAME).is_file() else {}
    for path in checkpoint.files:
        found[path.name] = sha256(path)
        expected = ours.get(path.name) or _of_the_hub(path)
        if expected is not None and found[path.name] != expected:
            raise CheckpointError(
                f"the file is not what was published: its SHA-256 should begin with {expected[:12]}",
                code="LZ114",
                where=str(path),
                fix="download the file again",
            )
    return found


def _of_the_hub(path: Path) -> str | None:
    """The SHA-256 that the hub's cache, or its notes beside a local copy, have of a file."""
    # In a cache a file is a link to a blob of this name.
    if path.is_symlink() and _SHA256.fullmatch(path.resolve().name):
        return path.resolve().name
    note = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    try:
        # Commit, hash, time.
        _, etag, *_ = note.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return None
    return etag.strip() if _SHA256.fullmatch(etag.strip()) else None
