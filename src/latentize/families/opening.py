"""A checkpoint, held against its family's table."""

from __future__ import annotations

from pathlib import Path

import torch

from latentize.checkpoint import Checkpoint, load_config, open_checkpoint, resolve
from latentize.errors import ConfigError
from latentize.families.config import model_spec, require_supported
from latentize.families.model import ModelSpec
from latentize.families.stored import match_tensors

__all__ = ["checked_spec", "open_source"]


def open_source(model: str | Path, *, trust_remote_code: bool = False) -> tuple[Checkpoint, ModelSpec]:
    """Open a checkpoint and hold it against its family's table.

    Args:
        model: A folder, a GGUF file or a hub id.
        trust_remote_code: Whether code of the checkpoint may be run; here none is.

    Raises:
        CheckpointError, ConfigError: files are damaged, or contradict ``config.json``.
        UnsupportedModelError: not a family that can be converted.
    """
    checkpoint = open_checkpoint(resolve(model, code=trust_remote_code))
    return checkpoint, checked_spec(checkpoint, trust_remote_code=trust_remote_code)


def checked_spec(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> ModelSpec:
    """The shape of an opened checkpoint, once its tensors are those of its family; raises as :func:`open_source`."""
    spec = _asked(checkpoint, trust_remote_code=trust_remote_code)
    match_tensors(checkpoint, spec)
    head_name, embedding_name = (spec.module(role) + ".weight" for role in ("head", "embedding"))
    if spec.tied and head_name in checkpoint:
        head, embedding = checkpoint.load(head_name), checkpoint.load(embedding_name)
        if head.shape != embedding.shape or not torch.equal(head, embedding):
            raise ConfigError(
                f"tie_word_embeddings is true, yet {head_name} differs from the embedding",
                code="LZ112",
                where=str(checkpoint.config_path),
                fix="set tie_word_embeddings to false",
            )
    return spec


def _asked(checkpoint: Checkpoint, *, trust_remote_code: bool) -> ModelSpec:
    """The shape of a checkpoint, its config as transformers reads it.

    Raises:
        ConfigError: transformers refuses an entry.
        UnsupportedModelError: as :func:`latentize.families.model_spec`.
    """
    trust = {"trust_remote_code": trust_remote_code}
    require_supported(checkpoint.config, **trust)
    try:
        entries = load_config(checkpoint.path, **trust).to_dict()
    # Whatever its classes find wrong.
    except Exception as error:
        said = str(error).strip().splitlines() or [repr(error)]
        raise ConfigError(
            f"transformers refuses the config: {said[-1].strip()}",
            where=str(checkpoint.config_path),
            fix="take config.json from where the model was published",
        ) from error
    # A part of a config may have other defaults than a config of its own.
    return model_spec(entries, stated=entries if checkpoint.left_out else checkpoint.config, **trust)
