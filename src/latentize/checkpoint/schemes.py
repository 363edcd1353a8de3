"""Ways to quantise weights that are read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib import metadata as packages
from typing import Any, ClassVar

from latentize.checkpoint.scheme import Scheme, Shapes
from latentize.errors import CheckpointError, ConfigError

__all__ = ["SCHEMES"]


class Fp8(Scheme):
    """DeepSeek's and transformers' own, and that of FBGEMM."""

    marks = ("weight_scale_inv", "weight_scale", "qscale_weight")

    def kind(self) -> str:
        return "fp8"

    def shape(self, shapes: Shapes, load: Any, name: str) -> tuple[int, ...]:
        return shapes["weight"]

    def restored(self, parts: Mapping[str, Any], name: str) -> Any:
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

    def shape(self, shapes: Shapes, load: Any, name: str) -> tuple[int, ...]:
        words, outputs = shapes["qweight"]
        self._layout()
        return outputs, words * 32 // self._bits()

    def restored(self, parts: Mapping[str, Any], name: str) -> Any:
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

    def shape(self, shapes: Shapes, load: Any, name: str) -> tuple[int, ...]:
        inputs, words = shapes["qweight"]
        return words * 32 // self._bits(), inputs

    def restored(self, parts: Mapping[str, Any], name: str) -> Any:
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

    def shape(self, shapes: Shapes, load: Any, name: str) -> tuple[int, ...]:
        if "SCB" in shapes:
            return shapes["weight"]
        (state,) = (name for name in shapes if "quant_state" in name)
        return tuple(json.loads(bytes(load(state).tolist()))["shape"])

    def restored(self, parts: Mapping[str, Any], name: str) -> Any:
        from latentize.checkpoint.dequantise import bitsandbytes_4bit, bitsandbytes_8bit

        if "SCB" in parts:
            return bitsandbytes_8bit(parts["weight"], parts["SCB"])
        short = {re.sub(r"\.bitsandbytes__\w+$", "", name.removeprefix("weight.")): t for name, t in parts.items()}
        return bitsandbytes_4bit(short)


class CompressedTensors(Scheme):
    """What llm-compressor writes: fp8, int8, packed integers, NVFP4, MXFP4. The package itself restores it."""

    marks = ("weight_packed", "weight_scale")
    parts = ("weight_shape", "weight_zero_point", "weight_global_scale", "weight_g_idx")

    def __init__(self, entries: Mapping[str, Any], where: str, metadata: Mapping[str, Any]) -> None:
        super().__init__(entries, where, metadata)
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

    def shape(self, shapes: Shapes, load: Any, name: str) -> tuple[int, ...]:
        if "weight_shape" in shapes:
            return tuple(load("weight_shape").tolist())
        if "weight" in shapes:
            return shapes["weight"]
        # Two values a byte.
        *rows, columns = shapes["weight_packed"]
        return *rows, 2 * columns

    def restored(self, parts: Mapping[str, Any], name: str) -> Any:
        self._package()
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme

        group = self._group(name.removesuffix(".weight"))
        scheme = QuantizationScheme.model_validate(group)
        compressor = str(group.get("format") or self.entries.get("format"))
        return BaseCompressor.get_value_from_registry(compressor).decompress(dict(parts), scheme)["weight"]

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
        return f"compressed-tensors {packages.version('compressed-tensors')}"

    def by(self) -> str:
        return self._package()


class Mxfp4(Scheme):
    """gpt-oss's experts: two values of four bits a byte, and an exponent for each 32 of them."""

    marks = ("blocks", "scales")
    stays = True

    def split(self, name: str) -> tuple[str, str] | None:
        weight, _, part = name.rpartition("_")
        return (weight, part) if part in self.marks else None

    def kind(self) -> str:
        return "MXFP4"

    def shape(self, shapes: Shapes, load: Any, name: str) -> tuple[int, ...]:
        *experts, outputs, groups, width = shapes["blocks"]
        return *experts, 2 * groups * width, outputs

    def restored(self, parts: Mapping[str, Any], name: str) -> Any:
        from latentize.checkpoint.dequantise import mxfp4

        return mxfp4(parts["blocks"], parts["scales"])


