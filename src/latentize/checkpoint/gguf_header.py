"""What a GGUF file says before its weights: keys, and where each tensor lies. Nothing is mapped, nothing is trusted.

The format is described in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from io import BufferedReader
from itertools import pairwise
from pathlib import Path
from typing import Any

from latentize.errors import CheckpointError

__all__ = ["GgufHeader", "StoredTensor", "gguf_package", "read_gguf_header"]

_VERSIONS = (2, 3)
# Types of values by number, as struct has them; strings are 8, arrays are 9.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
_LONGEST_NAME, _LONGEST_LIST = 1 << 16, 1 << 10
# Bytes that an entry takes in any case.
_LEAST_TENSOR, _LEAST_KEY = 32, 13
_FIX = "download the file again"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a GGUF file.

    Attributes:
        name: In the file.
        kind: GGML's type, by name.
        shape: As PyTorch counts dimensions; GGUF counts them from the other end.
        begin: Byte where it starts.
        bytes: How many it has.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    begin: int
    bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself.

    Attributes:
        path: The file.
        keys: Numbers, strings and short lists of numbers by key.
        lengths: Of all arrays, by key; a vocabulary is one.
        tensors: In the order of the file.
    """

    path: Path
    keys: dict[str, Any]
    lengths: dict[str, int]
    tensors: tuple[StoredTensor, ...]

    @property
    def architecture(self) -> str:
        return str(self.keys["general.architecture"])

    def of_model(self, key: str) -> Any:
        """The value of ``ARCHITECTURE.key``, or ``None``."""
        return self.keys.get(f"{self.architecture}.{key}")

    @property
    def has_tokenizer(self) -> bool:
        return "tokenizer.ggml.model" in self.keys and "tokenizer.ggml.tokens" in self.lengths


