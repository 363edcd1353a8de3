"""A folder whose weights are quantised, as a checkpoint: dequantised one tensor at a time, named and shaped as the
model that was quantised.

``quantization_config`` says how; the names of tensors say which. A weight of several tensors (codes, scales, zero
points) is one tensor here, in float32. What only activations or caches are scaled by is left out.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

from latentize.checkpoint.base import DEQUANTISE, Checkpoint
from latentize.checkpoint.reader import SafetensorsCheckpoint
from latentize.errors import CheckpointError, ConfigError

__all__ = ["QuantisedCheckpoint", "is_read", "unquantised"]

_CONFIG = "quantization_config"
# Scales of activations and caches, which are no weights.
_NO_WEIGHTS = ("input_scale", "output_scale", "activation_scale", "k_scale", "v_scale", "qscale_act")
_NO_WEIGHTS += ("input_zero_point", "output_zero_point", "input_global_scale")

Shapes = Mapping[str, tuple[int, ...]]


class Scheme(ABC):
    """A way to quantise weights.

    Args:
        entries: Of ``quantization_config``.
        where: They stand, for messages.

    Attributes:
        marks: Last parts of names that only quantised weights have.
        parts: Further ones that belong to them.
    """

    marks: ClassVar[tuple[str, ...]]
    parts: ClassVar[tuple[str, ...]] = ()

    def __init__(self, entries: Mapping[str, Any], where: str) -> None:
        self.entries, self.where = entries, where

    @abstractmethod
    def kind(self) -> str:
        """What weights were quantised to, for people."""

    @abstractmethod
    def shape(self, shapes: Shapes, load: Any) -> tuple[int, ...]:
        """Of a weight, of the shapes of its parts; ``load`` gives a part."""

    @abstractmethod
    def restored(self, parts: Mapping[str, Any], module: str) -> Any:
        """The weight of a module, of its parts."""

    def by(self) -> str:
        """What dequantises."""
        return f"latentize {metadata.version('latentize')}"

    def entry(self, name: str, default: int) -> int:
        """A whole number.

        Raises:
            ConfigError: it is none.
        """
        value = self.entries.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"'{name}' should be a whole number, is {value!r}", where=self.where)
        return value

    def refused(self, what: str) -> CheckpointError:
        return CheckpointError(f"the weights are quantised ({what})", code="LZ204", where=self.where, fix=DEQUANTISE)


class Fp8(Scheme):
    """DeepSeek's and transformers' own, and that of FBGEMM."""

    marks = ("weight_scale_inv", "weight_scale", "qscale_weight")

    def kind(self) -> str:
        return "fp8"

    def shape(self, shapes: Shapes, load: Any) -> tuple[int, ...]:
        return shapes["weight"]

    def restored(self, parts: Mapping[str, Any], module: str) -> Any:
        from latentize.checkpoint.dequantise import fp8

        block = self.entries.get("weight_block_size")
        (scale,) = (parts[mark] for mark in self.marks if mark in parts)
        return fp8(parts["weight"], scale, None if block is None else (block[0], block[1]))


class Gptq(Scheme):
    marks, parts = ("qweight",), ("qzeros", "scales", "g_idx")

    def _bits(self) -> int:
        if (bits := self.entry("bits", 4)) not in (2, 3, 4, 8):
            raise self.refused(f"GPTQ, {bits} bits")
        return bits

    def _layout(self) -> str:
        """Older files have zero points that are one less."""
        if (layout := self.entries.get("checkpoint_format") or "gptq") not in ("gptq", "gptq_v2"):
            raise self.refused(f"GPTQ, in the layout '{layout}'")
        return layout

    def kind(self) -> str:
        return f"GPTQ, {self._bits()} bits"

    def shape(self, shapes: Shapes, load: Any) -> tuple[int, ...]:
        words, outputs = shapes["qweight"]
        self._layout()
        return outputs, words * 32 // self._bits()

    def restored(self, parts: Mapping[str, Any], module: str) -> Any:
        from latentize.checkpoint.dequantise import gptq

        return gptq(parts, self._bits(), self.entry("group_size", 128), shifted=self._layout() == "gptq")


class Awq(Scheme):
    marks, parts = ("qweight",), ("qzeros", "scales")

    def _bits(self) -> int:
        bits, version = self.entry("bits", 4), str(self.entries.get("version", "gemm")).lower()
        if bits != 4 or version != "gemm":
            raise self.refused(f"AWQ, {bits} bits, version '{version}'")
        return bits

    def kind(self) -> str:
        return f"AWQ, {self._bits()} bits"

    def shape(self, shapes: Shapes, load: Any) -> tuple[int, ...]:
        inputs, words = shapes["qweight"]
        return words * 32 // self._bits(), inputs

    def restored(self, parts: Mapping[str, Any], module: str) -> Any:
        from latentize.checkpoint.dequantise import awq

        return awq(parts, self._bits(), self.entry("group_size", 128))


class BitsAndBytes(Scheme):
    """4 bits (NF4, FP4) or 8."""

    marks = ("SCB", "weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
    parts = (
        "weight_format",
        *(f"weight.{name}" for name in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")),
    )

    def kind(self) -> str:
        if self.entries.get("load_in_8bit"):
            return "bitsandbytes, int8"
        return f"bitsandbytes, {self.entries.get('bnb_4bit_quant_type', '4 bits')}"

    def shape(self, shapes: Shapes, load: Any) -> tuple[int, ...]:
        import json

        if "SCB" in shapes:
            return shapes["weight"]
        (state,) = (name for name in shapes if "quant_state" in name)
        return tuple(json.loads(bytes(load(state).tolist()))["shape"])

    def restored(self, parts: Mapping[str, Any], module: str) -> Any:
        from latentize.checkpoint.dequantise import bitsandbytes_4bit, bitsandbytes_8bit

        if "SCB" in parts:
            return bitsandbytes_8bit(parts["weight"], parts["SCB"])
        short = {re.sub(r"\.bitsandbytes__\w+$", "", name.removeprefix("weight.")): t for name, t in parts.items()}
        return bitsandbytes_4bit(short)


class CompressedTensors(Scheme):
    """What llm-compressor writes: fp8, int8, packed integers, NVFP4, MXFP4. The package itself restores it."""

    marks = ("weight_packed", "weight_scale")
    parts = ("weight_shape", "weight_zero_point", "weight_global_scale", "weight_g_idx")

    def __init__(self, entries: Mapping[str, Any], where: str) -> None:
        super().__init__(entries, where)
        if self.entries.get("sparsity_config", {}).get("format", "dense") != "dense":
            raise self.refused("compressed-tensors, sparse")

    def kind(self) -> str:
        formats = {str(self.entries.get("format", "dense"))}
        formats |= {str(group["format"]) for group in self._groups() if group.get("format")}
        return f"compressed-tensors, {', '.join(sorted(formats - {'mixed-precision'}))}"

    def _groups(self) -> list[Mapping[str, Any]]:
        groups = self.entries.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise ConfigError("'config_groups' should say how weights are quantised", where=self.where)
        return list(groups.values())

    def shape(self, shapes: Shapes, load: Any) -> tuple[int, ...]:
        if "weight_shape" in shapes:
            return tuple(load("weight_shape").tolist())
        if "weight" in shapes:
            return shapes["weight"]
        # Two values a byte.
        *rows, columns = shapes["weight_packed"]
        return *rows, 2 * columns

    def restored(self, parts: Mapping[str, Any], module: str) -> Any:
        self._package()
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme

        group = self._group(module)
        scheme = QuantizationScheme.model_validate(group)
        name = str(group.get("format") or self.entries.get("format"))
        return BaseCompressor.get_value_from_registry(name).decompress(dict(parts), scheme)["weight"]

    def _group(self, module: str) -> Mapping[str, Any]:
        """Which entries a module is quantised by: a name or a pattern wins over a class."""

        def named(target: str) -> bool:
            if target.startswith("re:"):
                return re.match(target.removeprefix("re:"), module) is not None
            return target == module

        groups = self._groups()
        found = [group for group in groups if any(map(named, group.get("targets", ())))]
        return (found or [group for group in groups if "Linear" in group.get("targets", ())] or groups)[0]

    def _package(self) -> str:
        try:
            import compressed_tensors  # noqa: F401
        except ImportError:
            raise CheckpointError(
                "the weights are quantised in a format of the compressed-tensors package, which is not installed",
                code="LZ120",
                where="the compressed-tensors package",
                fix="pip install 'latentize[quantised]'",
            ) from None
        return f"compressed-tensors {metadata.version('compressed-tensors')}"

    def by(self) -> str:
        return self._package()


_SCHEMES: dict[str, type[Scheme]] = {
    "fp8": Fp8,
    "fbgemm_fp8": Fp8,
    "gptq": Gptq,
    "awq": Awq,
    "bitsandbytes": BitsAndBytes,
    "compressed-tensors": CompressedTensors,
}


def _method(config: Mapping[str, Any]) -> str:
    entries = config.get(_CONFIG)
    if not isinstance(entries, dict):
        return ""
    # Older files do not say it.
    older = "bitsandbytes" if entries.get("load_in_4bit") or entries.get("load_in_8bit") else ""
    return str(entries.get("quant_method", older))


def is_read(config: Mapping[str, Any]) -> bool:
    """Whether weights are quantised in a way that is read."""
    return _method(config) in _SCHEMES


def unquantised(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the model that was quantised, where it is read; else as it is."""
    return {key: value for key, value in config.items() if key != _CONFIG or not is_read(config)}


