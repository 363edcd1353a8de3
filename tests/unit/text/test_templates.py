"""Chat templates, and tokens that end a text, on their way through outputs and GGUF files: all of them arrive."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from tests.common import SMALL
from tests.gguf_files import CHAT_TEMPLATE, write_source
from tests.models import pico, portable

from latentize import api
from latentize.checkpoint.writer import OutputFolder
from latentize.formats.gguf import write_gguf
from latentize.formats.gguf_check import check_gguf

PLAIN, TOOLS, RAG = "{{ messages }}", "{{ tools }}{{ messages }}", "{{ documents }}"


def entry(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def listed(**templates: str) -> Callable[[Path], None]:
    return entry(chat_template=[{"name": name, "template": text} for name, text in templates.items()])


def files(**templates: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name, text in templates.items():
            path = folder / ("chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)

    return change


# How templates lie in a source, and what they are.
FORMS: dict[str, tuple[Callable[[Path], None], dict[str, str]]] = {
    "none": (lambda folder: None, {}),
    "one in the config": (entry(chat_template=PLAIN), {"default": PLAIN}),
    "one file": (files(default=PLAIN), {"default": PLAIN}),
    "a list": (listed(default=PLAIN, tool_use=TOOLS, rag=RAG), {"default": PLAIN, "tool_use": TOOLS, "rag": RAG}),
    "a list of one": (listed(default=PLAIN), {"default": PLAIN}),
    "a list without a default": (listed(tool_use=TOOLS, rag=RAG), {"tool_use": TOOLS, "rag": RAG}),
    "files": (files(default=PLAIN, tool_use=TOOLS, rag=RAG), {"default": PLAIN, "tool_use": TOOLS, "rag": RAG}),
    "files without a default": (files(tool_use=TOOLS), {"tool_use": TOOLS}),
}


def templates_of(folder: Path) -> dict[str, str]:
    from transformers import AutoTokenizer

    told = AutoTokenizer.from_pretrained(folder).chat_template
    return {} if told is None else {"default": told} if isinstance(told, str) else dict(told)


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("form", FORMS)
def test_an_output_has_what_transformers_saves_of_a_tokenizer(text: str, tmp_path: Path, form: str) -> None:
    from transformers import AutoTokenizer

    change, expected = FORMS[form]
    source, out = pico(tmp_path, num_hidden_layers=1), tmp_path / "out"
    change(source)
    api.convert(source, out, to="mqa", data=(text,), **SMALL)
    assert templates_of(out) == templates_of(source) == expected
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "saved")
    assert names_in(tmp_path / "saved") <= names_in(out)
    for name in names_in(source) & names_in(out) - {"config.json", "model.safetensors"}:
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    # What lies in a folder is hashed and verified, too.
    assert api.verify(out)["ok"]
    for path in out.glob("additional_chat_templates/*"):
        path.write_text("changed")
        with pytest.raises(Exception, match=path.name):
            api.verify(out)


def test_a_tokenizer_that_transformers_cannot_save_is_copied(text: str, tmp_path: Path) -> None:
    """Its template has a name that leaves the folder."""
    source = pico(tmp_path, num_hidden_layers=1)
    listed(**{"default": PLAIN, "../../evil": TOOLS})(source)
    api.convert(source, tmp_path / "out", to="mqa", data=(text,), **SMALL)
    assert templates_of(tmp_path / "out") == templates_of(source)
    assert not list(tmp_path.rglob("evil*"))


def test_a_conversion_that_goes_on_begins_with_no_templates(tmp_path: Path) -> None:
    """A folder in a folder is removed as files are, before they are written again."""
    from latentize.checkpoint import Journal

    with Journal(tmp_path / "out") as journal:
        journal.begin({})
        for _ in range(2):
            with OutputFolder(tmp_path / "out", journal=journal) as folder:
                assert names_in(folder.partial) == set()
                files(default=PLAIN, tool_use=TOOLS)(folder.partial)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return portable(tmp_path_factory.mktemp("templates"), heads=4, rank=32, rope=16, nope=16, value=16)


def exported(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Keys of the file that is made of a folder, once it was compared with it; and what is said of it."""
    out = folder.parent / "out.gguf"
    report = write_gguf(folder, out, "f32")
    check_gguf(out, folder)
    return {key: field.contents() for key, field in GGUFReader(out).fields.items()}, report["notes"]