def gguf_package() -> Any:
    """The ``gguf`` package.

    Raises:
        CheckpointError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise CheckpointError(
            "a GGUF file needs the gguf package, which is not installed",
            code="LZ120",
            where="the gguf package",
            fix="pip install 'latentize[gguf]'",
        ) from None
    return gguf


def _damaged(what: str, path: Path, code: str = "LZ105", name: str = "") -> CheckpointError:
    return CheckpointError(what, code=code, where=f"{path}, tensor {name}" if name else str(path), fix=_FIX)


@dataclass(frozen=True)
class _Array:
    """How long it is, and what is in it if it is short and of numbers."""

    length: int
    values: list[Any] | None = None


class _Walk:
    """A file, read from its beginning, never past its end."""

    def __init__(self, path: Path, stream: BufferedReader, size: int) -> None:
        self.path, self.stream, self.size, self.at = path, stream, size, 0

    def _reach(self, count: int) -> None:
        if count > self.size - self.at:
            raise _damaged("the file is truncated, or its header is damaged", self.path, "LZ103")
        self.at += count

    def bytes(self, count: int) -> bytes:
        self._reach(count)
        return self.stream.read(count)

    def skip(self, count: int) -> None:
        self._reach(count)
        self.stream.seek(count, 1)

    def numbers(self, letters: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{letters}", self.bytes(struct.calcsize(f"<{letters}")))

    def string(self) -> str:
        return self.bytes(self.numbers("Q")[0]).decode("utf-8", errors="replace")

    def name(self) -> str:
        (length,) = self.numbers("Q")
        if length > _LONGEST_NAME:
            raise _damaged("the header is damaged: a name is too long", self.path)
        return self.bytes(length).decode("utf-8", errors="replace")

    def value(self) -> Any:
        """A number or a string; of an array what :meth:`_array` gives."""
        (kind,) = self.numbers("I")
        if kind in _NUMBERS:
            return self.numbers(_NUMBERS[kind])[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise _damaged(f"the header is damaged: no value is of type {kind}", self.path)
        return self._array()

    def _array(self) -> _Array:
        kind, count = self.numbers("IQ")
        if kind in _NUMBERS and count <= _LONGEST_LIST:
            return _Array(count, [self.numbers(_NUMBERS[kind])[0] for _ in range(count)])
        if kind in _NUMBERS:
            self.skip(count * struct.calcsize(_NUMBERS[kind]))
        elif kind == _STRING:
            for _ in range(count):
                self.skip(self.numbers("Q")[0])
        else:
            raise _damaged(f"the header is damaged: no array is of type {kind}", self.path)
        return _Array(count)


def read_gguf_header(path: Path) -> GgufHeader:
    """Read a GGUF file up to its weights; every tensor lies inside the file.

    Raises:
        CheckpointError: it is not GGUF, truncated or damaged, one part of several, or holds types that cannot be
            dequantised; or the ``gguf`` package is missing.
    """
    gguf = gguf_package()
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            walk = _Walk(path, stream, size)
            count, found = _keys(walk)
            entries = [_entry(walk) for _ in range(count)]
    except OSError as error:
        raise _damaged(f"the file cannot be read: {error.strerror}", path, "LZ101") from error
    lengths = {key: value.length for key, value in found.items() if isinstance(value, _Array)}
    lists = {key: value.values for key, value in found.items() if isinstance(value, _Array) and value.values}
    keys = {key: value for key, value in found.items() if not isinstance(value, _Array)} | lists
    parts = keys.get("split.count")
    if isinstance(parts, int) and parts > 1:
        raise CheckpointError(
            f"the file is one part of {parts}",
            code="LZ119",
            where=str(path),
            fix="merge the parts: llama-gguf-split --merge FIRST-PART MERGED.gguf",
        )
    alignment = keys.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise _damaged(f"the header is damaged: an alignment of {alignment!r}", path)
    start = -(-walk.at // alignment) * alignment
    tensors = tuple(_stored(gguf, path, entry, start) for entry in entries)
    _check_places(path, tensors, size)
    return GgufHeader(path, keys, lengths, tensors)


def _keys(walk: _Walk) -> tuple[int, dict[str, Any]]:
    """How many tensors there are, and the keys."""
    start = walk.bytes(min(8, walk.size))
    if start == b"version ":
        raise CheckpointError(
            "the file is a git-LFS pointer, not weights",
            code="LZ104",
            where=str(walk.path),
            fix="run 'git lfs pull' in the folder",
        )
    if start[:4] != b"GGUF" or len(start) < 8:
        raise _damaged("not a GGUF file: it does not begin as one", walk.path)
    version = int.from_bytes(start[4:], "little")
    if version not in _VERSIONS:
        raise _damaged(f"the file is of GGUF's version {version}; 2 and 3 are read, little-endian", walk.path)
    tensors, count = walk.numbers("QQ")
    if tensors * _LEAST_TENSOR + count * _LEAST_KEY > walk.size:
        said = f"{tensors} tensors and {count} keys are more than it has room for"
        raise _damaged(f"the file is truncated, or its header is damaged: {said}", walk.path, "LZ103")
    keys: dict[str, Any] = {}
    for _ in range(count):
        name = walk.name()
        keys[name] = walk.value()
    if not isinstance(keys.get("general.architecture"), str):
        raise _damaged("the file does not say which architecture it has (general.architecture)", walk.path)
    return tensors, keys


def _entry(walk: _Walk) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type and place of a tensor."""
    name = walk.name()
    (dimensions,) = walk.numbers("I")
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise _damaged(f"the header is damaged: {dimensions} dimensions", walk.path, name=name)
    shape = walk.numbers(f"{dimensions}Q")[::-1]
    kind, place = walk.numbers("IQ")
    return name, shape, kind, place


def _stored(gguf: Any, path: Path, entry: tuple[str, tuple[int, ...], int, int], start: int) -> StoredTensor:
    name, shape, number, place = entry
    try:
        kind = gguf.GGMLQuantizationType(number)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        # A block of zeros says whether there is code for the type.
        gguf.quants.dequantize(_zeros(size), kind)
    except (ValueError, KeyError, NotImplementedError):
        raise CheckpointError(
            f"the weights are stored as type {number} of GGML, which the gguf package does not dequantise",
            code="LZ204",
            where=f"{path}, tensor {name}",
            fix="pip install --upgrade gguf, or use a file of another type",
        ) from None
    if shape[-1] % block:
        raise _damaged(f"rows of {shape[-1]} are no whole blocks of {kind.name}", path, name=name)
    return StoredTensor(name, kind.name, shape, start + place, math.prod(shape) // block * size)


def _zeros(size: int) -> Any:
    import numpy as np

    return np.zeros((1, size), dtype=np.uint8)


def _check_places(path: Path, tensors: tuple[StoredTensor, ...], size: int) -> None:
    if not tensors:
        raise CheckpointError("the file holds no tensors", where=str(path), fix="is it a model, or only a vocabulary?")
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.begin + tensor.bytes > size:
            raise _damaged("the file is truncated", path, "LZ103", tensor.name)
        if tensor.name in seen:
            raise _damaged("the tensor is stored twice", path, name=tensor.name)
        seen.add(tensor.name)
    spans = sorted((tensor.begin, tensor.begin + tensor.bytes) for tensor in tensors)
    if any(begin < end for (_, end), (begin, _) in pairwise(spans)):
        raise _damaged("tensors overlap in the file", path)
