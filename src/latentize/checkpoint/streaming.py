"""A model of the hub whose weights are read over the network as they are needed: none of them is ever on a disk.

What else a model has (config, tokenizer, licence) is downloaded as always. Every pass over the layers reads them again,
but for a model that is small enough to stay in memory.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, cast

from latentize.checkpoint.reader import SafetensorsCheckpoint
from latentize.errors import CheckpointError

__all__ = ["Remote", "StreamedCheckpoint", "remote_of", "stream"]

# Bytes that are asked for at once: of rows that lie near each other, and of tensors that follow each other.
_ROWS, _TENSORS = 4 << 20, 64 << 20
# Of weights that are no more than this all stay in memory: a polish would read them for every step.
_KEPT = 1 << 30
_TRIES, _SECONDS = 5, 1.0


@dataclass(frozen=True)
class Remote:
    """Files of a model on the hub.

    Attributes:
        name: Its id.
        revision: The commit.
        sizes: Bytes of its files, by name.
        hashes: SHA-256 of those that the hub knows it of.
        read: Bytes that were read of each.
        kept: What stays in memory, by file and place.
    """

    name: str
    revision: str
    sizes: Mapping[str, int]
    hashes: Mapping[str, str]
    read: dict[str, int] = field(default_factory=dict)
    kept: dict[tuple[str, int], bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, revision: str | None = None) -> Remote:
        """What the hub says of a model."""
        from huggingface_hub import HfApi

        info = HfApi().model_info(name, revision=revision, files_metadata=True)
        files = info.siblings or []
        hashes = {file.rfilename: file.lfs.sha256 for file in files if file.lfs is not None}
        return cls(name, str(info.sha), {file.rfilename: int(file.size or 0) for file in files}, hashes)

    def fetch(self, file: str, begin: int, end: int) -> bytes:
        """Some bytes of a file.

        Raises:
            CheckpointError: they cannot be had.
        """
        reason: object = ""
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(_SECONDS * 2 ** (attempt - 1))
            try:
                found = self._asked(file, begin, end)
            # Whatever library asks, a network has errors of any kind.
            except Exception as error:
                reason = error
                continue
            if len(found) == end - begin:
                self.read[file] = self.read.get(file, 0) + len(found)
                return found
            reason = f"{len(found)} bytes instead of {end - begin}"
        raise CheckpointError(
            f"cannot read the weights from the hub: {str(reason).splitlines()[0] if str(reason) else reason!r}",
            where=f"{self.name}, {file}",
            fix="check the network and go on with --resume; or leave out --stream, which downloads the files first",
        )

    def _asked(self, file: str, begin: int, end: int) -> bytes:
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        url = hf_hub_url(self.name, file, revision=self.revision)
        headers = {**build_hf_headers(), "Range": f"bytes={begin}-{end - 1}"}
        answer = get_session().get(url, headers=headers, follow_redirects=True)
        hf_raise_for_status(answer)
        # A server that does not know of ranges sends all of it.
        return answer.content if answer.status_code == 206 else answer.content[begin:end]


class _File(io.RawIOBase):
    """A file on the hub as one that can be read anywhere."""

    def __init__(self, remote: Remote, name: str) -> None:
        self.remote, self.file, self.place = remote, name, 0

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET
        self.place = offset
        return offset

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        end = min(self.place + len(view), self.remote.sizes[self.file])
        if end <= self.place:
            return 0
        found = self.remote.fetch(self.file, self.place, end)
        view[: len(found)] = found
        self.place = end
        return len(found)


_STREAMED: dict[Path, Remote] = {}


def stream(name: str, wanted: Sequence[str], revision: str | None = None) -> Path:
    """The folder of a model's other files; from now on its weights are read from the hub.

    Args:
        name: Its id.
        wanted: Patterns of files that are downloaded.
        revision: Of the hub's.
    """
    from huggingface_hub import snapshot_download

    remote = Remote.of(name, revision)
    folder = Path(snapshot_download(name, revision=remote.revision, allow_patterns=list(wanted)))
    _STREAMED[folder] = remote
    return folder


def remote_of(folder: Path) -> Remote | None:
    """Where a folder's weights are read from, if that is the hub."""
    return _STREAMED.get(folder)


