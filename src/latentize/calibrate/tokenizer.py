"""The tokenizer of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentize.checkpoint import pretrained
from latentize.checkpoint.gguf import is_gguf
from latentize.checkpoint.gguf_header import read_gguf_header
from latentize.checkpoint.writer import has_tokenizer_code
from latentize.errors import CheckpointError, UnsupportedModelError
from latentize.families import NEEDS_TRUST

__all__ = ["load_tokenizer"]


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> Any:
    """A transformers tokenizer from local files.

    Args:
        path: A folder with its files, or a GGUF file.
        trust_remote_code: Whether code in the folder may be run.

    Raises:
        CheckpointError: there is none, or it is damaged.
        UnsupportedModelError: it needs code that may not be run.
    """
    from transformers import AutoTokenizer

    if has_tokenizer_code(path) and not trust_remote_code:
        raise UnsupportedModelError(
            "the tokenizer needs code from the checkpoint to run",
            code="LZ207",
            where=f"{path / 'tokenizer_config.json'}, auto_map",
            fix=NEEDS_TRUST,
        )
    if is_gguf(path) and not read_gguf_header(path).has_tokenizer:
        raise CheckpointError(
            "the file holds no tokenizer",
            code="LZ116",
            where=str(path),
            fix="take a GGUF file with a vocabulary, or the safetensors checkpoint of the model",
        )
    try:
        return AutoTokenizer.from_pretrained(**pretrained(path), trust_remote_code=trust_remote_code)
    # What a damaged file raises depends on where it is damaged.
    except Exception as error:
        raise CheckpointError(
            f"the tokenizer cannot be loaded: {(str(error) or repr(error)).splitlines()[0]}",
            code="LZ116",
            where=str(path),
            fix=(
                "download the file again, or take the safetensors checkpoint of the model"
                if is_gguf(path)
                else "put tokenizer.json and tokenizer_config.json of the model into the folder"
            ),
        ) from error
