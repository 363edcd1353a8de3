"""Each fault that conversion has to refuse, made on purpose: its code, what, where, how to mend it; nothing is left.

What resuming refuses is in ``test_resume.py``, memory in ``test_memory.py``, damage in finer grain in
``test_reader.py``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.common import call_cli
from tests.models import pico

from latentize.conversion import limits
from latentize.machine import Room

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
Q = "model.layers.0.self_attn.q_proj.weight"
# What damages a model; a tuple that it returns is more options of the command.
Fault = Callable[[Path], Any]


def entries(name: str, **changes: Any) -> Fault:
    """Other entries in a JSON file."""

    def fault(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return fault


def config(**changes: Any) -> Fault:
    return entries("config.json", **changes)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Fault:
    """Other tensors in the last file of weights."""

    def fault(folder: Path) -> None:
        path = sorted(folder.glob("*.safetensors"))[-1]
        stored = load_file(str(path))
        change(stored)
        save_file(stored, str(path), metadata={"format": "pt"})

    return fault


def first_value(value: float) -> Fault:
    return tensors(lambda stored: stored[Q].view(-1)[:1].fill_(value))


def bytes_of(name: str, change: Callable[[bytes], bytes]) -> Fault:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def shard_path(path: str) -> Fault:
    """The index says that a tensor is elsewhere."""

    def fault(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"][Q] = path
        (folder / INDEX).write_text(json.dumps(index))

    return fault


def moved(name: str, to: str) -> Fault:
    return lambda folder: (folder / name).rename(folder / to)


def linked(folder: Path) -> None:
    real = folder / WEIGHTS
    real.rename(folder.parent / "elsewhere.safetensors")
    real.symlink_to(folder.parent / "elsewhere.safetensors")


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("token*"):
        path.unlink()


def duplicate(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    stored = load_file(str(second))
    save_file({**stored, next(iter(load_file(str(first)))): torch.zeros(2)}, str(second), metadata={"format": "pt"})


def options(*given: object) -> Fault:
    """No damage, but these options."""
    return lambda folder: given


SIZES = ("--kv-lora-rank", 24, "--qk-rope-head-dim", 8)
MULTIMODAL = {"vision_config": {"depth": 2}}
# Kind of model; code; what the message has to name; the fault.
FAULTS: dict[str, tuple[str, str, str, Fault]] = {
    "truncated": ("single", "LZ103", WEIGHTS, bytes_of(WEIGHTS, lambda raw: raw[:-8])),
    "empty": ("single", "LZ103", WEIGHTS, bytes_of(WEIGHTS, lambda raw: b"")),
    "header over the cap": ("single", "LZ103", WEIGHTS, bytes_of(WEIGHTS, lambda raw: b"\xff" * 8 + raw[8:])),
    "git-LFS pointer": ("single", "LZ104", "git lfs pull", bytes_of(WEIGHTS, lambda raw: b"version https://git-lfs")),
    "unfinished download": ("single", "LZ104", "incomplete", moved(WEIGHTS, WEIGHTS + ".incomplete")),
    "missing shard": ("sharded", "LZ106", "shard is missing", lambda f: sorted(f.glob("*.safetensors"))[0].unlink()),
    "extra tensor": ("sharded", "LZ106", "model.extra", tensors(lambda t: t.update({"model.extra": torch.zeros(2)}))),
    "duplicate tensor": ("sharded", "LZ106", "00002", duplicate),
    "absolute path": ("sharded", "LZ107", INDEX, shard_path("/etc/hostname")),
    "path with ..": ("sharded", "LZ107", INDEX, shard_path("../other.safetensors")),
    "link out of the folder": ("single", "LZ107", WEIGHTS, linked),
    "NaN": ("single", "LZ108", Q, first_value(float("nan"))),
    "infinity": ("single", "LZ108", Q, first_value(float("inf"))),
    "shape": ("single", "LZ109", "config.json implies", config(intermediate_size=64)),
    "embedding rows": ("single", "LZ109", "embed_tokens", config(vocab_size=300)),
    "layers": ("single", "LZ110", "num_hidden_layers", config(num_hidden_layers=3)),
    "missing tensor": ("single", "LZ111", Q, tensors(lambda t: t.pop(Q))),
    "bias unannounced": ("single", "LZ111", "bias", tensors(lambda t: t.update({Q[:-6] + "bias": torch.zeros(64)}))),
    "sinks": ("single", "LZ111", "sinks", tensors(lambda t: t.update({Q[:-13] + "sinks": torch.zeros(4)}))),
    "tied and distinct": ("single", "LZ112", "tie_word_embeddings", config(tie_word_embeddings=True)),
    "pickles": ("single", "LZ113", "pytorch_model.bin", moved(WEIGHTS, "pytorch_model.bin")),
    "adapter": ("single", "LZ115", "adapter_config.json", moved("config.json", "adapter_config.json")),
    "no tokenizer": ("single", "LZ116", "tokenizer", without_tokenizer),
    "no config": ("single", "LZ102", "config.json", moved("config.json", "settings.json")),
    "heads": ("single", "LZ121", "query heads", config(num_key_value_heads=3)),
    "no table": ("single", "LZ201", "mamba", config(model_type="mamba")),
    "learned positions": ("single", "LZ201", "opt", config(model_type="opt")),
    "MLP bias, portable": ("biased", "LZ202", "MLP", options("--format", "deepseek_v3")),
    "already MLA": ("single", "LZ203", "kv_lora_rank", config(kv_lora_rank=64)),
    "already ours": ("single", "LZ203", "model_type", config(model_type="latentize")),
    "quantised": ("single", "LZ204", "quantization_config", config(quantization_config={"quant_method": "awq"})),
    "quantised weights": ("single", "LZ204", Q, tensors(lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)}))),
    "sliding window": ("mistral", "LZ205", "sliding_window", config(sliding_window=128)),
    "chunked": ("single", "LZ205", "layer_types", config(layer_types=["chunked_attention", "full_attention"])),
    "hybrid": ("single", "LZ205", "layer_types", config(layer_types=["linear_attention", "full_attention"])),
    "soft-capped attention": ("single", "LZ206", "attn_logit", config(attn_logit_softcapping=50.0)),
    "soft-capped logits": ("single", "LZ206", "final_logit", config(final_logit_softcapping=30.0)),
    "code": ("single", "LZ207", "--trust-remote-code", config(auto_map={"AutoConfig": "a.B"})),
    "code of the tokenizer": (
        "single",
        "LZ207",
        "--trust-remote-code",
        entries("tokenizer_config.json", auto_map={"AutoTokenizer": ["a.B", None]}),
    ),
    "RoPE scaling": ("single", "LZ208", "nope", config(rope_parameters={"rope_type": "nope", "factor": 2.0})),
    "partial rotary": (
        "single",
        "LZ209",
        "partial_rotary_factor",
        config(rope_parameters={"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}),
    ),
    "qk-norm": ("qwen3", "LZ210", "transmla", options("--method", "transmla")),
    "encoder-decoder": ("single", "LZ211", "is_encoder_decoder", config(is_encoder_decoder=True)),
    "multimodal": ("single", "LZ211", "vision_config", config(**MULTIMODAL)),
    "rank 0": ("single", "LZ301", "kv-lora-rank", options("--kv-lora-rank", 0, "--qk-rope-head-dim", 8)),
    "odd roped key": ("single", "LZ301", "even", options("--kv-lora-rank", 8, "--qk-rope-head-dim", 7)),
    "rank over the bound": ("single", "LZ303", "kv-lora-rank", options("--kv-lora-rank", 64, *SIZES[2:])),
    "text that is not there": ("single", "LZ302", "nowhere.txt", options("--data", "nowhere.txt")),
    "OUT is MODEL": ("single", "LZ404", "overwrite", lambda folder: ("OUT", folder)),
    "no folder can be made": ("single", "LZ402", "config.json", lambda folder: ("OUT", folder / "config.json" / "out")),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("refusals")
    return {
        "single": pico(folder, name="single"),
        "sharded": pico(folder, name="sharded", shard="60KB"),
        "biased": pico(folder, name="biased", mlp_bias=True),
        "mistral": pico(folder, "mistral", name="mistral"),
        "qwen3": pico(folder, "qwen3", name="qwen3"),
    }


@pytest.fixture
def refuse(
    saved: dict[str, Path], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[[str, Fault], str]:
    """Convert a damaged model by the command line; what it says, once it was refused and has left nothing."""

    def run(kind: str, fault: Fault) -> str:
        model = Path(shutil.copytree(saved[kind], tmp_path / "model"))
        asked, out = fault(model), tmp_path / "out"
        more = list(asked) if isinstance(asked, tuple) else []
        if more[:1] == ["OUT"]:
            out, more = more[1], more[2:]
        before = sorted(tmp_path.rglob("*"))
        sizes = () if {"--kv-lora-rank", "--method"} & set(more) else SIZES
        data = () if "--data" in more else ("--data", text)
        arguments = ("convert", model, out, "--fast", "--tokens", 512, "--sequence-length", 64, *sizes, *data)
        done = call_cli(capsys, *arguments, *more)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr and done.stdout == ""
        assert sorted(tmp_path.rglob("*")) == before, "nothing new, no OUT, no OUT.partial"
        return done.stderr

    return run


def told(said: str, code: str, word: str) -> None:
    """The message has a code, a sentence, where, how to mend it, and names what is concerned."""
    lines = said.strip().split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("LZ"))
    assert lines[start].split(" ", 1)[0] == code, said
    assert len(lines[start]) > len(code) + 10
    for label in ("  where: ", "  fix:   "):
        assert any(line.startswith(label) and len(line) > len(label) for line in lines), said
    assert word in said, said


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_refused(name: str, refuse: Callable[[str, Fault], str]) -> None:
    kind, code, word, fault = FAULTS[name]
    told(refuse(kind, fault), code, word)


def test_a_token_without_a_row(refuse: Callable[[str, Fault], str]) -> None:
    """The tokenizer is that of a larger model."""

    def fault(folder: Path) -> None:
        config(vocab_size=200)(folder)
        tensors(lambda t: t.update({n: t[n][:200].clone() for n in ("lm_head.weight", "model.embed_tokens.weight")}))(
            folder
        )

    told(refuse("single", fault), "LZ117", "200 rows")


def test_an_output_that_exists(refuse: Callable[[str, Fault], str], tmp_path: Path) -> None:
    def fault(folder: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious.txt").write_text("mine")

    told(refuse("single", fault), "LZ401", "out")


@pytest.mark.parametrize("what", ["disk", "memory", "folder"])
def test_what_the_machine_lacks(
    what: str, refuse: Callable[[str, Fault], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == "disk":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    elif what == "memory":
        monkeypatch.setattr(limits, "memory_room", lambda: Room(1 << 20, "a small machine"))
    else:
        monkeypatch.setattr(os, "access", lambda *_: False)
    code, word = {"disk": ("LZ421", "free"), "memory": ("LZ422", "small"), "folder": ("LZ402", "made")}[what]
    told(refuse("single", lambda folder: None), code, word)
