"""A folder with safetensors weights, read one tensor at a time.

Opening checks everything that the headers can tell: that files are whole, that index and shards agree, that
no path leaves the folder. Weights are read when they are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from latentize.checkpoint.base import DEQUANTISE, Checkpoint, filled, opened
from latentize.checkpoint.towers import CARRIED, is_tower, language_model, left_out, own_names
from latentize.errors import CheckpointError, ConfigError

__all__ = ["SafetensorsCheckpoint", "read_json"]

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_HEADER_CAP = 100_000_000
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# What of a folder is read, or copied.
_READ = (".json", ".safetensors", ".model", ".txt", ".jinja", ".md", "LICENSE", "LICENCE", "NOTICE")
# Integers are index tables (the native format has one); what is quantised comes in other types, masks do too.
_ITEM_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I32": 32, "I64": 64}
_OTHER_BITS = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "U32": 32, "U64": 64, "C64": 64},
    **{
        "F8_E4M3": 8,
        "F8_E5M2": 8,
        "F8_E4M3FNUZ": 8,
        "F8_E5M2FNUZ": 8,
        "F8_E8M0": 8,
        "F6_E2M3": 6,
        "F6_E3M2": 6,
        "F4": 4,
    },
}
_TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "I64": "int64",
}
# What is not quantised; buffers of positions are whole numbers.
_PLAIN = ("F64", "F32", "F16", "BF16", "I64")
# Bytes that are exponents come as bytes.
_QUANTISED_NAMES = {
    **{"U8": "uint8", "I8": "int8", "I16": "int16", "BOOL": "bool", "F8_E8M0": "uint8"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
}


def read_json(path: Path, error: type[CheckpointError] | type[ConfigError], code: str) -> dict[str, Any]:
    """An object in a file, with errors of a kind and code."""
    fix = "download the file again"
    try:
        if path.stat().st_size > _HEADER_CAP:
            raise error("the file is too large for what it is", code=code, where=str(path), fix=fix)
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error("the file is missing", code=code, where=str(path), fix="is this the folder of a model?") from None
    except (OSError, ValueError, RecursionError) as reason:
        raise error(f"the file cannot be read: {reason}", code=code, where=str(path), fix=fix) from reason
    if not isinstance(entries, dict):
        raise error("the file should hold one JSON object", code=code, where=str(path), fix=fix)
    return entries


def _read_header(path: Path, stream: BinaryIO, size: int) -> tuple[int, dict[str, dict[str, Any]], dict[str, Any]]:
    """Where data starts, the safetensors header, every tensor of which lies inside the file, and its metadata."""
    start = stream.read(8)
    if start.startswith(b"version "):
        raise CheckpointError(
            "the file is a git-LFS pointer, not weights",
            code="LZ104",
            where=str(path),
            fix="run 'git lfs pull' in the folder",
        )
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(_HEADER_CAP, size - 8):
        raise CheckpointError(
            "the file is truncated or not safetensors", code="LZ103", where=str(path), fix="download the file again"
        )
    try:
        header = json.loads(stream.read(length))
    except (ValueError, RecursionError) as reason:
        raise CheckpointError(f"the header is damaged: {reason}", code="LZ105", where=str(path)) from reason
    if not isinstance(header, dict):
        raise CheckpointError("the header should hold one JSON object", code="LZ105", where=str(path))
    metadata = header.pop("__metadata__", None)
    for name, entry in header.items():
        _check_entry(path, name, entry, size - 8 - length)
    spans = sorted(tuple(entry["data_offsets"]) for entry in header.values())
    if any(begin < end for (_, end), (begin, _) in pairwise(spans)):
        raise CheckpointError(
            "tensors overlap in the file", code="LZ105", where=str(path), fix="download the file again"
        )
    ends = [0, *(end for _, end in spans)]
    if any(begin > end for end, (begin, _) in zip(ends, spans, strict=False)) or ends[-1] != size - 8 - length:
        raise CheckpointError(
            "the file has bytes that belong to no tensor", code="LZ105", where=str(path), fix="download the file again"
        )
    return 8 + length, header, metadata if isinstance(metadata, dict) else {}


def _malformed(where: str) -> CheckpointError:
    return CheckpointError("the header entry is malformed", code="LZ105", where=where, fix="download the file again")


def _unread(dtype: str, where: str) -> CheckpointError:
    return CheckpointError(f"the weights are stored as {dtype}", code="LZ204", where=where, fix=DEQUANTISE)


def _check_entry(path: Path, name: str, entry: Any, data_bytes: int) -> None:
    where = f"{path}, tensor {name}"
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _malformed(where) from None
    numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if not isinstance(dtype, str) or not all(type(n) is int and n >= 0 for n in numbers):
        raise _malformed(where)
    bits = {**_ITEM_BITS, **_OTHER_BITS}.get(dtype)
    if bits is None:
        raise _unread(dtype, where)
    count = 1
    for n in shape:
        count *= n
    if end < begin or 8 * (end - begin) != count * bits:
        raise CheckpointError("shape and size of the tensor disagree", code="LZ105", where=where)
    if end > data_bytes:
        raise CheckpointError("the file is truncated", code="LZ103", where=where, fix="download the file again")


class SafetensorsCheckpoint(Checkpoint):
    """A folder with ``config.json`` and safetensors weights.

    Args:
        folder: The folder.

    Attributes:
        metadata: Of all files.

    Raises:
        ConfigError: ``config.json`` is missing or unreadable.
        CheckpointError: weight files are missing, damaged, disagree with the index, or are not safetensors.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.config_path = folder, folder / "config.json"
        for path in sorted(folder.iterdir()):
            if path.is_symlink() and path.name.endswith(_READ):
                self._check_link(path)
        self._refuse_adapter(folder / "adapter_config.json")
        config = read_json(self.config_path, ConfigError, "LZ102")
        self.config = language_model(config)
        self._file_of: dict[str, Path] = {}
        self._entry: dict[str, dict[str, Any]] = {}
        self._stored_as: dict[str, str] = {}
        self._data_start: dict[Path, int] = {}
        self.metadata: dict[str, Any] = {}
        for path, expected in self._shards().items():
            with self._opened(path) as stream:
                self._data_start[path], header, metadata = _read_header(path, stream, self._size(path))
            self.metadata |= metadata
            if expected is not None and expected != set(header):
                odd = sorted(expected.symmetric_difference(header))[0]
                raise CheckpointError(f"index and shard disagree about '{odd}'", code="LZ106", where=str(path))
            for name in header:
                if name in self._file_of:
                    raise CheckpointError("the tensor is stored twice", code="LZ106", where=f"{path}, tensor {name}")
                self._file_of[name], self._entry[name] = path, header[name]
        self._apart: dict[str, tuple[Path, dict[str, Any]]] = {}
        self._set_apart(config)

    def _set_apart(self, config: dict[str, Any]) -> None:
        """Leave the language model's tensors, under its own names, and know where the others are."""
        tower = is_tower(config)
        named = own_names(list(self._file_of)) if tower else {}
        named |= {name: None for name in self._file_of if name.startswith(CARRIED)}
        for name in (name for name, own in named.items() if own is None):
            self._apart[CARRIED + name.removeprefix(CARRIED)] = self._file_of[name], self._entry[name]
        self.rename(named)
        if tower:
            plain = all(entry["dtype"] in _PLAIN for _, entry in self._apart.values())
            self.left_out = left_out(config, carried=plain)
            self._apart, self.whole = (self._apart, config) if plain else ({}, None)

    def _refuse_adapter(self, adapter: Path) -> None:
        if not adapter.exists():
            return
        alone = not self.config_path.exists()
        raise CheckpointError(
            "the folder holds an adapter, not a model"
            if alone
            else "an adapter lies beside the weights, and transformers would apply it",
            code="LZ115",
            where=str(adapter),
            fix="merge it into its base model, and convert that" + ("" if alone else "; or take the file away"),
        )

    def _has(self, path: Path) -> bool:
        """Whether there is such a file of weights."""
        return path.is_file()

    def _size(self, path: Path) -> int:
        return path.stat().st_size

    def _opened(self, path: Path) -> BinaryIO:
        return opened(path)

    def _shards(self) -> dict[Path, set[str] | None]:
        """File → tensors that the index promises in it (``None`` where there is no index)."""
        index, single = self.path / INDEX_NAME, self.path / SINGLE_NAME
        # An index that was left beside a whole file is not looked at, as transformers does not.
        if self._has(single):
            return {single: None}
        if not index.exists():
            # As AutoGPTQ named what it wrote.
            if len(named := sorted(self.path.glob("gptq_model*.safetensors"))) == 1:
                return {named[0]: None}
            raise self._no_weights()
        promised: dict[Path, set[str]] = {}
        weight_map = read_json(index, CheckpointError, "LZ106").get("weight_map", {})
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(
                "the weight_map of the index should map tensors to file names", code="LZ106", where=str(index)
            )
        for name, file in weight_map.items():
            if Path(file).name != file:
                raise CheckpointError(f"the index points outside the folder: '{file}'", code="LZ107", where=str(index))
            promised.setdefault(self.path / file, set()).add(name)
        if not promised:
            raise CheckpointError("the index names no weights", code="LZ106", where=str(index))
        for path in promised:
            if not self._has(path):
                raise CheckpointError(
                    "a shard is missing", code="LZ106", where=str(path), fix="download the file again"
                )
        return dict(promised)

    def _no_weights(self) -> CheckpointError:
        if unfinished := sorted(self.path.rglob("*.incomplete")):
            return CheckpointError(
                "no weights, but a download that was not finished",
                code="LZ104",
                where=str(unfinished[0]),
                fix="download the model again; what is there goes on",
            )
        pickles = sorted(p.name for pattern in _PICKLES for p in self.path.glob(pattern))
        return CheckpointError(
            "no safetensors weights" + (f", only pickles ({pickles[0]})" if pickles else ""),
            code="LZ113" if pickles else "LZ101",
            where=str(self.path),
            fix="load it where you trust it and save it with save_pretrained" if pickles else "is it a model's folder?",
        )

    def _check_link(self, path: Path) -> None:
        """A link may point into the folder, or, in a hub cache, to the blobs that snapshots share."""
        try:
            real, folder = path.resolve(), self.path.resolve()
        except (OSError, RuntimeError):
            raise CheckpointError(
                "the file is a link to itself", code="LZ107", where=str(path), fix="put the file itself there"
            ) from None
        if real.parent != folder and real.parent != folder.parent.parent / "blobs":
            raise CheckpointError(
                f"the file is a link out of the folder, to {real}",
                code="LZ107",
                where=str(path),
                fix="put the file itself there",
            )

    @property
    def files(self) -> list[Path]:
        return sorted({*self._file_of.values(), *(path for path, _ in self._apart.values())})

    def names(self) -> Iterator[str]:
        yield from self._entry

    def __contains__(self, name: str) -> bool:
        return name in self._entry

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entry[name]["shape"])

    def dtype(self, name: str) -> str:
        stored = self._entry[name]["dtype"]
        if stored not in _TORCH_NAMES:
            raise _unread(stored, self.where(name))
        return _TORCH_NAMES[stored]

    def rename(self, names: Mapping[str, str | None]) -> None:
        for old, new in names.items():
            path, entry = self._file_of.pop(old), self._entry.pop(old)
            stored = self._stored_as.pop(old, old)
            if new is not None:
                self._file_of[new], self._entry[new], self._stored_as[new] = path, entry, stored

    def stored_as(self, name: str) -> str:
        return self._stored_as.get(name, name)

    def size(self, name: str) -> int:
        begin, end = self._entry[name]["data_offsets"]
        return end - begin

    def where(self, name: str) -> str:
        stored = self.stored_as(name)
        return f"{self._file_of[name]}, tensor {stored}" + (f" ({name})" if stored != name else "")

    def load(self, name: str) -> Any:
        if name not in self:
            raise self.missing(name)
        self.dtype(name)
        return self.raw(name)

    def raw(self, name: str) -> Any:
        """One tensor, also of a type that only quantised weights have.

        Raises:
            CheckpointError: it holds NaN or infinity, or PyTorch has no such type.
        """
        entry = self._entry[name]
        return self.checked(name, self._tensor(self._read(self._file_of[name], entry), entry, self.where(name)))

    def carried(self) -> Iterator[tuple[str, Any]]:
        for name, (path, entry) in self._apart.items():
            yield name, self._tensor(self._read(path, entry), entry, f"{path}, tensor {name.removeprefix(CARRIED)}")

    def _read(self, path: Path, entry: Mapping[str, Any]) -> bytearray:
        begin, end = entry["data_offsets"]
        # Read, not mapped: mapped pages would stay in memory as long as the file is open.
        buffer = bytearray(end - begin)
        with self._opened(path) as stream:
            stream.seek(self._data_start[path] + begin)
            # What is opened reads into a buffer, be it of a disk or of a network.
            filled(path, stream.readinto(buffer), len(buffer))  # type: ignore[attr-defined]
        return buffer

    def load_rows(self, name: str, rows: Sequence[int]) -> Any:
        path, entry = self._file_of[name], self._entry[name]
        begin, end = entry["data_offsets"]
        count, *rest = entry["shape"]
        size = (end - begin) // count
        buffer = bytearray(size * len(rows))
        view = memoryview(buffer)
        with opened(path) as stream:
            for place, row in enumerate(rows):
                stream.seek(self._data_start[path] + begin + row * size)
                filled(path, stream.readinto(view[place * size : (place + 1) * size]), size)
        entry = {**entry, "shape": [len(rows), *rest]}
        return self.checked(name, self._tensor(buffer, entry, self.where(name)))

    def _tensor(self, buffer: bytearray, entry: Mapping[str, Any], where: str) -> Any:
        import torch

        stored, known = entry["dtype"], {**_TORCH_NAMES, **_QUANTISED_NAMES}
        if stored not in known:
            raise _unread(stored, where)
        dtype = getattr(torch, known[stored])
        tensor = torch.frombuffer(buffer, dtype=dtype) if buffer else torch.empty(0, dtype=dtype)
        return tensor.view(entry["shape"])