@pytest.mark.parametrize("form", FORMS)
def test_a_gguf_file_has_all_templates_as_llama_cpp_writes_them(made: Path, tmp_path: Path, form: str) -> None:
    change, expected = FORMS[form]
    folder = Path(shutil.copytree(made, tmp_path / "model"))
    change(folder)
    keys, notes = exported(folder)
    named = [name for name in expected if name != "default"]
    assert keys.get("tokenizer.chat_template") == expected.get("default")
    assert sorted(keys.get("tokenizer.chat_templates", [])) == sorted(named)
    assert {key for key in keys if key.startswith("tokenizer.chat_template.")} == {
        f"tokenizer.chat_template.{name}" for name in named
    }
    for name in named:
        assert keys[f"tokenizer.chat_template.{name}"] == expected[name]
    assert notes == []


def test_names_of_templates_that_a_key_cannot_have(made: Path, tmp_path: Path) -> None:
    """As llama.cpp's converter has them; the second of two that become one is left out, and said."""
    folder = Path(shutil.copytree(made, tmp_path / "model"))
    listed(**{"default": PLAIN, "tool-use": TOOLS, "tool use": RAG, "bad": "\ud800"})(folder)
    keys, notes = exported(folder)
    assert keys["tokenizer.chat_templates"] == ["tool_use"] and keys["tokenizer.chat_template.tool_use"] == TOOLS
    assert len(notes) == 2 and "'tool use'" in notes[0] and "'bad'" in notes[1]


@pytest.mark.parametrize(
    ("generation", "config", "ends", "note"),
    [
        ([0], 0, {"eos": 0}, ""),
        (0, [0, 5], {"eos": 0, "eot": 5}, ""),
        ([5, 0, 7], 0, {"eos": 0, "eot": 5, "eom": 7}, ""),
        ([0, 5], [0, 7], {"eos": 0, "eot": 5, "eom": 7}, ""),
        ([0, 5, 7, 9], 0, {"eos": 0, "eot": 5, "eom": 7}, "[9]"),
        ([0, 10**6, -1, True, "a", None, 5], None, {"eos": 0, "eot": 5}, ""),
    ],
)
def test_all_tokens_that_end_a_text_are_exported(
    made: Path, tmp_path: Path, generation: Any, config: Any, ends: dict[str, int], note: str
) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "model"))
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        entries = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**entries, "eos_token_id": value}))
    keys, notes = exported(folder)
    found = {name: keys.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
    assert {name: value for name, value in found.items() if value is not None} == ends
    assert (note in " ".join(notes)) and bool(notes) == bool(note)


@pytest.mark.parametrize(("entry_name", "key"), [("pad_token", "padding"), ("unk_token", "unknown")])
def test_special_tokens_that_gguf_names_otherwise(made: Path, tmp_path: Path, entry_name: str, key: str) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "model"))
    entry(**{entry_name: "<|endoftext|>"})(folder)
    assert exported(folder)[0][f"tokenizer.ggml.{key}_token_id"] == 0


def test_a_gguf_source_keeps_templates_and_ends(text: str, tmp_path: Path) -> None:
    keys = {
        "tokenizer.ggml.eot_token_id": 5,
        "tokenizer.ggml.eom_token_id": 7,
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": TOOLS,
    }
    source, out = tmp_path / "model.gguf", tmp_path / "out"
    write_source(source, keys=keys)
    api.convert(source, out, to="mqa", data=(text,), **SMALL)
    assert templates_of(out) == {"default": CHAT_TEMPLATE, "tool_use": TOOLS}
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [0, 5, 7]
    from latentize.modeling.load import load_model

    assert load_model(source).generation_config.eos_token_id == [0, 5, 7]
