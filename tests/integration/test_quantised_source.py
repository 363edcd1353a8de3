"""A folder with quantised weights is a source like any other: what is made of it, and what is said of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.common import SMALL, call_cli, last_json, text_file
from tests.latent_models import mixture, saved
from tests.models import pico
from tests.quantised import FORMATS, dequantised, quantised

import latentize
from latentize.checkpoint.checksums import sha256
from latentize.checkpoint.manifest import Manifest
from latentize.planning.inspection import inspect, plan

QUICK = {**SMALL, "tokens": 512, "evaluation_tokens": 256, "selection_tokens": 128}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(text_file(tmp_path_factory.mktemp("text")))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico(tmp_path_factory.mktemp("source"))


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_a_conversion_is_that_of_the_dequantised_folder(name: str, source: Path, text: str, tmp_path: Path) -> None:
    """Byte for byte."""
    dequantised(source, tmp_path / "plain", quantised(source, tmp_path / "made", name))
    files = []
    for folder in ("plain", "made"):
        latentize.convert(tmp_path / folder, tmp_path / f"{folder}-out", keep="50%", data=[text], **QUICK)
        files.append(sha256(tmp_path / f"{folder}-out" / "model.safetensors"))
    assert files[0] == files[1]
    out = tmp_path / "made-out"
    manifest, config = Manifest.load(out), (out / "config.json").read_text()
    kind = manifest.source["quantization"]["file_type"]
    assert "quantization_config" not in config
    said = f"the source's weights are quantised ({kind}): losses are counted from what they are dequantised to"
    assert said in manifest.notes and said in (out / "README.md").read_text()
    assert kind in (out / "report.html").read_text()
    assert latentize.verify(out)["ok"]


@pytest.mark.slow
def test_it_is_measured_and_heals(source: Path, text: str, tmp_path: Path) -> None:
    """As the reference of an evaluation, and as a teacher."""
    quantised(source, tmp_path / "made", "GPTQ, 4 bits")
    latentize.convert(tmp_path / "made", tmp_path / "out", keep="50%", data=[text], **QUICK)
    assert (
        latentize.evaluate(tmp_path / "out", tmp_path / "made", data=[text], tokens=512, sequence_length=64)["kl"] < 1
    )
    sizes = {"tokens": 512, "sequence_length": 64, "selection_tokens": 64, "evaluation_tokens": 256}
    done = latentize.heal(tmp_path / "out", tmp_path / "healed", tmp_path / "made", data=[text], **sizes)
    assert done["excess_loss"] < done["excess_loss_before"] + 1


def test_what_can_be_said_of_it(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantised(source, tmp_path / "made", "AWQ")
    facts = inspect(str(tmp_path / "made"))
    assert facts["quantization"]["file_type"] == "AWQ, 4 bits"
    assert facts["quantization"]["tensors"] == {"quantised": 14, "as they are": 7}
    assert "(AWQ" in call_cli(capsys, "inspect", tmp_path / "made").stdout
    assert plan(str(tmp_path / "made"))["model"] == plan(str(source))["model"]


def test_it_is_run_as_it_is(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantised(source, tmp_path / "made", "bitsandbytes, nf4")
    done = call_cli(capsys, "generate", tmp_path / "made", "some words", "--max-new-tokens", 4, "--json")
    assert last_json(done.stdout)["text"] and not done.stderr


@pytest.mark.slow
def test_a_lower_rank_of_an_fp8_model(text: str, tmp_path: Path) -> None:
    """DeepSeek publishes its models so: experts are quantised one by one."""
    folder = saved(mixture("deepseek_v3"), tmp_path / "source")
    dequantised(folder, tmp_path / "plain", quantised(folder, tmp_path / "made", "fp8, one scale"))
    files = []
    for name in ("plain", "made"):
        latentize.convert(tmp_path / name, tmp_path / f"{name}-out", keep=0.6, data=[text], **QUICK)
        files.append(sha256(tmp_path / f"{name}-out" / "model.safetensors"))
    assert files[0] == files[1]
