"""Recipes for clusters ask for what commands take."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from tests.common import call_cli

CLUSTER = Path(__file__).resolve().parents[3] / "examples" / "cluster"


def asked(tmp_path: Path, script: str, *arguments: str, **environment: str) -> list[str]:
    """What a script runs in the end, by stand-ins that write it down."""
    written = tmp_path / "asked"
    for name in ("torchrun", "latentize"):
        (tmp_path / name).write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@" >{written}\n')
    (tmp_path / "srun").write_text('#!/bin/sh\nexec "$@"\n')
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho first\necho second\n")
    for name in ("torchrun", "latentize", "srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    settings = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **environment}
    subprocess.run([str(CLUSTER / script), *arguments], check=True, env=settings)
    return written.read_text().splitlines()


def known(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    """``convert`` takes all of these options."""
    said = call_cli(capsys, "convert", "--help").stdout
    options = [argument for argument in arguments if argument.startswith("--")]
    assert options and all(re.search(rf"{option}\b", said) for option in options)


def test_slurm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
    found = asked(tmp_path, "slurm.sh", "model", "out", "--keep", "50%", **given)
    at = found.index("latentize")
    torchrun, convert = found[: at - 1], found[at + 1 :]
    assert torchrun[0] == "torchrun" and found[at - 1] == "-m"
    assert torchrun[torchrun.index("--nnodes") + 1] == "2" and "first:29500" in torchrun
    assert convert == ["convert", "model", "out", "--keep", "50%", "--device", "cuda", "--resume"]
    known(capsys, convert)


@pytest.mark.parametrize(
    ("number", "budgets", "name", "option"),
    [("0", "", "75%", "--keep"), ("3", "", "25%", "--keep"), ("1", "--bytes=25% --bytes=12.5%", "12.5%", "--bytes")],
)
def test_a_sweep(
    number: str, budgets: str, name: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"SLURM_ARRAY_TASK_ID": number, **({"BUDGETS": budgets} if budgets else {})}
    found = asked(tmp_path, "slurm-sweep.sh", "model", str(tmp_path / "out"), "--fast", **given)
    assert found[:6] == ["latentize", "convert", "model", str(tmp_path / "out" / name), option, name]
    known(capsys, found)


@pytest.mark.parametrize("script", ["slurm.sh", "slurm-sweep.sh"])
def test_without_arguments_a_script_says_what_it_wants(script: str) -> None:
    done = subprocess.run([str(CLUSTER / script)], capture_output=True, text=True)
    assert done.returncode == 2 and "MODEL OUT" in done.stderr


def test_kubernetes(capsys: pytest.CaptureFixture[str]) -> None:
    job = yaml.safe_load((CLUSTER / "pytorchjob.yaml").read_text())
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    (container,) = worker["template"]["spec"]["containers"]
    assert container["command"] == ["torchrun", "-m", "latentize", "convert"]
    assert job["spec"]["nprocPerNode"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    known(capsys, container["args"])
    volumes = {volume["name"] for volume in worker["template"]["spec"]["volumes"]}
    assert volumes == {mount["name"] for mount in container["volumeMounts"]}
