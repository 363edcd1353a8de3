"""A hub of one's own: what huggingface_hub asks of a server, for the models in a folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

REVISION = "b" * 40


class Hub(ThreadingHTTPServer):
    """Serves ``folder/organisation/name``.

    Attributes:
        asked: What was asked for: method, file, and the range of bytes or nothing.
        failing: So many answers to ranges are errors, before they are right.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.failing = folder, 0
        self.asked: list[tuple[str, str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def do_GET(self) -> None:
        self._answer(head=False)

    def _answer(self, *, head: bool) -> None:
        parts = urlsplit(self.path).path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._described("/".join(parts[2:4]), tree="tree" in parts)
            return
        file = self.server.folder.joinpath(*parts[:2], *parts[4:])
        asked = self.headers.get("Range", "")
        self.server.asked.append((self.command, file.name, asked))
        if not file.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, head=head)
            return
        if asked and self.server.failing:
            self.server.failing -= 1
            self._send(503, b"", {}, head=head)
            return
        content = file.read_bytes()
        more = {"X-Repo-Commit": REVISION, "ETag": f'"{_digest(file)}"', "Accept-Ranges": "bytes"}
        if not asked:
            self._send(200, content, more, head=head)
            return
        begin, _, end = asked.removeprefix("bytes=").partition("-")
        part = content[int(begin) : int(end) + 1]
        more["Content-Range"] = f"bytes {begin}-{int(begin) + len(part) - 1}/{len(content)}"
        self._send(206, part, more, head=head)

    def _described(self, name: str, *, tree: bool) -> None:
        folder = self.server.folder / name
        if not folder.is_dir():
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        files = [path for path in sorted(folder.iterdir()) if path.is_file()]
        if tree:
            said: Any = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _digest(f)} for f in files]
        else:
            siblings = []
            for path in files:
                entry: dict[str, Any] = {"rfilename": path.name, "size": path.stat().st_size, "blobId": _digest(path)}
                if path.suffix == ".safetensors":
                    entry["lfs"] = {"sha256": _digest(path), "size": entry["size"], "pointerSize": 100}
                siblings.append(entry)
            said = {"id": name, "modelId": name, "sha": REVISION, "siblings": siblings, "tags": [], "private": False}
        self._send(200, json.dumps(said).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str], *, head: bool = False) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if not head:
            self.wfile.write(content)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    """A hub that answers meanwhile."""
    hub = Hub(folder)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
