"""A model on this machine, whatever it is stored as."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from latentize.checkpoint.base import Checkpoint
from latentize.checkpoint.gguf import GgufCheckpoint, is_gguf
from latentize.checkpoint.gguf_config import gguf_config
from latentize.checkpoint.quantised import is_read, quantised
from latentize.checkpoint.reader import SafetensorsCheckpoint, read_json
from latentize.checkpoint.streaming import StreamedCheckpoint, remote_of
from latentize.checkpoint.towers import read_config, renamed
from latentize.errors import CheckpointError, ConfigError, LatentizeError

__all__ = ["load_config", "loading", "open_checkpoint", "pretrained", "told_config"]


def open_checkpoint(path: Path) -> Checkpoint:
    """A folder with safetensors weights, quantised or not, or a GGUF file.

    Args:
        path: As :func:`latentize.checkpoint.resolve` gives it.

    Raises:
        CheckpointError, ConfigError: files are missing, damaged, or contradict each other.
        UnsupportedModelError: a GGUF file that transformers does not read.
    """
    if is_gguf(path):
        return GgufCheckpoint(path)
    remote = remote_of(path)
    return quantised(SafetensorsCheckpoint(path) if remote is None else StreamedCheckpoint(path, remote))


def pretrained(path: Path) -> dict[str, Any]:
    """What names a model to ``from_pretrained`` of transformers.

    Args:
        path: Of a folder or a GGUF file.
    """
    if is_gguf(path):
        return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, "local_files_only": True}
    return {"pretrained_model_name_or_path": path, "local_files_only": True}


@contextmanager
def loading(path: Path) -> Iterator[None]:
    """While transformers loads a model: whatever it raises becomes an error of ours.

    Args:
        path: Of the model.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    try:
        yield
    # So little memory that a library does not fit shows as an import that fails.
    except (LatentizeError, MemoryError, ImportError):
        raise
    # What an entry that makes no sense raises depends on where it is read.
    except Exception as error:
        reason = str(error) or repr(error)
        raise CheckpointError(f"transformers cannot load the model: {reason}", where=str(path)) from error


def _renamed(path: Path) -> dict[str, Any] | None:
    stated = read_json(path / "config.json", ConfigError, "LZ102")
    known = renamed(stated)
    return None if known is stated else known


def told_config(path: Path) -> dict[str, Any]:
    """What transformers has to be told of a model's config because it would not read it so by itself."""
    return {} if is_gguf(path) or _renamed(path) is None else {"config": load_config(path)}


def load_config(path: Path, *, trust_remote_code: bool = False) -> Any:
    """transformers' config of a model, without what is said of weights that are read dequantised.

    Of a multimodal model that of its language model.

    Args:
        path: Of a folder or a GGUF file.
        trust_remote_code: Whether code of the folder may be run.
    """
    if is_gguf(path):
        return gguf_config(path)
    from transformers import AutoConfig

    known = _renamed(path)
    if known is not None:
        config: Any = AutoConfig.for_model(**known)
    else:
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
        config = read_config(AutoConfig.from_pretrained(path, **options))
    if is_read(config.to_dict()):
        del config.quantization_config
    return config
