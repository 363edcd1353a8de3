"""An output is whole, or it is not there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.common import logits, random_tokens
from tests.models import pico

from latentize.checkpoint import MANIFEST_NAME, Manifest, OutputFolder, open_checkpoint, resolve
from latentize.checkpoint.manifest import sha256
from latentize.errors import CheckpointError, OutputError


def manifest() -> Manifest:
    return Manifest(format="llama", source={"model": "x"}, recipe={"seed": 0})


def fill(folder: OutputFolder, source: Path) -> None:
    checkpoint = open_checkpoint(resolve(source))
    for name in checkpoint.names():
        folder.add(name, checkpoint.load(name))
    folder.copy_tokenizer(source)
    folder.finish(checkpoint.config, manifest())


def test_an_existing_output_is_refused_and_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists") as caught:
        OutputFolder(out)
    assert caught.value.code == "LZ401"
    assert (out / "precious.txt").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_an_existing_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="exists"):
        OutputFolder(tmp_path / "out")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot create") as caught:
        OutputFolder(tmp_path / "file" / "out")
    assert "out" in caught.value.where


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def interrupted() -> None:
        with OutputFolder(tmp_path / "out", shard_bytes=64) as folder:
            folder.add("a", torch.zeros(32))
            folder.add("b", torch.zeros(32))
            assert folder.partial.exists()
            raise error

    with pytest.raises(error):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_leaving_without_finishing_leaves_nothing(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out") as folder:
        folder.add("a", torch.zeros(32))
    assert list(tmp_path.iterdir()) == []


def test_the_output_appears_at_the_end_only(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out") as folder:
        folder.add("a", torch.zeros(32))
        folder.write_text("README.md", "text")
        assert not (tmp_path / "out").exists()
        assert folder.partial.parent == tmp_path
        folder.finish({"model_type": "x"}, manifest())
        assert (tmp_path / "out" / "README.md").read_text() == "text"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync is where a full disk shows at the latest."""

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)

    def write() -> None:
        with OutputFolder(tmp_path / "out") as folder:
            folder.add("a", torch.zeros(32))
            folder.finish({"model_type": "x"}, manifest())

    with pytest.raises(OutputError, match="No space left"):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("shard_bytes", "many"), [(1 << 30, False), (30_000, True), (1, True)])
def test_what_is_written_loads_in_transformers(tmp_path: Path, shard_bytes: int, many: bool) -> None:
    source = pico(tmp_path)
    with OutputFolder(tmp_path / "out", shard_bytes=shard_bytes) as folder:
        fill(folder, source)
    out = tmp_path / "out"
    files = sorted(out.glob("*.safetensors"))
    assert (len(files) > 1) == many
    assert (out / "model.safetensors.index.json").exists() == many
    if many:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert {out / f for f in index["weight_map"].values()} == set(files)
        stored = [load_file(str(f)) for f in files]
        total = sum(t.numel() * t.element_size() for tensors in stored for t in tensors.values())
        assert index["metadata"]["total_size"] == total
        several = [sum(t.numel() * t.element_size() for t in ts.values()) for ts in stored if len(ts) > 1]
        assert all(size <= shard_bytes for size in several)
    tokens = random_tokens()
    assert torch.equal(logits(out, tokens), logits(source, tokens))


def test_the_manifest_hashes_every_other_file(tmp_path: Path) -> None:
    source = pico(tmp_path)
    with OutputFolder(tmp_path / "out", shard_bytes=60_000) as folder:
        fill(folder, source)
    out = tmp_path / "out"
    written = Manifest.load(out)
    assert set(written.files) == {p.name for p in out.iterdir()} - {MANIFEST_NAME}
    assert {"config.json", "tokenizer.json", "generation_config.json"} <= set(written.files)
    for name, digest in written.files.items():
        assert sha256(out / name) == digest
    assert written.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert written.recipe == {"seed": 0}


def test_a_folder_without_or_with_a_damaged_manifest(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no manifest"):
        Manifest.load(tmp_path)
    for text in ("{", "[]", '{"formt": 1}'):
        (tmp_path / MANIFEST_NAME).write_text(text)
        with pytest.raises(CheckpointError, match="damaged"):
            Manifest.load(tmp_path)


def test_whoever_may_read_the_folder_may_read_the_weights(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out") as folder:
        folder.add("a", torch.zeros(32))
        folder.finish({}, manifest())
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()}
    assert len(set(modes.values())) == 1, modes
