"""``latentize.json``: what was done, to what, with which result."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from latentize.errors import CheckpointError

__all__ = ["MANIFEST_NAME", "Manifest", "sha256"]

MANIFEST_NAME = "latentize.json"


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions that decide the bytes of an output."""
    found = {"python": platform.python_version()}
    for name in ("latentize", "torch", "transformers", "safetensors", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


@dataclass
class Manifest:
    """Contents of ``latentize.json``.

    Attributes:
        format: ``"native"``, ``"deepseek_v3"`` or, for head pooling, the source's own ``model_type``.
        source: Name of the source model, and hashes of its weight files.
        recipe: Everything that decided the result.
        layers: One entry a layer: its spec and the errors measured.
        measurements: Quality numbers, with what they were measured on.
        notes: What is approximate or was left out, in sentences.
        files: File → SHA-256.
        healing: What was done after the conversion, and with which result; oldest first.
    """

    format: str
    source: dict[str, Any]
    recipe: dict[str, Any]
    layers: list[dict[str, Any]] = field(default_factory=list)
    measurements: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=versions)
    healing: list[dict[str, Any]] = field(default_factory=list)

    def dumps(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        path = folder / MANIFEST_NAME
        try:
            return cls(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            raise CheckpointError(
                "the folder has no manifest",
                code="LZ118",
                where=str(path),
                fix="only outputs of latentize can be verified",
            ) from None
        except (ValueError, TypeError, RecursionError, OSError) as error:
            raise CheckpointError(f"the manifest is damaged: {error}", code="LZ118", where=str(path)) from error
