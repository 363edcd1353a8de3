"""The tokenizer of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentize.checkpoint import pretrained, told_config
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
        named = {**pretrained(path), **told_config(path)}
        tokenizer = AutoTokenizer.from_pretrained(**named, trust_remote_code=trust_remote_code)
        _try(tokenizer)
        return tokenizer
    except MemoryError:
        raise
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


def _try(tokenizer: Any) -> None:
    """Use a tokenizer as it will be used; entries that make no sense show only then.

    Raises:
        Exception: whatever it raises.
    """
    for special in (False, True):
        ids = tokenizer("a", add_special_tokens=special, verbose=False)["input_ids"]
        if not isinstance(ids, list) or not all(isinstance(number, int) and number >= 0 for number in ids):
            raise ValueError(f"'a' becomes {ids!r}"[:200])
        tokenizer.decode(ids, skip_special_tokens=True)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        number = getattr(tokenizer, name)
        if number is not None and (not isinstance(number, int) or number < 0):
            raise ValueError(f"{name} is {number!r}"[:200])
    set(tokenizer.all_special_ids)
    len(tokenizer)
