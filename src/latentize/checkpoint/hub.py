"""A model's name to a folder, or a GGUF file, on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from latentize.checkpoint.gguf import SUFFIX, only_gguf
from latentize.checkpoint.streaming import stream
from latentize.errors import CheckpointError
from latentize.paths import expanded

__all__ = ["resolve"]

# Never pickles, never code.
_WEIGHTS = "*.safetensors"
_WANTED = [_WEIGHTS, "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja"]
# The licence, and the card, which names it.
_WANTED += ["README.md", "LICENSE*", "LICENCE*", "NOTICE*"]


def resolve(model: str | Path, *, revision: str | None = None, code: bool = False, streamed: bool = False) -> Path:
    """Where ``model`` is here: the folder itself, its one GGUF file, or a hub snapshot, downloaded once and cached.

    Args:
        model: A folder, a GGUF file or a hub id.
        revision: Of the hub's.
        code: Download the model's own code, too.
        streamed: Download no weights: they are read from the hub as they are needed.

    Raises:
        CheckpointError: neither something here nor a model that the hub (or its cache) has; or a folder with several
            GGUF files.
    """
    path = expanded(model)
    # ``os.path`` says no to names that are too long; ``pathlib`` raises.
    if os.path.isdir(path):
        folder = path.resolve()
        return only_gguf(folder) or folder
    name = str(model)
    if path.suffix == SUFFIX and os.path.isfile(path):
        # Not resolved: in the hub's cache it is a link to a blob without the suffix.
        return path.absolute()
    if os.path.exists(path):
        raise CheckpointError(
            "the model should be a folder or a GGUF file, not another file",
            where=name,
            fix=f"give the folder that it lies in, or a file whose name ends in {SUFFIX}",
        )
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(
            "there is no such folder or file, and it is not a hub id either",
            where=name,
            fix="check the path; a hub id looks like 'organisation/name'",
        )
    from huggingface_hub import snapshot_download

    wanted = [pattern for pattern in _WANTED if not streamed or pattern != _WEIGHTS] + (["*.py"] if code else [])
    try:
        if streamed:
            return stream(name, wanted, revision)
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:
        raise CheckpointError(
            f"cannot get the model from the hub: {str(error).splitlines()[0]}",
            where=name,
            fix="check the name, the network and your access (huggingface-cli login), or pass a local folder",
        ) from error
