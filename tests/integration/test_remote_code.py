"""Code that lies in a checkpoint is run when that was asked for, and at no other time."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.common import SMALL, leftovers, text_file
from tests.models import pico

import latentize
from latentize import api
from latentize.errors import FormatError, LatentizeError, UnsupportedModelError
from latentize.families import table
from latentize.planning.inspection import inspect

# Each file tells that it was run.
MARK = "from pathlib import Path\nPath({marker!r}).touch()\n"
CONFIG = "from transformers import LlamaConfig\nclass CodedConfig(LlamaConfig):\n    model_type = 'coded'\n"
MODEL = (
    "from transformers import LlamaForCausalLM\n"
    "from .configuration_coded import CodedConfig\n"
    "class CodedForCausalLM(LlamaForCausalLM):\n"
    "    config_class = CodedConfig\n"
)
TOKENIZER = (
    "from transformers import PreTrainedTokenizerFast\nclass CodedTokenizer(PreTrainedTokenizerFast):\n    pass\n"
)
OPTIONS = {**SMALL, "kv_lora_rank": 24, "qk_rope_head_dim": 8}


def entries(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "code-was-run"


@pytest.fixture
def coded_model(tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Llama that only its own code knows, with a table."""
    folder, mark = pico(tmp_path), MARK.format(marker=str(marker))
    (folder / "configuration_coded.py").write_text(mark + CONFIG)
    (folder / "modeling_coded.py").write_text(mark + MODEL)
    auto_map = {
        "AutoConfig": "configuration_coded.CodedConfig",
        "AutoModelForCausalLM": "modeling_coded.CodedForCausalLM",
    }
    entries(folder / "config.json", model_type="coded", architectures=["CodedForCausalLM"], auto_map=auto_map)
    llama = json.loads((resources.files("latentize.families") / "tables" / "llama.json").read_text())
    monkeypatch.setattr(table, "_REGISTERED", {})
    latentize.register_family({**llama, "model_type": "coded", "architectures": ["CodedForCausalLM"]})
    return folder


@pytest.fixture
def coded_tokenizer(tmp_path: Path, marker: Path) -> Path:
    """A Llama whose tokenizer is made by code."""
    folder = pico(tmp_path)
    (folder / "tokenization_coded.py").write_text(MARK.format(marker=str(marker)) + TOKENIZER)
    auto_map = {"AutoTokenizer": [None, "tokenization_coded.CodedTokenizer"]}
    entries(folder / "tokenizer_config.json", tokenizer_class="CodedTokenizer", auto_map=auto_map)
    return folder


@pytest.mark.parametrize("kind", ["coded_model", "coded_tokenizer"])
def test_nothing_is_run_unasked(kind: str, marker: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model, text, out = request.getfixturevalue(kind), text_file(tmp_path), tmp_path / "out"
    with pytest.raises(UnsupportedModelError, match="LZ207") as refused:
        latentize.convert(model, out, data=(text,), **OPTIONS)
    assert "auto_map" in refused.value.where and "--trust-remote-code" in refused.value.fix
    for look in (
        lambda: inspect(str(model)),
        lambda: api.evaluate(model, tokens=256, sequence_length=64, data=(text,)),
        lambda: api.generate(model, "a", max_new_tokens=1),
    ):
        try:
            look()
        except LatentizeError:
            continue
    assert not marker.exists() and not leftovers(tmp_path, out)


def test_a_model_whose_code_may_be_run(coded_model: Path, marker: Path, tmp_path: Path) -> None:
    """What is written needs no code: it is what the same weights give as a plain Llama."""
    text, plain = text_file(tmp_path), pico(tmp_path, name="plain")
    report = latentize.convert(coded_model, tmp_path / "out", data=(text,), trust_remote_code=True, **OPTIONS)
    assert marker.exists() and report["format"] == "deepseek_v3"
    assert not list((tmp_path / "out").glob("*.py"))
    latentize.convert(plain, tmp_path / "same", data=(text,), **OPTIONS)
    stored, expected = (load_file(str(tmp_path / name / "model.safetensors")) for name in ("out", "same"))
    assert stored.keys() == expected.keys() and all(stored[name].equal(expected[name]) for name in stored)
    with pytest.raises(FormatError, match="own code"):
        latentize.convert(
            coded_model, tmp_path / "own", data=(text,), trust_remote_code=True, format="native", **OPTIONS
        )


def test_code_without_a_table_is_refused_all_the_same(coded_model: Path, marker: Path, tmp_path: Path) -> None:
    table._REGISTERED.clear()
    with pytest.raises(UnsupportedModelError, match="LZ201"):
        latentize.convert(coded_model, tmp_path / "out", trust_remote_code=True, **OPTIONS)
    assert not marker.exists()


def test_a_tokenizer_whose_code_may_be_run(coded_tokenizer: Path, marker: Path, tmp_path: Path) -> None:
    """Its code goes with it."""
    text = text_file(tmp_path)
    latentize.convert(coded_tokenizer, tmp_path / "out", data=(text,), trust_remote_code=True, **OPTIONS)
    assert marker.exists()
    assert (tmp_path / "out" / "tokenization_coded.py").read_bytes() == (
        coded_tokenizer / "tokenization_coded.py"
    ).read_bytes()
