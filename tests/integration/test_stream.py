"""Weights that are read from the hub as layers need them: none is on a disk, and the result is the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.common import SMALL, run_python
from tests.hub import REVISION, Hub, serving
from tests.latent_models import mixture, saved
from tests.models import pico

import latentize
from latentize.checkpoint.manifest import Manifest, sha256

STREAMED = """
import json, sys
import latentize
from latentize.checkpoint import streaming
streaming._SECONDS, streaming._KEPT = 0.01, int(sys.argv[4])
options = json.loads(sys.argv[3])
report = latentize.convert(sys.argv[1], sys.argv[2], stream=True, **options)
print(json.dumps(report))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    (tmp_path / "served" / "someone").mkdir(parents=True)
    with serving(tmp_path / "served") as running:
        yield running


def converted(hub: Hub, out: Path, name: str, *, kept: int = 0, **options: Any) -> Any:
    """A process of its own: where the hub is, is settled when huggingface_hub is imported.

    Weights of no more than ``kept`` bytes stay in memory.
    """
    env = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(out.parent / "cache"), "HF_HUB_DISABLE_XET": "1"}
    env["HF_HUB_OFFLINE"] = "0"
    return run_python(STREAMED, name, out, json.dumps(options), str(kept), cwd=out.parent, env=env)


def weights(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize(
    ("family", "config", "options", "kept"),
    [
        ("llama", {}, {"keep": "50%", "fast": False, "polish": False, "tokens": 1024}, 1 << 30),
        ("mixtral", {}, {"keep": "50%"}, 0),
        ("llama", {"shard": "40KB"}, {"keep": "50%"}, 0),
    ],
    ids=["refined, in memory", "experts", "shards"],
)
def test_the_same_bytes(
    hub: Hub, text: str, tmp_path: Path, family: str, config: dict[str, Any], options: dict[str, Any], kept: int
) -> None:
    source = pico(hub.folder / "someone", family, name="pico", **config)
    options = {"data": (text,), **SMALL, **options}
    latentize.convert(source, tmp_path / "here", **options)
    done = converted(hub, tmp_path / "out", "someone/pico", kept=kept, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    assert weights(tmp_path / "out") == weights(tmp_path / "here")
    assert not list((tmp_path / "cache").rglob("*.safetensors")), "no weights on a disk"
    whole = [file for method, file, part in hub.asked if method == "GET" and file.endswith(".safetensors") and not part]
    assert not whole, "never a whole file"
    ranges = [part.removeprefix("bytes=").split("-") for *_, part in hub.asked if part]
    read = sum(1 + int(end) - int(begin) for begin, end in ranges)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    # Headers are read twice: the model writes text of its own first.
    assert read <= 1.05 * size if kept else size < read < 8 * size
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.source["model"] == "someone/pico"
    assert any("read from the hub" in note for note in json.loads(done.stdout.splitlines()[-1])["notes"])
    assert REVISION not in json.dumps(manifest.source), "the hub says what the files' hashes are"


def test_a_lower_rank(hub: Hub, text: str, tmp_path: Path) -> None:
    source = saved(mixture("deepseek_v3"), hub.folder / "someone" / "pico")
    options = {"keep": "60%", "data": (text,), **{k: v for k, v in SMALL.items() if k != "dtype"}}
    latentize.convert(source, tmp_path / "here", **options)
    done = converted(hub, tmp_path / "out", "someone/pico", **options)
    assert done.returncode == 0, done.stderr[-2000:]
    assert weights(tmp_path / "out") == weights(tmp_path / "here")


def test_a_network_that_stutters_and_one_that_is_gone(hub: Hub, text: str, tmp_path: Path) -> None:
    pico(hub.folder / "someone", "llama", name="pico")
    hub.failing = 3
    done = converted(hub, tmp_path / "out", "someone/pico", keep="50%", data=(text,), **SMALL)
    assert done.returncode == 0 and hub.failing == 0, done.stderr[-2000:]
    hub.failing = 10_000
    done = converted(hub, tmp_path / "gone", "someone/pico", keep="50%", data=(text,), **SMALL)
    assert done.returncode != 0
    assert "cannot read the weights from the hub" in done.stderr and "--stream" in done.stderr
    assert not (tmp_path / "gone").exists()


def test_what_the_hub_does_not_have(hub: Hub, text: str, tmp_path: Path) -> None:
    done = converted(hub, tmp_path / "out", "someone/else", keep="50%", data=(text,), **SMALL)
    assert done.returncode != 0 and "cannot get the model from the hub" in done.stderr


def test_a_folder_is_read_as_ever(source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    latentize.convert(source("llama", 2), tmp_path / "out", keep="50%", stream=True, data=(text,), **SMALL)
    assert (tmp_path / "out" / "config.json").is_file()