class QuantisedCheckpoint(Checkpoint):
    """A folder with weights that are quantised in a way that is read.

    Args:
        stored: The files; ``quantization_config`` of their config is one that :func:`is_read` knows.

    Raises:
        CheckpointError: parts of a weight are missing, or a package that restores them is.
    """

    def __init__(self, stored: SafetensorsCheckpoint) -> None:
        self._stored, self.path, self.config_path = stored, stored.path, stored.config_path
        self.config = unquantised(stored.config)
        method = _method(stored.config)
        self._scheme = _SCHEMES[method](stored.config[_CONFIG], f"{stored.config_path}, {_CONFIG}")
        # Stored tensors of each weight by the last part of their names; None where it is one tensor as it is.
        self._parts: dict[str, dict[str, str] | None] = _grouped(list(stored.names()), self._scheme)
        self._first = {
            name: name if parts is None else next(iter(parts.values())) for name, parts in self._parts.items()
        }
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, parts in self._parts.items():
            self._shapes[name] = stored.shape(name) if parts is None else self._shape(name, parts)
        count = sum(parts is not None for parts in self._parts.values())
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
            "tensors": {"quantised": count, "as they are": len(self._parts) - count},
            "dequantised_by": self._scheme.by(),
        }

    @property
    def quantization_note(self) -> str:
        assert self.quantization is not None
        kind = self.quantization["file_type"]
        return f"the source's weights are quantised ({kind}): losses are counted from what they are dequantised to"

    def _shape(self, name: str, parts: Mapping[str, str]) -> tuple[int, ...]:
        shapes = {last: self._stored.shape(stored) for last, stored in parts.items()}
        try:
            return self._scheme.shape(shapes, lambda last: self._stored.raw(parts[last]))
        except (KeyError, ValueError, TypeError) as error:
            raise self._damaged(name, error) from error

    def _damaged(self, name: str, error: Exception) -> CheckpointError:
        said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        return CheckpointError(
            f"the tensors of a quantised weight ({self._scheme.kind()}) make no sense: {said.splitlines()[0]}",
            code="LZ109",
            where=self.where(name),
            fix="download the file again",
        )

    @property
    def files(self) -> list[Path]:
        return self._stored.files

    def names(self) -> Iterator[str]:
        yield from self._parts

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        return self._stored.dtype(self._first[name]) if self._parts[name] is None else "float32"

    def size(self, name: str) -> int:
        return self._stored.size(self._first[name]) if self._parts[name] is None else 4 * math.prod(self._shapes[name])

    def where(self, name: str) -> str:
        return self._stored.where(self._first[name]) if name in self._first else f"{self.path}, tensor {name}"

    def rename(self, names: Mapping[str, str | None]) -> None:
        for old, new in names.items():
            for known in (self._parts, self._first, self._shapes):
                value = known.pop(old)
                if new is not None:
                    known[new] = value  # type: ignore[index, assignment]

    def stored_as(self, name: str) -> str:
        return self._first[name]

    def load(self, name: str) -> Any:
        if name not in self:
            raise self.missing(name)
        parts = self._parts[name]
        if parts is None:
            return self._stored.load(self._first[name])
        tensors = {last: self._stored.raw(stored) for last, stored in parts.items()}
        module = self._first[name].removesuffix("." + next(iter(parts)))
        try:
            restored = self._scheme.restored(tensors, module).float().contiguous()
        except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
            raise self._damaged(name, error) from error
        if tuple(restored.shape) != self._shapes[name]:
            raise self._damaged(name, ValueError(f"{list(restored.shape)} values, not {list(self._shapes[name])}"))
        return self.checked(name, restored)

    def load_rows(self, name: str, rows: Sequence[int]) -> Any:
        if self._parts[name] is None:
            return self._stored.load_rows(self._first[name], rows)
        return self.load(name)[list(rows)]


def _grouped(names: Sequence[str], scheme: Scheme) -> dict[str, dict[str, str] | None]:
    """Tensors of the model by name, and the stored tensors that each is made of."""
    lasts = sorted({"weight", *scheme.marks, *scheme.parts}, key=len, reverse=True)
    ending = re.compile(rf"\.({'|'.join(map(re.escape, lasts))})$")
    split = {name: ending.search(name) for name in names}
    quantised = {name[: found.start()] for name, found in split.items() if found and found[1] in scheme.marks}
    grouped: dict[str, dict[str, str] | None] = {}
    for name in names:
        found = split[name]
        module = name[: found.start()] if found else ""
        if found and module in quantised:
            parts = grouped.setdefault(f"{module}.weight", {})
            assert parts is not None
            parts[found[1]] = name
        elif name.rpartition(".")[2] not in _NO_WEIGHTS:
            grouped[name] = None
    return grouped
