"""The model card: front matter that parses, what was lost, how to load, the licence of the source."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.common import SMALL, run_python

from latentize.api import convert, heal
from latentize.report.card import licence

KINDS: dict[str, dict[str, Any]] = {
    "portable": {"kv_lora_rank": 24, "qk_rope_head_dim": 8},
    "native": {"keep": "50%", "format": "native"},
    "pooled": {"to": "mqa"},
}


def parts(folder: Path) -> tuple[dict[str, Any], str]:
    """Front matter, and what comes after it."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    found = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL)
    assert found, text
    front = yaml.safe_load(found[1])
    assert isinstance(front, dict)
    return front, found[2]


@pytest.fixture(scope="module")
def outputs(source: Callable[..., Path], text: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("cards")
    for name, entries in KINDS.items():
        convert(source("llama", 2), folder / name, data=(text,), **{**SMALL, **entries})
    return {name: folder / name for name in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_card_says_what_was_lost_and_how_to_load(outputs: dict[str, Path], kind: str) -> None:
    front, body = parts(outputs[kind])
    assert front["license"] == "unknown" and "unknown: neither" in body
    assert front["library_name"] == "transformers" and front["pipeline_tag"] == "text-generation"
    assert ("mla" in front["tags"]) == (kind != "pooled")
    assert "base_model" not in front, "a folder of this machine is nobody else's"
    for said in (
        "loss above the source",
        "KL from the source",
        "## Approximations and limits",
        "longer contexts were not",
    ):
        assert said in body
    assert ("calibrated on" in body) == (kind != "pooled") and ("Heads were averaged" in body) == (kind == "pooled")
    assert "narrow diet" not in body, "the text was the user's own"
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows), "two cells each"
    (code,) = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    assert ("import latentize" in code) == (kind == "native")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_card_says_to_run_runs(outputs: dict[str, Path], kind: str) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", parts(outputs[kind])[1], re.DOTALL)
    done = run_python(code.replace("FOLDER", str(outputs[kind])))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_healed_model_keeps_the_card_and_adds_to_it(
    outputs: dict[str, Path], source: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    options = {"tokens": 512, "sequence_length": 64, "selection_tokens": 128, "evaluation_tokens": 256}
    heal(outputs["portable"], tmp_path / "healed", source("llama", 2), data=(text,), **options)
    (before, body), (after, longer) = parts(outputs["portable"]), parts(tmp_path / "healed")
    assert after == before
    assert longer.startswith(body.rstrip()) and "## Healed" in longer and "distillation" in longer


def test_the_licence_of_the_source_is_carried(source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    model = tmp_path / "a|b"
    shutil.copytree(source("llama", 2), model)
    (model / "README.md").write_text(
        "---\nlicense: other\nlicense_name: llama3.1\nlicense_link: LICENSE\ntags: [x]\n---\n# A model\n"
    )
    (model / "LICENSE").write_text("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n")
    (model / "NOTICE").write_text("a notice\n")
    convert(model, tmp_path / "out", to="mqa", data=(text,), **SMALL)
    front, body = parts(tmp_path / "out")
    assert (front["license"], front["license_name"], front["license_link"]) == ("other", "llama3.1", "LICENSE")
    assert "That of the source: `other`" in body and "a\\|b" in body
    for name in ("LICENSE", "NOTICE"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, {"license": "unknown"}),
        ({"README.md": "---\nlicense: mit\n---\n"}, {"license": "mit"}),
        ({"README.md": "---\r\nlicense: [mit, apache-2.0]\r\n---\r\n"}, {"license": ["mit", "apache-2.0"]}),
        ({"README.md": "---\nlicense: [mit\n---\n"}, {"license": "unknown"}),
        ({"README.md": "# no front matter\nlicense: mit\n"}, {"license": "unknown"}),
        (
            {"LICENSE": "                 Apache License\n           Version 2.0, January 2004\n"},
            {"license": "apache-2.0"},
        ),
        ({"README.md": "---\ntags: [x]\n---\n", "LICENSE.txt": "MIT License\n"}, {"license": "mit"}),
        (
            {"LICENCE.md": "Ours\n"},
            {"license": "other", "license_name": "that-of-the-source", "license_link": "LICENCE.md"},
        ),
    ],
)
def test_where_a_licence_is_found(tmp_path: Path, files: dict[str, str], expected: dict[str, Any]) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode())
    assert licence(tmp_path) == expected
