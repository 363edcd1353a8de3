"""A GGUF file as a source: what is read is what transformers reads, and what was written; the rest is refused."""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.common import FP32, SMALL, call_cli, last_json, leftovers, random_tokens, relative_error
from tests.gguf_files import CHAT_TEMPLATE, source_model, write_source
from tests.killing import contents
from tests.models import LLAMA3_SCALING, trained_tokenizer

import latentize
from latentize.checkpoint import Journal, gguf_header, load_config, open_checkpoint, resolve
from latentize.checkpoint import gguf_config as reader
from latentize.checkpoint.manifest import Manifest, sha256
from latentize.errors import CheckpointError, LatentizeError, ResumeError
from latentize.families.opening import open_source
from latentize.modeling.load import load_model
from latentize.planning.inspection import inspect, plan
from latentize.report import card
from latentize.text.tokenizer import load_tokenizer

# Those whose config transformers reads whole; of others some entries are put right.
PLAIN = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "lfm2", "starcoder2")
FAMILIES = (*PLAIN, "qwen3_moe", "stablelm", "mistral")
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantised Llama, not to be changed."""
    path = tmp_path_factory.mktemp("gguf") / "llama-Q4_1.gguf"
    write_source(path, kind="Q4_1", keys={"general.license": "apache-2.0"})
    return path


def one_by_one(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts as a checkpoint holds them, where transformers stacks them."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        prefix, _, role = name.rpartition(".")
        if not prefix.endswith("mlp.experts"):
            found[name] = tensor
            continue
        parts = {"gate": 0, "up": 1} if role == "gate_up_proj" else {"down": 0}
        for part, place in parts.items():
            for expert, weight in enumerate(tensor.chunk(len(parts), dim=1)[place]):
                found[f"{prefix}.{expert}.{part}_proj.weight"] = weight
    return found


def by_transformers(path: Path, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """The tensors that transformers reads from the file, as it saves them."""
    from transformers import AutoModelForCausalLM, GgufConfig

    model: Any = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        **options,
    )
    model.save_pretrained(folder)
    return one_by_one(load_file(str(folder / "model.safetensors")))


@pytest.mark.parametrize(
    ("family", "kind"),
    [(family, "Q8_0") for family in FAMILIES] + [("llama", kind) for kind in ("F32", "F16", "Q4_0", "Q4_1")],
)
def test_tensors_are_those_that_transformers_reads(family: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_source(path, family, kind)
    checkpoint, spec = open_source(path)
    options = {} if family in PLAIN else {"config": load_config(path)}
    expected = by_transformers(path, tmp_path / "saved", **options)
    assert set(checkpoint.names()) == set(expected) == set(spec.tensor_shapes())
    for name, tensor in expected.items():
        assert checkpoint.shape(name) == tuple(tensor.shape), name
        assert checkpoint.size(name) == tensor.nbytes
        assert torch.equal(checkpoint.load(name), tensor), name
        some = [len(tensor) - 1, 0, 0]
        assert torch.equal(checkpoint.load_rows(name, some), tensor[some]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_the_one_that_was_written(family: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    model = write_source(path, family)
    tokens = random_tokens(vocab=320)
    with torch.no_grad():
        assert relative_error(load_model(path)(tokens).logits, model(tokens).logits) < FP32


@pytest.mark.parametrize(
    ("family", "rope", "keys"),
    [
        (
            "llama",
            {"rope_type": "linear", "factor": 4.0},
            {".rope.scaling.type": "linear", ".rope.scaling.factor": 4.0},
        ),
        ("llama", {**LLAMA3_SCALING, "original_max_position_embeddings": 8192}, {}),
        ("phi3", {"partial_rotary_factor": 0.5}, {}),
    ],
)
def test_rope_that_transformers_leaves_out(
    family: str, rope: dict[str, Any], keys: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    said = {"rope_type": "default", "rope_theta": 10_000.0, **rope}
    model = source_model(family, rope_parameters=said)
    tensors: dict[str, Any] = {}
    if said["rope_type"] == "llama3":
        plain = 10_000.0 ** -(np.arange(8) / 8)
        tensors["rope_freqs.weight"] = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    write_source(path, family, model=model, keys=keys, tensors=tensors)
    _, spec = open_source(path)
    assert spec.attention.rope.rope_type == said["rope_type"]
    tokens = random_tokens(vocab=320)
    with torch.no_grad():
        assert relative_error(load_model(path)(tokens).logits, model(tokens).logits) < FP32


def test_the_tokenizer_is_that_of_the_file(saved: Path) -> None:
    tokenizer, wanted = load_tokenizer(saved), trained_tokenizer()
    for text in ("a sentence of words, and more", "  two\n\tspaces ünd", "<|endoftext|>etaoin"):
        assert tokenizer(text)["input_ids"] == wanted(text)["input_ids"]
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_it_is_found(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(saved) == resolve(saved.parent) == saved
    monkeypatch.setenv("HOME", str(saved.parent))
    assert resolve(f"~/{saved.name}") == saved
    # The hub's cache names blobs by their hash.
    (tmp_path / "link.gguf").symlink_to(saved)
    assert resolve(tmp_path) == tmp_path / "link.gguf"
    assert open_checkpoint(tmp_path / "link.gguf").config["model_type"] == "llama"


def test_what_can_be_said_of_it(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = inspect(str(saved))
    assert facts["model_type"] == "llama" and facts["quantization"]["file_type"] == "Q4_1"
    assert facts["quantization"]["tensors"] == {"F32": 5, "Q4_1": 16}
    assert "mostly Q4_1" in facts["note"]
    assert plan(str(saved.parent))["model"]["head_dim"] == 16
    assert "Q4_1" in call_cli(capsys, "inspect", saved).stdout
    assert card.licence(saved) == {"license": "apache-2.0"}


@pytest.mark.slow
def test_a_conversion(saved: Path, text: str, tmp_path: Path) -> None:
    """To an output that is verified, measured against the file, and has what the file says beside its weights."""
    out = tmp_path / "out"
    latentize.convert(saved, out, keep="50%", data=[text], **SMALL)
    assert latentize.verify(out)["ok"]
    measured = latentize.evaluate(out, saved, data=[text], tokens=512, sequence_length=64)
    assert measured["kl"] < 1.0
    manifest = Manifest.load(out)
    assert manifest.source["files"] == {saved.name: sha256(saved)}
    assert manifest.source["quantization"]["tensors"] == {"F32": 5, "Q4_1": 16}
    assert any("losses are counted from its dequantised weights" in note for note in manifest.notes)
    for name in ("report.html", "README.md"):
        said = (out / name).read_text()
        assert "the source is a GGUF file, mostly Q4_1: losses are counted from its dequantised weights" in said
    assert "license: apache-2.0" in (out / "README.md").read_text()
    tokenizer = load_tokenizer(out)
    assert tokenizer("some words")["input_ids"] == load_tokenizer(saved)("some words")["input_ids"]
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 0


@pytest.mark.slow
def test_the_same_as_of_what_transformers_saves(saved: Path, text: str, tmp_path: Path) -> None:
    """Byte for byte, from the file and from the folder that transformers makes of it."""
    folder = tmp_path / "saved"
    by_transformers(saved, folder)
    load_tokenizer(saved).save_pretrained(folder)
    made = []
    for number, source in enumerate((saved, folder)):
        latentize.convert(source, tmp_path / str(number), keep="50%", data=[text], **SMALL)
        made.append(sha256(tmp_path / str(number) / "model.safetensors"))
    assert made[0] == made[1]


@pytest.mark.slow
def test_it_goes_on_with_the_same_file_only(
    saved: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**SMALL, "kv_lora_rank": 24, "qk_rope_head_dim": 8, "fast": False, "polish": False, "data": (text,)}
    options |= {"tokens": 512, "evaluation_tokens": 256}
    path, out = Path(shutil.copy(saved, tmp_path)), tmp_path / "out"
    original = Journal.keep

    def keep(self: Journal, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "keep", keep)
    with pytest.raises(KeyboardInterrupt):
        latentize.convert(path, out, **options)
    monkeypatch.undo()
    write_source(path, model=source_model("llama", seed=1), kind="Q4_1")
    with pytest.raises(ResumeError, match=r"LZ412.*weights"):
        latentize.convert(path, out, resume=True, **options)
    shutil.copy(saved, path)
    latentize.convert(path, out, resume=True, **options)
    resumed = contents(out)
    shutil.rmtree(out)
    latentize.convert(path, out, **options)
    assert resumed == contents(out)


def test_it_is_run_as_it_is(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = call_cli(capsys, "generate", saved, "some words", "--max-new-tokens", 4, "--json")
    assert last_json(done.stdout)["text"] and not done.stderr


@pytest.mark.slow
def test_a_teacher(saved: Path, text: str, tmp_path: Path) -> None:
    latentize.convert(saved, tmp_path / "out", keep="50%", data=[text], **SMALL)
    sizes = {"tokens": 512, "sequence_length": 64, "selection_tokens": 64, "evaluation_tokens": 256}
    done = latentize.heal(tmp_path / "out", tmp_path / "healed", saved, data=[text], **sizes)
    assert done["excess_loss"] < done["excess_loss_before"] + 1.0


def refused(path: Path, code: str, *words: str) -> None:
    """Reading the file fails with an error that says where and how to mend it."""

    def read() -> None:
        checkpoint, spec = open_source(path)
        for name in spec.tensor_shapes():
            checkpoint.load(name)
        load_tokenizer(resolve(path))

    with pytest.raises(LatentizeError) as caught:
        read()
    assert caught.value.code == code, str(caught.value)
    assert caught.value.where and caught.value.fix
    for word in words:
        assert word in str(caught.value), str(caught.value)


def cut(share: float) -> Callable[[bytes], bytes]:
    return lambda raw: raw[: int(len(raw) * share)]


@pytest.mark.parametrize(
    ("change", "code", "word"),
    [
        (lambda raw: b"", "LZ105", "not a GGUF"),
        (lambda raw: b"PK\3\4" + raw[4:], "LZ105", "not a GGUF"),
        (lambda raw: b"version https://git-lfs.github.com/spec/v1\n", "LZ104", "git lfs pull"),
        (lambda raw: raw[:4] + struct.pack("<I", 1) + raw[8:], "LZ105", "version 1"),
        (lambda raw: raw[:4] + struct.pack(">I", 3) + raw[8:], "LZ105", "little-endian"),
        (lambda raw: raw[:8] + struct.pack("<Q", 1 << 60) + raw[16:], "LZ103", "tensors"),
        (lambda raw: raw[:16] + struct.pack("<Q", 1 << 60) + raw[24:], "LZ103", "keys"),
        (cut(0.001), "LZ103", "truncated"),
        (cut(0.1), "LZ103", "truncated"),
        (cut(0.9), "LZ103", "truncated"),
        (lambda raw: raw.replace(b"output_norm.weight", b"token_embd.weight\0"), "LZ111", ""),
    ],
)
def test_a_damaged_file(saved: Path, tmp_path: Path, change: Callable[[bytes], bytes], code: str, word: str) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(change(saved.read_bytes()))
    refused(path, code, word)


def test_no_flipped_byte_of_the_header_is_more_than_an_error(saved: Path, tmp_path: Path) -> None:
    raw, path = saved.read_bytes(), tmp_path / "flipped.gguf"
    for number, place in enumerate(range(0, 12_000, 61)):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 0xFF]) + raw[place + 1 :])
        with contextlib.suppress(LatentizeError):
            # Headers are read in no time, all of a file is not.
            open_source(path) if number % 8 == 0 else gguf_header.read_gguf_header(path)


@pytest.mark.parametrize(
    ("written", "code", "word"),
    [
        ({"architecture": "clip"}, "LZ201", "'clip'"),
        ({"architecture": "granite"}, "LZ201", "'granite'"),
        ({"architecture": "bloom"}, "LZ201", "bloom"),
        ({"architecture": "deepseek2", "keys": {".attention.kv_lora_rank": 32}}, "LZ203", "latent attention already"),
        ({"keys": {".expert_count": 4}}, "LZ201", "experts"),
        ({"keys": {"split.count": 2}}, "LZ119", "one part of 2"),
        ({"keys": {".rope.scaling.type": "yarn", ".rope.scaling.factor": 4.0}}, "LZ208", "yarn"),
        ({"tensors": {"rope_freqs.weight": np.arange(1.0, 9.0)}}, "LZ208", "rope_freqs.weight"),
        ({"tensors": {"rope_factors_long.weight": np.ones(8)}}, "LZ111", "rope_factors_long.weight"),
        ({"tensors": {"blk.0.attn_q.bias": np.ones(64)}}, "LZ111", "attn_q.bias"),
        ({"tensors": {"blk.1.ffn_up.weight": None}}, "LZ111", "layers.1.mlp.up_proj"),
        ({"tensors": {"token_embd.weight": np.ones((320, 32))}}, "LZ109", "token_embd.weight"),
        ({"tensors": {"blk.0.ffn_up.weight": np.full((96, 64), np.nan)}}, "LZ108", "ffn_up"),
        ({"tensors": {"blk.0.attn_norm.weight": np.full(64, np.inf)}}, "LZ108", "attn_norm"),
        ({"keys": {".block_count": 3}}, "LZ110", "3 layers"),
        ({"keys": {".attention.head_count": 0}}, "LZ102", ""),
        ({"tokenizer": False}, "LZ116", "no tokenizer"),
    ],
)
def test_an_odd_file(tmp_path: Path, written: dict[str, Any], code: str, word: str) -> None:
    path = tmp_path / "odd.gguf"
    write_source(path, **written)
    refused(path, code, word)


def test_a_type_that_cannot_be_dequantised(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(gguf.quants, "dequantize", lacking)
    path = Path(shutil.copy(saved, tmp_path))
    refused(path, "LZ204", "does not dequantise")


def test_several_in_a_folder(saved: Path, tmp_path: Path) -> None:
    for name in ("a-Q4_0.gguf", "b-Q8_0.gguf"):
        shutil.copy(saved, tmp_path / name)
    refused(tmp_path, "LZ119", "a-Q4_0.gguf, b-Q8_0.gguf", f"name one of them: {tmp_path / 'a-Q4_0.gguf'}")
    assert resolve(tmp_path / "b-Q8_0.gguf").name == "b-Q8_0.gguf"


def test_another_file(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"GGUF")
    refused(tmp_path / "model.bin", "LZ101", "GGUF file")


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_package_that_is_missing(saved: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def lacking(name: str, *rest: Any) -> Any:
        if name == package:
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", lacking)
    reader.header_and_config.cache_clear()
    with pytest.raises(CheckpointError, match=r"pip install 'latentize\[gguf\]'") as caught:
        load_model(saved)
    assert caught.value.code == "LZ120"


def test_the_output_is_not_written(saved: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(saved.read_bytes()[:-100])
    done = call_cli(capsys, "convert", path, tmp_path / "out", "--keep", "50%", "--data", text)
    assert done.returncode == 2 and "LZ103" in done.stderr and "Traceback" not in done.stderr
    assert not leftovers(tmp_path, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("LATENTIZE_TEST_GGUF"),
    reason="2026-11-26: name a GGUF file of a real model in LATENTIZE_TEST_GGUF",
)
def test_a_real_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(os.environ["LATENTIZE_TEST_GGUF"])
    checkpoint, _ = open_source(path)
    for name, tensor in by_transformers(path, tmp_path / "saved", config=load_config(path)).items():
        assert torch.equal(checkpoint.load(name), tensor), name
    assert last_json(call_cli(capsys, "inspect", path, "--json").stdout)["quantization"]["format"] == "gguf"
