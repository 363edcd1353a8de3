"""The tokenizer of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentize.errors import CheckpointError

__all__ = ["load_tokenizer"]


def load_tokenizer(folder: Path) -> Any:
    """A transformers tokenizer from local files.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # What a damaged file raises depends on where it is damaged.
    except Exception as error:
        raise CheckpointError(
            f"the tokenizer cannot be loaded: {(str(error) or repr(error)).splitlines()[0]}",
            code="LZ116",
            where=str(folder),
            fix="put tokenizer.json and tokenizer_config.json of the model into the folder",
        ) from error
