"""The config of a GGUF file: what transformers reads of it, and what it leaves out."""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from latentize.checkpoint.base import filled, opened
from latentize.checkpoint.gguf_header import GgufHeader, StoredTensor, gguf_package, read_gguf_header
from latentize.errors import CheckpointError, ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["OTHER_SOURCE", "ROPE_FACTORS", "gguf_config", "gguf_ends", "header_and_config", "stored_values"]

OTHER_SOURCE = "take the safetensors checkpoint of the model"
_LAYER = re.compile(r"blk\.(\d{1,8})\.")
# llama.cpp stores what llama3's scaling makes of the frequencies; these are what all of Llama 3 made it with.
ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Key of a file → entry of the config that transformers leaves to its default.
_LEFT_OUT = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
# Layers of the one size of these whose attention llama.cpp scales by the hidden size, not by that of a head.
_SCALED_BY_HIDDEN = {"gemma2": 46, "gemma3": 62}


def gguf_ends(path: Path, first: Any) -> Any:
    """Tokens that end a text: what transformers reads of a file, with others that the file names beside it."""
    keys = read_gguf_header(path).keys
    more = [keys.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom")]
    found = [*(first if isinstance(first, list) else [first]), *more]
    ids = list(dict.fromkeys(i for i in found if isinstance(i, int)))
    return ids if len(ids) > 1 else first


def gguf_config(path: Path) -> Any:
    """The config that transformers reads from a GGUF file, with what it leaves out.

    Raises:
        CheckpointError: the file is damaged.
        ConfigError: its keys make no sense.
        UnsupportedModelError: transformers does not read this architecture, or the RoPE of the file.
    """
    found = path.stat()
    return copy.deepcopy(header_and_config(path, found.st_size, found.st_mtime_ns)[1])


@lru_cache(maxsize=4)
def header_and_config(path: Path, size: int, changed: int) -> tuple[GgufHeader, Any]:
    """Header and config, read once for all that ask for them."""
    header = read_gguf_header(path)
    return header, _config(header)


def _config(header: GgufHeader) -> Any:
    from transformers import AutoConfig
    from transformers.utils import logging

    path, kind = header.path, header.architecture
    if header.of_model("attention.kv_lora_rank"):
        raise UnsupportedModelError(
            f"the model has latent attention already, and transformers does not read '{kind}' from a GGUF file",
            code="LZ203",
            where=f"{path}, general.architecture",
            fix="to lower its rank, take its safetensors checkpoint",
        )
    logging.set_verbosity_error()
    try:
        with _without_vocabulary(header) as small:
            config: Any = AutoConfig.from_pretrained(small.parent, gguf_file=small.name, local_files_only=True)
    # What is wrong with a key shows in many ways.
    except Exception as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        if kind in reason and "not supported" in reason:
            raise UnsupportedModelError(
                f"transformers does not read GGUF files of architecture '{kind}'",
                where=f"{path}, general.architecture",
                fix=OTHER_SOURCE,
            ) from error
        raise ConfigError(
            f"transformers cannot make a config of the file's keys: {reason}",
            where=str(path),
            fix=f"download the file again, or {OTHER_SOURCE}",
        ) from error
    if header.of_model("expert_count") and not any(getattr(config, f"num_{n}experts", 0) for n in ("", "local_")):
        raise UnsupportedModelError(
            f"transformers does not read the experts of a GGUF file of architecture '{kind}'",
            where=f"{path}, {kind}.expert_count",
            fix=OTHER_SOURCE,
        )
    stored = 1 + max((int(found[1]) for t in header.tensors if (found := _LAYER.match(t.name))), default=-1)
    # Here, since a model of as many layers as a damaged key says would never be made.
    if stored and config.num_hidden_layers != stored:
        raise CheckpointError(
            f"the keys say {config.num_hidden_layers} layers, the file has {stored}",
            code="LZ110",
            where=f"{path}, {kind}.block_count",
            fix="download the file again",
        )
    try:
        _complete(config, header)
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise ConfigError(f"the keys of the file make no sense: {error}", where=str(path), fix=OTHER_SOURCE) from error
    return config


@contextmanager
def _without_vocabulary(header: GgufHeader) -> Iterator[Path]:
    """A file with the keys and the names of tensors, which is all that a config is made of.

    transformers walks through every token for a config: a quarter of a minute for a large vocabulary. Where it does
    not, it wants to see the tokens, and gets the file.
    """
    import numpy as np

    gguf = gguf_package()
    # Newer versions of transformers have a reader for some architectures that does not.
    quick = importlib.util.find_spec("transformers.integrations.gguf")
    if quick and header.architecture in importlib.import_module(quick.name).GGUF_CONFIG_ARCHS:
        yield header.path
        return
    with TemporaryDirectory() as folder:
        path = Path(folder) / header.path.name
        writer = gguf.GGUFWriter(path, header.architecture)
        for key, value in header.keys.items():
            if isinstance(value, list):
                writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, _widest(value[0]))
            elif key not in ("general.architecture", "general.alignment"):
                writer.add_key_value(key, value, _widest(value))
        for stored in header.tensors:
            writer.add_tensor(stored.name, np.zeros(1, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        yield path


def _widest(value: Any) -> Any:
    """GGUF's type that holds whatever the file had in another."""
    kind = gguf_package().GGUFValueType
    if isinstance(value, int) and not isinstance(value, bool):
        return kind.INT64 if value < 1 << 63 else kind.UINT64
    return kind.FLOAT64 if isinstance(value, float) else kind.get_type(value)


def _complete(config: Any, header: GgufHeader) -> None:
    """Put into the config what the file says, where transformers leaves it to a default."""
    of = header.of_model
    tokens = header.lengths.get("tokenizer.ggml.tokens")
    if tokens is not None and config.vocab_size != of("vocab_size"):
        config.vocab_size = tokens
    heads = config.num_attention_heads
    head_dim = of("attention.key_length") or getattr(config, "head_dim", None) or config.hidden_size // heads
    if head_dim != (getattr(config, "head_dim", None) or config.hidden_size // heads):
        config.head_dim = head_dim
    for key, name in _LEFT_OUT.items():
        if (value := of(key)) is not None and hasattr(config, name):
            setattr(config, name, value)
    if hasattr(config, "query_pre_attn_scalar"):
        by_hidden = config.num_hidden_layers == _SCALED_BY_HIDDEN.get(header.architecture)
        config.query_pre_attn_scalar = config.hidden_size // heads if by_hidden else head_dim
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict):
        _complete_rope(rope.get("full_attention", rope), header, head_dim)


def _complete_rope(rope: dict[str, Any], header: GgufHeader, head_dim: int) -> None:
    of, where = header.of_model, f"{header.path}, {header.architecture}.rope"
    if (theta := of("rope.freq_base")) is not None:
        rope["rope_theta"] = theta
    turning = of("rope.dimension_count") or head_dim
    if turning != head_dim or rope.get("partial_rotary_factor") is not None:
        rope["partial_rotary_factor"] = turning / head_dim
    kind, factor = of("rope.scaling.type") or "none", of("rope.scaling.factor") or of("rope.scale_linear") or 1.0
    if kind not in ("none", "linear") or (kind == "none" and of("rope.scaling.factor")):
        raise UnsupportedModelError(
            f"the RoPE of the file is scaled by '{kind}', which transformers does not read from it",
            code="LZ208",
            where=f"{where}.scaling.type",
            fix=OTHER_SOURCE,
        )
    if factor != 1.0:
        rope |= {"rope_type": "linear", "factor": factor}
    stored = next((tensor for tensor in header.tensors if tensor.name == ROPE_FACTORS), None)
    if stored is not None:
        rope |= _llama3(stored_values(header.path, stored), float(rope["rope_theta"]), stored, header.path)


def _llama3(factors_F: np.ndarray, theta: float, stored: StoredTensor, path: Path) -> dict[str, Any]:
    """The entries of llama3's scaling that make these factors; none where they do nothing.

    Raises:
        UnsupportedModelError: none do.
    """
    import numpy as np

    if (factors_F == 1.0).all():
        return {}
    factor = float(factors_F.max())
    low, high, original = _LLAMA3.values()
    wavelengths_F = 2 * np.pi * theta ** (np.arange(len(factors_F)) / len(factors_F))
    share_F = np.clip((original / wavelengths_F - low) / (high - low), 0.0, 1.0)
    if not np.allclose(1 / ((1 - share_F) / factor + share_F), factors_F, rtol=1e-3):
        raise UnsupportedModelError(
            "the file scales frequencies by factors that are not those of Llama 3",
            code="LZ208",
            where=f"{path}, tensor {stored.name}",
            fix=OTHER_SOURCE,
        )
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def stored_values(path: Path, stored: StoredTensor, rows: Sequence[int] | None = None) -> np.ndarray:
    """A tensor in float32, or those of its first dimension that are asked for; no others are read."""
    import numpy as np

    gguf = gguf_package()
    shape = stored.shape if rows is None else (len(rows), *stored.shape[1:])
    size = stored.bytes if rows is None else stored.bytes // stored.shape[0]
    buffer = bytearray(size * (1 if rows is None else len(rows)))
    view = memoryview(buffer)
    with opened(path) as stream:
        for place, row in enumerate([0] if rows is None else rows):
            stream.seek(stored.begin + row * size)
            filled(path, stream.readinto(view[place * size : (place + 1) * size]), size)
    quantised = np.frombuffer(buffer, dtype=np.uint8).reshape(*shape[:-1], -1)
    # What is not finite is refused by whoever asked.
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(quantised, gguf.GGMLQuantizationType[stored.kind]).reshape(shape)
