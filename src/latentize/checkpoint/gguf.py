"""A GGUF file as a checkpoint: dequantised one tensor at a time, named and shaped as transformers has it.

What transformers does to a GGUF file is asked of transformers: the config, the names of tensors, and what is undone of
llama.cpp's own layout. Only what the file says and transformers does not read is put into the config here.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentize.checkpoint.base import Checkpoint
from latentize.checkpoint.gguf_config import (
    OTHER_SOURCE,
    ROPE_FACTORS,
    gguf_config,
    gguf_ends,
    header_and_config,
    stored_values,
)
from latentize.checkpoint.gguf_header import GgufHeader, StoredTensor, gguf_package, read_gguf_header
from latentize.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    pass

__all__ = [
    "SUFFIX",
    "GgufCheckpoint",
    "gguf_licence",
    "is_gguf",
    "only_gguf",
    "save_gguf_tokenizer",
]

SUFFIX = ".gguf"
_NAME, _TEMPLATE = re.compile(r"\w{1,64}"), "tokenizer.chat_template."
_EXPERTS = re.compile(r"\.ffn_(gate|up|down)_exps$")


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
        header, config = header_and_config(path, path.stat().st_size, path.stat().st_mtime_ns)
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
            values = stored_values(self.path, place.stored, [place.expert])
        else:
            values = stored_values(self.path, place.stored)
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
        return self.checked(name, torch.from_numpy(stored_values(self.path, place.stored, rows)))


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
            fix=f"download the file again, or {OTHER_SOURCE}",
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
        if stored.name == ROPE_FACTORS:
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
