"""A model on this machine, whatever it is stored as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentize.checkpoint.base import Checkpoint
from latentize.checkpoint.gguf import GgufCheckpoint, gguf_config, is_gguf
from latentize.checkpoint.reader import SafetensorsCheckpoint

__all__ = ["load_config", "open_checkpoint", "pretrained"]


def open_checkpoint(path: Path) -> Checkpoint:
    """A folder with safetensors weights, or a GGUF file.

    Args:
        path: As :func:`latentize.checkpoint.resolve` gives it.

    Raises:
        CheckpointError, ConfigError: files are missing, damaged, or contradict each other.
        UnsupportedModelError: a GGUF file that transformers does not read.
    """
    return GgufCheckpoint(path) if is_gguf(path) else SafetensorsCheckpoint(path)


def pretrained(path: Path) -> dict[str, Any]:
    """What names a model to ``from_pretrained`` of transformers.

    Args:
        path: Of a folder or a GGUF file.
    """
    if is_gguf(path):
        return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, "local_files_only": True}
    return {"pretrained_model_name_or_path": path, "local_files_only": True}


def load_config(path: Path, *, trust_remote_code: bool = False) -> Any:
    """transformers' config of a model.

    Args:
        path: Of a folder or a GGUF file.
        trust_remote_code: Whether code of the folder may be run.
    """
    if is_gguf(path):
        return gguf_config(path)
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
