"""A folder whose weights are quantised, as a checkpoint: dequantised one tensor at a time, named and shaped as the
model that was quantised.

``quantization_config`` says how, or a file beside it; the names of tensors say which. A weight of several tensors
(codes, scales, zero points) is one tensor here, in float32. What only activations or caches are scaled by is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentize.checkpoint.base import Checkpoint
from latentize.checkpoint.reader import SafetensorsCheckpoint, read_json
from latentize.checkpoint.scheme import Scheme
from latentize.checkpoint.schemes import SCHEMES
from latentize.errors import CheckpointError, ConfigError

__all__ = ["QuantisedCheckpoint", "is_read", "quantised", "unquantised"]

_CONFIG = "quantization_config"
# In the place of a last part: a tensor that is as it is.
_ITSELF = ""
# Files that tell it where config.json does not, and what they tell in its words: AutoGPTQ's, AutoAWQ's, ModelOpt's.
_BESIDE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "quantize_config.json": lambda told: {"quant_method": "gptq", **told},
    "quant_config.json": lambda told: {
        "quant_method": "awq",
        "bits": told.get("w_bit", 4),
        "group_size": told.get("q_group_size", 128),
        **told,
    },
    "hf_quant_config.json": lambda told: {"quant_method": "modelopt", **_mapping(told.get("quantization"))},
}
# Scales of activations and caches, which are no weights.
_NO_WEIGHTS = ("input_scale", "output_scale", "activation_scale", "k_scale", "v_scale", "qscale_act")
_NO_WEIGHTS += ("input_zero_point", "output_zero_point", "input_global_scale")


def _method(entries: Any) -> str:
    if not isinstance(entries, dict):
        return ""
    # Older files do not say it.
    older = "bitsandbytes" if entries.get("load_in_4bit") or entries.get("load_in_8bit") else ""
    return str(entries.get("quant_method", older))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def is_read(config: Mapping[str, Any]) -> bool:
    """Whether weights are quantised in a way that is read."""
    return _method(config.get(_CONFIG)) in SCHEMES


def unquantised(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the model that was quantised, where it is read; else as it is."""
    return {key: value for key, value in config.items() if key != _CONFIG or not is_read(config)}


def quantised(stored: SafetensorsCheckpoint) -> Checkpoint:
    """Files as the model that was quantised, where they are quantised in a way that is read; else as they are.

    Raises:
        CheckpointError, ConfigError: what is said of how they are quantised cannot be read, or does not fit them.
    """
    if is_read(stored.config):
        return QuantisedCheckpoint(stored, stored.config[_CONFIG], f"{stored.config_path}, {_CONFIG}")
    for file, entries_of in _BESIDE.items():
        path = stored.path / file
        if _CONFIG in stored.config or not path.exists():
            continue
        entries = entries_of(read_json(path, ConfigError, "LZ102"))
        marks = SCHEMES[_method(entries)].marks if _method(entries) in SCHEMES else ()
        # A model that was dequantised may still have the file.
        if any(name.endswith(f".{mark}") for name in stored.names() for mark in marks):
            return QuantisedCheckpoint(stored, entries, str(path))
    return stored


@dataclass(frozen=True)
class _Weight:
    """A tensor of the model.

    Attributes:
        parts: What it is made of: last part of a name → stored tensor. One that is as it is has itself, without a name.
        shape: As the model has it.
    """

    parts: Mapping[str, str]
    shape: tuple[int, ...]

    @property
    def first(self) -> str:
        """The stored tensor, or the first of several."""
        return next(iter(self.parts.values()))

    @property
    def quantised(self) -> bool:
        return _ITSELF not in self.parts