class StreamedCheckpoint(SafetensorsCheckpoint):
    """A folder whose weights are on the hub.

    Args:
        folder: Of the other files.
        remote: Has the weights.
    """

    def __init__(self, folder: Path, remote: Remote) -> None:
        self.remote = remote
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="latentize-stream")
        # Bytes that are on their way, by file and place.
        self._ahead: dict[tuple[str, int], tuple[Future[bytes], int]] = {}
        super().__init__(folder)
        self._keeps = sum(map(self._size, self.files)) <= _KEPT

    def _has(self, path: Path) -> bool:
        return path.name in self.remote.sizes

    def _size(self, path: Path) -> int:
        return self.remote.sizes[path.name]

    def _opened(self, path: Path) -> BinaryIO:
        return cast(BinaryIO, _File(self.remote, path.name))

    @property
    def notes(self) -> list[str]:
        said = "the weights were read from the hub as layers needed them, and are not on this machine"
        return [*super().notes, said]

    def ahead(self, names: Iterable[str]) -> None:
        """Begin to read tensors that will be asked for next; others that were begun are let go of."""
        spans = sorted((self._file_of[n].name, *self._span(n)) for n in names if n in self._entry)
        spans = [(file, begin, end) for file, begin, end in spans if (file, begin) not in self.remote.kept]
        places = {(file, begin) for file, begin, _ in spans}
        self._ahead = {place: found for place, found in self._ahead.items() if place in places}
        for file, group in groupby(spans, key=lambda span: span[0]):
            together: list[tuple[int, int]] = []
            for _, begin, end in (*group, (file, -1, -1)):
                if together and (begin != together[-1][1] or end - together[0][0] > _TENSORS):
                    self._begin(file, together)
                    together = []
                together.append((begin, end))

    def _begin(self, file: str, spans: list[tuple[int, int]]) -> None:
        first, last = spans[0][0], spans[-1][1]
        if (file, first) in self._ahead:
            return
        found = self._pool.submit(self.remote.fetch, file, first, last)
        self._ahead |= {(file, begin): (found, begin - first) for begin, _ in spans}

    def _span(self, name: str) -> tuple[int, int]:
        start = self._data_start[self._file_of[name]]
        begin, end = self._entry[name]["data_offsets"]
        return start + begin, start + end

    def _read(self, path: Path, entry: Mapping[str, Any]) -> bytearray:
        begin, end = entry["data_offsets"]
        place = path.name, self._data_start[path] + begin
        if place in self.remote.kept:
            return bytearray(self.remote.kept[place])
        found = self._ahead.pop(place, None)
        if found is None:
            read = super()._read(path, entry)
        else:
            coming, skipped = found
            read = bytearray(coming.result()[skipped : skipped + end - begin])
        if self._keeps:
            self.remote.kept[place] = bytes(read)
        return read

    def load_rows(self, name: str, rows: Sequence[int]) -> Any:
        """Rows that lie near each other are asked for together."""
        path, entry = self._file_of[name], self._entry[name]
        if self._keeps:
            return self.load(name)[list(rows)]
        begin, end = self._span(name)
        count, *rest = entry["shape"]
        size = (end - begin) // count
        buffer, at_once = bytearray(size * len(rows)), max(1, _ROWS // max(1, size))
        places = sorted(range(len(rows)), key=rows.__getitem__)
        for _, group in groupby(places, key=lambda place: rows[place] // at_once):
            some = list(group)
            first, last = rows[some[0]], rows[some[-1]] + 1
            found = memoryview(self.remote.fetch(path.name, begin + first * size, begin + last * size))
            for place in some:
                offset = (rows[place] - first) * size
                buffer[place * size : (place + 1) * size] = found[offset : offset + size]
        return self.checked(name, self._tensor(buffer, {**entry, "shape": [len(rows), *rest]}, self.where(name)))
