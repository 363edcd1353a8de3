"""A GGUF file as a checkpoint: dequantised one tensor at a time, named and shaped as transformers has it.

What transformers does to a GGUF file is asked of transformers: the config, the names of tensors, and what is undone of
llama.cpp's own layout. Only what the file says and transformers does not read is put into the config here.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from latentize.checkpoint.base import Checkpoint, filled, opened
from latentize.checkpoint.gguf_header import GgufHeader, StoredTensor, gguf_package, read_gguf_header
from latentize.errors import CheckpointError, ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "SUFFIX",
    "GgufCheckpoint",
    "gguf_config",
    "gguf_ends",
    "gguf_licence",
    "is_gguf",
    "only_gguf",
    "save_gguf_tokenizer",
]

SUFFIX = ".gguf"
_OTHER = "take the safetensors checkpoint of the model"
_LAYER = re.compile(r"blk\.(\d{1,8})\.")
_NAME, _TEMPLATE = re.compile(r"\w{1,64}"), "tokenizer.chat_template."
_EXPERTS = re.compile(r"\.ffn_(gate|up|down)_exps$")
# llama.cpp stores what llama3's scaling makes of the frequencies; these are what all of Llama 3 made it with.
_ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Key of a file → entry of the config that transformers leaves to its default.
_LEFT_OUT = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
# Layers of the one size of these whose attention llama.cpp scales by the hidden size, not by that of a head.
_SCALED_BY_HIDDEN = {"gemma2": 46, "gemma3": 62}


def is_gguf(path: Path) -> bool:
    """Whether a model is one GGUF file."""
    return path.suffix == SUFFIX and path.is_file()


def only_gguf(folder: Path) -> Path | None:
    """The one GGUF file of a folder without safetensors weights; ``None`` if there is none, or there are such weights.

    Raises:
        CheckpointError: there are several, or one of several parts.
    """
    found = sorted(path for path in folder.glob(f"*{SUFFIX}") if path.is_file())
    if not found or any(folder.glob("*.safetensors")):
        return None
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:4]) + (", …" if len(found) > 4 else "")
        raise CheckpointError(
            f"the folder holds {len(found)} GGUF files: {names}",
            code="LZ119",
            where=str(folder),
            fix=f"name one of them: {found[0]}",
        )
    return found[0]


def gguf_licence(path: Path) -> dict[str, str]:
    """What a GGUF file says of its licence, as entries of a model card; ``license`` is ``unknown`` if nothing."""
    keys = read_gguf_header(path).keys
    named = {f"license{part}": keys.get(f"general.license{part.replace('_', '.')}") for part in ("", "_name", "_link")}
    said = {name: value for name, value in named.items() if isinstance(value, str) and value}
    return said if "license" in said else {"license": "unknown"}


def save_gguf_tokenizer(path: Path, folder: Path) -> None:
    """Save the tokenizer of a GGUF file, and how to generate with its model, as transformers reads them.

    Args:
        path: The file.
        folder: Where to.
    """
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    if named := _named_templates(read_gguf_header(path).keys):
        default = {"default": tokenizer.chat_template} if isinstance(tokenizer.chat_template, str) else {}
        tokenizer.chat_template = {**default, **named}
    tokenizer.save_pretrained(folder)
    settings = GenerationConfig.from_model_config(gguf_config(path))
    settings.eos_token_id = gguf_ends(path, settings.eos_token_id)
    settings.save_pretrained(folder)


def _named_templates(keys: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates beside the default one, which is all that transformers reads."""
    named = {key.removeprefix(_TEMPLATE): value for key, value in keys.items() if key.startswith(_TEMPLATE)}
    # A name becomes that of a file.
    return {name: value for name, value in named.items() if isinstance(value, str) and _NAME.fullmatch(name)}


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
    return copy.deepcopy(_read(path, found.st_size, found.st_mtime_ns)[1])


@lru_cache(maxsize=4)
def _read(path: Path, size: int, changed: int) -> tuple[GgufHeader, Any]:
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
                fix=_OTHER,
            ) from error
        raise ConfigError(
            f"transformers cannot make a config of the file's keys: {reason}",
            where=str(path),
            fix=f"download the file again, or {_OTHER}",
        ) from error
    if header.of_model("expert_count") and not any(getattr(config, f"num_{n}experts", 0) for n in ("", "local_")):
        raise UnsupportedModelError(
            f"transformers does not read the experts of a GGUF file of architecture '{kind}'",
            where=f"{path}, {kind}.expert_count",
            fix=_OTHER,
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
        raise ConfigError(f"the keys of the file make no sense: {error}", where=str(path), fix=_OTHER) from error
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
            fix=_OTHER,
        )
    if factor != 1.0:
        rope |= {"rope_type": "linear", "factor": factor}
    stored = next((tensor for tensor in header.tensors if tensor.name == _ROPE_FACTORS), None)
    if stored is not None:
        rope |= _llama3(_values(header.path, stored), float(rope["rope_theta"]), stored, header.path)


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
            fix=_OTHER,
        )
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def _values(path: Path, stored: StoredTensor, rows: Sequence[int] | None = None) -> np.ndarray:
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


