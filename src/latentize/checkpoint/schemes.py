"""Ways to quantise weights that are read: which tensors make a weight, its shape, and what restores it."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import metadata
from typing import Any, ClassVar

from latentize.checkpoint.base import DEQUANTISE
from latentize.errors import CheckpointError, ConfigError

__all__ = ["SCHEMES", "Scheme"]

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

    def split(self, name: str) -> tuple[str, str] | None:
        """Which weight a stored tensor may be a part of, and which part; ``None`` for what is none."""
        lasts = {"weight", *self.marks, *self.parts}
        found = [last for last in lasts if name.endswith("." + last)]
        if not found:
            return None
        part = max(found, key=len)
        return name.removesuffix(part) + "weight", part

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
        if "mxfp6" in self.kind() or "24" in self.kind():
            # Of neither do the shapes of what is stored tell that of the weight.
            raise self.refused(self.kind())

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


class Mxfp4(Scheme):
    """gpt-oss's experts: two values of four bits a byte, and an exponent for each 32 of them."""

    marks = ("blocks", "scales")

    def split(self, name: str) -> tuple[str, str] | None:
        weight, _, part = name.rpartition("_")
        return (weight, part) if part in self.marks else None

    def kind(self) -> str:
        return "MXFP4"

    def shape(self, shapes: Shapes, load: Any) -> tuple[int, ...]:
        *experts, outputs, groups, width = shapes["blocks"]
        return *experts, 2 * groups * width, outputs

    def restored(self, parts: Mapping[str, Any], module: str) -> Any:
        from latentize.checkpoint.dequantise import mxfp4

        return mxfp4(parts["blocks"], parts["scales"])


# By ``quant_method``.
SCHEMES: dict[str, type[Scheme]] = {
    "fp8": Fp8,
    "fbgemm_fp8": Fp8,
    "gptq": Gptq,
    "awq": Awq,
    "bitsandbytes": BitsAndBytes,
    "compressed-tensors": CompressedTensors,
    "mxfp4": Mxfp4,
}
