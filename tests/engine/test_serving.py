"""The servers of docs/engines.md: each is started with the command that is there, and asked as clients do."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.engine.conftest import ROOT

import latentize
from latentize.engines.run import engine_python

pytestmark = [pytest.mark.engine, pytest.mark.slow]
PROMPT = "def read_file(path):"
SECONDS = 300


def recipe(engine: str) -> str:
    """The command of docs/engines.md that serves with an engine."""
    text = (ROOT / "docs" / "engines.md").read_text()
    section = text[text.index("## Serve") :]
    found = re.search(rf"```sh\n# {re.escape(engine)}\n(.+?)```", section, re.S)
    assert found, f"no recipe for {engine}"
    return found[1].strip().replace("\\\n", " ")


@contextmanager
def serving(engine: str, model: Path, tmp_path: Path) -> Iterator[str]:
    """The server, listening; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = shlex.split(recipe(engine).replace("8000", port))
    variables = dict(word.split("=", 1) for word in words if re.fullmatch(r"[A-Z_0-9]+=\S+", word))
    command = [
        str(model) if word in ("out", "out.gguf") else word for word in words if word.split("=")[0] not in variables
    ]
    path = f"{engine_python(engine).parent}:{os.environ['PATH']}"
    log = (tmp_path / "server.log").open("w")
    environ = {**os.environ, **variables, "PATH": path, "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(command, stdout=log, stderr=log, env=environ, cwd=tmp_path, start_new_session=True)
    try:
        address, end = f"http://localhost:{port}/v1", time.time() + SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{address}/models", timeout=5).read()
                break
            except urllib.error.HTTPError:
                # It listens; transformers cannot list the models of a hub cache that is not there.
                break
            except OSError:
                assert server.poll() is None and time.time() < end, (tmp_path / "server.log").read_text()[-3000:]
                time.sleep(1)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)
        log.close()


def ask(address: str, model: str, **more: Any) -> dict[str, Any]:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "seed": 0, **more}

    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        return json.load(answer)


@pytest.mark.parametrize("engine", ["transformers", "llama.cpp", "vllm"])
def test_a_server_answers(
    models: Callable[[str], Path], needs: Callable[[str], None], tmp_path: Path, engine: str
) -> None:
    needs(engine)
    if engine == "transformers" and not (engine_python(engine).parent / "uvicorn").exists():
        pytest.skip("2026-11-24: transformers[serving] is not installed; make engines ENGINE=transformers")
    folder = models("converted 32 + 32")
    model = folder
    if engine == "llama.cpp":
        model = tmp_path / "out.gguf"
        latentize.export(folder, model)
    expected = latentize.api.generate(folder, PROMPT, max_new_tokens=24)["text"]
    # Its default punishes repetition, greedy or not; transformers refuses entries that it does not know.
    more = {"repeat_penalty": 1.0} if engine == "llama.cpp" else {}
    with serving(engine, model, tmp_path) as address:
        answer = ask(address, str(model), **more)
    text = answer["choices"][0]["text"]
    # In bfloat16 a later token may be another; the first line of code is far from any tie.
    assert len(expected.split()) > 1
    assert text.lstrip().startswith(expected.split()[0]), (text, expected)
    assert answer["usage"]["completion_tokens"] <= 24