class QuantisedCheckpoint(Checkpoint):
    """A folder with weights that are quantised in a way that is read.

    Args:
        stored: The files.
        entries: How they are quantised, with a method that :func:`is_read` knows.
        where: That stands, for messages.

    Raises:
        CheckpointError: parts of a weight are missing, or a package that restores them is.
    """

    def __init__(self, stored: SafetensorsCheckpoint, entries: Mapping[str, Any], where: str) -> None:
        self._stored, self.path, self.config_path = stored, stored.path, stored.config_path
        self.config, self.left_out = unquantised(stored.config), stored.left_out
        if stored.whole is not None:
            text = unquantised(dict(stored.whole["text_config"]))
            self.whole = {**unquantised(dict(stored.whole)), "text_config": text}
        method = _method(entries)
        self._scheme = SCHEMES[method](entries, where, stored.metadata)
        self._weights = {
            name: _Weight(parts, self._shape(parts))
            for name, parts in _grouped(list(stored.names()), self._scheme).items()
        }
        count = sum(weight.quantised for weight in self._weights.values())
        if not count:
            raise CheckpointError(
                f"the weights are said to be quantised ({method}), and none is",
                code="LZ204",
                where=self._scheme.where,
                fix="is it the config.json of these weights?",
            )
        self.quantization = {
            "format": method,
            "file_type": self._scheme.kind(),
            "tensors": {"quantised": count, "as they are": len(self._weights) - count},
            "dequantised_by": self._scheme.by(),
        }

    @property
    def quantization_note(self) -> str:
        assert self.quantization is not None
        kind = self.quantization["file_type"]
        return f"the source's weights are quantised ({kind}): losses are counted from what they are dequantised to"

    def _shape(self, parts: Mapping[str, str]) -> tuple[int, ...]:
        if _ITSELF in parts:
            return self._stored.shape(parts[_ITSELF])
        shapes = {last: self._stored.shape(stored) for last, stored in parts.items()}
        try:
            return self._scheme.shape(shapes, lambda last: self._stored.raw(parts[last]), self._named(parts))
        except (KeyError, ValueError, TypeError) as error:
            raise self._damaged(next(iter(parts.values())), error) from error

    def _named(self, parts: Mapping[str, str]) -> str:
        """A weight, as its files call it."""
        found = self._scheme.split(next(iter(parts.values())))
        assert found is not None
        return found[0]

    def _damaged(self, stored: str, error: Exception) -> CheckpointError:
        said = f"{error} is missing" if isinstance(error, KeyError) else str(error) or repr(error)
        return CheckpointError(
            f"the tensors of a quantised weight ({self._scheme.kind()}) make no sense: {said.splitlines()[0]}",
            code="LZ109",
            where=self._stored.where(stored),
            fix="download the file again",
        )

    @property
    def files(self) -> list[Path]:
        return self._stored.files

    def names(self) -> Iterator[str]:
        yield from self._weights

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights[name].shape

    def dtype(self, name: str) -> str:
        weight = self._weights[name]
        return "float32" if weight.quantised else self._stored.dtype(weight.first)

    def size(self, name: str) -> int:
        weight = self._weights[name]
        return 4 * math.prod(weight.shape) if weight.quantised else self._stored.size(weight.first)

    def where(self, name: str) -> str:
        return self._stored.where(self._weights[name].first)

    def rename(self, names: Mapping[str, str | None]) -> None:
        for old, new in names.items():
            weight = self._weights.pop(old)
            if new is not None:
                self._weights[new] = weight

    def stored_as(self, name: str) -> str:
        return self._weights[name].first

    def carried(self) -> Iterator[tuple[str, Any]]:
        yield from self._stored.carried()

    def load(self, name: str) -> Any:
        if name not in self:
            raise self.missing(name)
        weight = self._weights[name]
        if not weight.quantised:
            return self._stored.load(weight.first)
        parts = {last: self._stored.raw(stored) for last, stored in weight.parts.items()}
        try:
            restored = self._scheme.restored(parts, self._named(weight.parts)).float().contiguous()
        except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
            raise self._damaged(weight.first, error) from error
        if tuple(restored.shape) != weight.shape:
            error = ValueError(f"{list(restored.shape)} values, not {list(weight.shape)}")
            raise self._damaged(weight.first, error)
        return self.checked(name, restored)

    def packed(self, name: str) -> dict[str, Any]:
        weight = self._weights.get(name)
        if weight is None or not weight.quantised or not self._scheme.stays:
            return {}
        return {
            name + stored.removeprefix(self._named(weight.parts)): self._stored.raw(stored)
            for stored in weight.parts.values()
        }

    def load_rows(self, name: str, rows: Sequence[int]) -> Any:
        weight = self._weights[name]
        return self.load(name)[list(rows)] if weight.quantised else self._stored.load_rows(weight.first, rows)


def _grouped(names: Sequence[str], scheme: Scheme) -> dict[str, dict[str, str]]:
    """Tensors of the model by name, and what each is made of, as :class:`_Weight` has it."""
    split = {name: scheme.split(name) for name in names}
    quantised = {found[0] for found in split.values() if found and found[1] in scheme.marks}
    grouped: dict[str, dict[str, str]] = {}
    for name in names:
        found = split[name]
        if found and found[0] in quantised:
            grouped.setdefault(found[0], {})[found[1]] = name
        elif name.rpartition(".")[2] not in _NO_WEIGHTS:
            grouped[name] = {_ITSELF: name}
    return grouped
