"""What README and documentation tell users to type works, on the model that ships."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tests.common import call_cli

import latentize
from latentize.healing.recipe import Healing
from latentize.recipe import Recipe

ROOT = Path(__file__).parents[2]
# A command of the README says less than these; what it says counts.
QUICK = {"fast": True, "tokens": 2048, "sequence_length": 256, "selection_tokens": 256, "evaluation_tokens": 512}
QUICK_HEALING = {"tokens": 2048, "selection_tokens": 512, "evaluation_tokens": 1024}
# And of `--tokens` no more than this is taken.
MOST = {"--tokens": 2048, "--samples": 1, "--limit": 4}
# Pages whose commands can be typed as they stand.
PAGES = (
    "README.md",
    *(f"docs/{name}.md" for name in ("tutorial", "convert", "bits", "plan", "evaluation", "healing")),
)
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("script", ["engine_tables.py", "family_table.py"])
def test_tables_are_those_that_were_measured(script: str) -> None:
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / script, "--check"], capture_output=True)
    assert done.returncode == 0, done.stdout.decode()


def commands(page: str) -> list[list[str]]:
    """Lines of fenced ``sh`` blocks that call latentize, in order, split as a shell does."""
    text = "".join(BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))).replace("\\\n", " ")
    return [shlex.split(line, comments=True)[1:] for line in text.splitlines() if line.startswith("latentize ")]


def quick(command: list[str]) -> list[str]:
    """The same on less text."""
    most = {at + 1: MOST[word] for at, word in enumerate(command) if word in MOST}
    return [str(min(int(word), most[at])) if at in most else word for at, word in enumerate(command)]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page(
    page: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one folder where ``models`` and ``examples`` are the repository's, on less text to be quick."""
    found = commands(page)
    assert found, "the page shows what to type"
    build = Recipe.build
    monkeypatch.setattr(Recipe, "build", lambda **entries: build(**{**QUICK, **entries}))
    heal = Healing.build
    monkeypatch.setattr(Healing, "build", lambda **entries: heal(**{**entries, **QUICK_HEALING}))
    for name in ("models", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    if any("out" in command for command in found) and not any(command[:1] == ["convert"] for command in found):
        # The page is read after a conversion.
        found.insert(0, ["convert", "models/tiny-llama-gqa", "out", "--keep", "50%"])
    for command in map(quick, found):
        done = call_cli(capsys, *command)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
        assert done.stdout.strip(), shlex.join(command)


@pytest.mark.slow
def test_the_bundled_model_is_a_real_one(tmp_path: Path) -> None:
    """Far below the perplexity of guessing, and what ``convert`` measures is what ``evaluate`` does."""
    model, out = ROOT / "models" / "tiny-llama-gqa", tmp_path / "out"
    options = {"tokens": 4096, "evaluation_tokens": 4096, "fast": True}
    report = latentize.convert(model, out, kv_lora_rank=48, qk_rope_head_dim=16, **options)
    assert report["format"] == "deepseek_v3"
    assert report["cache_values_per_token_layer"] == 64
    assert 1 < report["source_perplexity"] < 20
    assert report["source_perplexity"] < report["perplexity"] < 200
    measured = latentize.evaluate(out, model, tokens=4096)
    assert measured["tokens"] == report["evaluation_tokens"]
    assert measured["perplexity"] == pytest.approx(report["perplexity"], rel=1e-3)
    assert measured["kl"] == pytest.approx(report["kl"], rel=1e-2)
