"""The servers of docs/engines.md: each is started with the command that is there, and asked as clients do."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.engine.conftest import ROOT

import latentize
from latentize.engines.run import engine_python

pytestmark = [pytest.mark.engine, pytest.mark.slow]
PROMPT = "def read_file(path):"
SECONDS = 300


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark, which starts them."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import serving

    return serving


def ask(address: str, model: str, **more: Any) -> dict[str, Any]:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "seed": 0, **more}

    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        return json.load(answer)


@pytest.mark.parametrize("engine", ["transformers", "llama.cpp", "vllm"])
def test_a_server_answers(
    servers: Any, models: Callable[[str], Path], needs: Callable[[str], None], tmp_path: Path, engine: str
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
    with servers.serving(engine, model, tmp_path) as (address, group):
        # Its default punishes repetition, greedy or not; transformers refuses entries that it does not know.
        answer = ask(address, str(model), **({"repeat_penalty": 1.0} if engine == "llama.cpp" else {}))
        streamed = "".join(servers.ask(engine, address, str(model), PROMPT, 24))
        assert servers.memory(group) > 1 << 26
    text = answer["choices"][0]["text"]
    # In bfloat16 a later token may be another; the first line of code is far from any tie.
    assert len(expected.split()) > 1
    for found in (text, streamed):
        assert found.lstrip().startswith(expected.split()[0]), (found, expected)
    assert answer["usage"]["completion_tokens"] <= 24