@dataclass(frozen=True)
class _Place:
    """Where a tensor of the model is: all of one in the file, or what it has of an expert."""

    stored: StoredTensor
    shape: tuple[int, ...]
    expert: int | None = None


class GgufCheckpoint(Checkpoint):
    """A GGUF file of an architecture that transformers reads. Tensors come in float32.

    Args:
        path: The file.

    Raises:
        CheckpointError: the file is damaged, or the ``gguf`` package is missing.
        ConfigError: its keys make no sense.
        UnsupportedModelError: transformers does not read this architecture.
    """

    def __init__(self, path: Path) -> None:
        self.path = self.config_path = path
        header, config = _read(path, path.stat().st_size, path.stat().st_mtime_ns)
        model = _empty(config, path)
        said = {"architectures": [type(model).__name__], "dtype": "float32"}
        self.config = {**json.loads(config.to_json_string()), **said}
        # That is where the file lies.
        self.config.pop("_name_or_path", None)
        self.quantization = _quantization(header)
        self._processor = _processor(header.architecture, self.config)
        self._places = _places(header, model, self._processor)

    @property
    def files(self) -> list[Path]:
        return [self.path]

    def names(self) -> Iterator[str]:
        yield from self._places

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def dtype(self, name: str) -> str:
        return "float32"

    def size(self, name: str) -> int:
        count = 4
        for length in self._places[name].shape:
            count *= length
        return count

    def where(self, name: str) -> str:
        stored = self._places[name].stored.name
        return f"{self.path}, tensor {stored}" + (f" ({name})" if stored != name else "")

    def load(self, name: str) -> Any:
        import numpy as np
        import torch

        if name not in self:
            raise self.missing(name)
        place = self._places[name]
        if place.expert is not None:
            values = _values(self.path, place.stored, [place.expert])
        else:
            values = _values(self.path, place.stored)
            parsed: dict[str, Any] = {"tensors": {}}
            values = self._processor.process(
                weights=values, name=place.stored.name, tensor_key_mapping={}, parsed_parameters=parsed
            ).weights
        return self.checked(name, torch.from_numpy(np.ascontiguousarray(values).reshape(place.shape)))

    def load_rows(self, name: str, rows: Sequence[int]) -> Any:
        import torch

        place = self._places[name]
        if place.stored.name != "token_embd.weight":
            # What transformers undoes of a layout is said of whole tensors.
            return self.load(name)[list(rows)]
        return self.checked(name, torch.from_numpy(_values(self.path, place.stored, rows)))


def _empty(config: Any, path: Path) -> Any:
    """transformers' model without memory."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            # A copy: the precision is put into it.
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    except Exception as error:
        raise ConfigError(
            f"transformers cannot make the model: {(str(error) or repr(error)).splitlines()[0]}",
            where=str(path),
            fix=f"download the file again, or {_OTHER}",
        ) from error


def _processor(architecture: str, config: dict[str, Any]) -> Any:
    """What undoes the layout that llama.cpp has given to tensors of an architecture."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    return TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)


class _Names:
    """As much of a model as transformers wants to see to name the tensors of a file."""

    def __init__(self, model: Any) -> None:
        self.config, self.state_dict = model.config, model.state_dict

    def named_children(self) -> list[Any]:
        """None: all tensors are those of the whole."""
        return []


def _places(header: GgufHeader, model: Any, processor: Any) -> dict[str, _Place]:
    """Where each tensor of the model is. Those that transformers has no name for keep that of the file."""
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    named: Any = _Names(model)
    names: dict[str, str] = get_gguf_hf_weights_map(named, processor, model_type=header.architecture)
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    places: dict[str, _Place] = {}
    for stored in header.tensors:
        if stored.name == _ROPE_FACTORS:
            continue
        stem = stored.name.removesuffix(".weight")
        experts = _EXPERTS.search(stem)
        if experts is not None and stem in names:
            # transformers stacks experts; it saves them one by one.
            prefix = names[stem].rpartition(".")[0]
            for expert in range(stored.shape[0]):
                name = f"{prefix}.{expert}.{experts[1]}_proj.weight"
                places[name] = _Place(stored, stored.shape[1:], expert)
            continue
        name = names.get(stored.name, stored.name)
        expected = shapes.get(name, stored.shape)
        # Some have a dimension of one more in transformers.
        same = [n for n in expected if n != 1] == [n for n in stored.shape if n != 1]
        places[name] = _Place(stored, expected if same else stored.shape)
    return places


def _quantization(header: GgufHeader) -> dict[str, Any]:
    """What the weights were quantised to: of the file as a whole, and how many tensors are of which type."""
    gguf = gguf_package()
    counts: dict[str, int] = {}
    for tensor in header.tensors:
        counts[tensor.kind] = counts.get(tensor.kind, 0) + 1
    try:
        name = gguf.LlamaFileType(header.keys["general.file_type"]).name
    except (KeyError, ValueError):
        size = {kind: sum(t.bytes for t in header.tensors if t.kind == kind) for kind in counts}
        name = max(size, key=lambda kind: size[kind])
    return {
        "format": "gguf",
        "file_type": name.removeprefix("MOSTLY_").removeprefix("ALL_"),
        "tensors": dict(sorted(counts.items())),
        "dequantised_by": f"gguf {metadata.version('gguf')}",
    }
