"""The tokenizer of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentize.checkpoint.writer import has_tokenizer_code
from latentize.errors import CheckpointError, UnsupportedModelError
from latentize.families import NEEDS_TRUST

__all__ = ["load_tokenizer"]


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """A transformers tokenizer from local files.

    Args:
        folder: With its files.
        trust_remote_code: Whether code in them may be run.

    Raises:
        CheckpointError: there is none, or it is damaged.
        UnsupportedModelError: it needs code that may not be run.
    """
    from transformers import AutoTokenizer

    if has_tokenizer_code(folder) and not trust_remote_code:
        raise UnsupportedModelError(
            "the tokenizer needs code from the checkpoint to run",
            code="LZ207",
            where=f"{folder / 'tokenizer_config.json'}, auto_map",
            fix=NEEDS_TRUST,
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    # What a damaged file raises depends on where it is damaged.
    except Exception as error:
        raise CheckpointError(
            f"the tokenizer cannot be loaded: {(str(error) or repr(error)).splitlines()[0]}",
            code="LZ116",
            where=str(folder),
            fix="put tokenizer.json and tokenizer_config.json of the model into the folder",
        ) from error