class ModelOpt(Scheme):
    """What NVIDIA's Model Optimizer writes: fp8 and int8 (a scale for all, for each row or for each block), MXFP8 and
    NVFP4."""

    marks, parts = ("weight_scale",), ("weight_scale_2", "pre_quant_scale")
    # What of its algorithms is one of these.
    _READ = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "W8A8_SQ_PER_CHANNEL", "W8A16", "MXFP8")
    _READ += ("NVFP4", "NVFP4_AWQ", "W4A16_NVFP4")

    def __init__(self, entries: Mapping[str, Any], where: str, metadata: Mapping[str, Any]) -> None:
        super().__init__(entries, where, metadata)
        if odd := sorted(self._algorithms() - set(self._READ)):
            raise self.refused(f"ModelOpt, {odd[0]}")

    def _algorithms(self) -> set[str]:
        layers = self.entries.get("quantized_layers") or {}
        if not isinstance(layers, dict) or not all(isinstance(layer, dict) for layer in layers.values()):
            raise ConfigError("'quantized_layers' should say how each layer is quantised", where=self.where)
        named = [str(part.get("quant_algo")) for part in (self.entries, *layers.values())]
        return {name for name in named if not (layers and name == "MIXED_PRECISION")}

    def kind(self) -> str:
        return f"ModelOpt, {', '.join(sorted(self._algorithms()))}"

    def shape(self, shapes: Shapes, load: Any, name: str) -> tuple[int, ...]:
        *rows, columns = shapes["weight"]
        return *rows, columns * (2 if "weight_scale_2" in shapes else 1)

    def restored(self, parts: Mapping[str, Any], name: str) -> Any:
        from latentize.checkpoint.dequantise import fp8, nvfp4

        weight, scale, double = parts["weight"], parts["weight_scale"], parts.get("weight_scale_2")
        if scale.ndim == 4:
            scale = scale[:, 0, :, 0]
        if double is None:
            made = fp8(weight, scale, self._block(weight.shape, scale.shape))
        else:
            made = nvfp4(weight, scale, double)
        # What inputs are multiplied by before, so that they quantise better.
        return made * parts["pre_quant_scale"].float() if "pre_quant_scale" in parts else made

    def _block(self, shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int] | None:
        """It does not say how large blocks are; the last ones may be smaller."""
        if len(scales) != 2 or scales[1] == 1:
            return None

        def size(whole: int, count: int) -> int:
            return 128 if -(-whole // 128) == count else -(-whole // count)

        return size(shape[0], scales[0]), size(shape[1], scales[1])


class TorchAo(Scheme):
    """torchao's tensors as it lays them into safetensors: of a weight, ``_weight_qdata``, ``_weight_scale`` and more;
    what they are stands in the metadata of the files."""

    marks = ("qdata",)
    _READ: ClassVar[dict[str, str]] = {
        "Float8Tensor": "fp8",
        "Int8Tensor": "int8",
        "IntxUnpackedToInt8Tensor": "int",
        "MXTensor": "MX",
        "NVFP4Tensor": "NVFP4",
    }

    def __init__(self, entries: Mapping[str, Any], where: str, metadata: Mapping[str, Any]) -> None:
        super().__init__(entries, where, metadata)
        self._told = {name: told for name, said in metadata.items() if (told := self._tensor(name, said))}
        if odd := sorted({told["_type"] for told in self._told.values()} - self._READ.keys()):
            raise self.refused(f"torchao, {odd[0]}")
        self._parts: dict[str, tuple[str, str]] = {}
        for name, told in self._told.items():
            module, _, last = name.rpartition(".")
            self._parts |= {f"{module}._{last}_{part}": (name, part) for part in told["_tensor_data_names"]}

    def _tensor(self, name: str, said: Any) -> dict[str, Any]:
        """What is said of a tensor that is quantised; nothing of others."""
        try:
            told = json.loads(said)
            quantised = "." in name and told["_type"] != "Tensor"
        except (TypeError, KeyError, ValueError):
            return {}
        kinds = {"_type": str, "_data": dict, "_tensor_data_names": list}
        if quantised and not all(isinstance(told.get(key), kind) for key, kind in kinds.items()):
            raise CheckpointError(
                "the metadata does not say how the tensor is quantised",
                code="LZ105",
                where=f"{self.where}, tensor {name}",
                fix="download the files again",
            )
        return told if quantised else {}

    def split(self, name: str) -> tuple[str, str] | None:
        return self._parts.get(name)

    def kind(self) -> str:
        return f"torchao, {', '.join(sorted({self._READ[told['_type']] for told in self._told.values()}))}"

    def shape(self, shapes: Shapes, load: Any, name: str) -> tuple[int, ...]:
        *rows, columns = shapes["qdata"]
        return *rows, columns * (2 if self._packed(name) else 1)

    def _packed(self, name: str) -> bool:
        """Whether two values are a byte."""
        told = self._told[name]
        element = told["_data"].get("elem_dtype")
        return told["_type"] == "NVFP4Tensor" or (element is not None and "float4" in element["_data"])

    def restored(self, parts: Mapping[str, Any], name: str) -> Any:
        from latentize.checkpoint.dequantise import torchao

        return torchao(parts, self._told[name]["_data"], packed=self._packed(name))


# By ``quant_method``.
SCHEMES: dict[str, type[Scheme]] = {
    "fp8": Fp8,
    "fbgemm_fp8": Fp8,
    "gptq": Gptq,
    "awq": Awq,
    "bitsandbytes": BitsAndBytes,
    "compressed-tensors": CompressedTensors,
    "mxfp4": Mxfp4,
    "modelopt": ModelOpt,
    "torchao": TorchAo,
}
