"""What the tests share: tolerances, text, and how to run things."""

from __future__ import annotations

import functools
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Largest relative errors that are allowed, fixed for every machine.
FP32 = 1e-5  # two orders of summation, float32
FP64 = 1e-10  # the same, float64
BF16 = 1e-2  # two orders of summation, bfloat16
STOCK = 1e-4  # stock DeepSeek-V3, whose latent norm is linear to 2**-16
STREAM = 1e-4  # one measurement made in two ways

# What a conversion of a picomodel needs so that it takes less than a second.
SMALL: dict[str, Any] = {
    "tokens": 2048,
    "sequence_length": 64,
    "evaluation_tokens": 1024,
    "selection_tokens": 256,
    "dtype": "float32",
    "fast": True,
}


def relative_error(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value of ``b``."""
    assert a.shape == b.shape
    a, b = a.detach(), b.detach()
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def mutants(**options: Any) -> Any:
    """Settings of hypothesis for damage of what users have: quick to draw, so more of it."""
    from hypothesis import settings

    return settings(max_examples=max(150, settings().max_examples), **options)


@functools.cache
def sentences() -> tuple[str, ...]:
    draw = random.Random(0)
    letters = "etaoinshrdlu"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 7))) for _ in range(60)]
    return tuple(" ".join(draw.choices(words, k=45)) + ".\n" for _ in range(150))


def text_file(tmp_path: Path) -> str:
    """A .jsonl of 150 short documents, the same on every machine."""
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences()))
    return str(path)


def random_tokens(batch: int = 2, length: int = 48, seed: int = 0, vocab: int = 257) -> Tensor:
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def printable_bytes() -> str:
    """Text of all that can be printed: no direction of an input is left that a calibration has not seen."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(33, 127, (120, 300), generator=generator)
    return "\n\n".join("".join(map(chr, row)) for row in codes.tolist())


@torch.no_grad()
def logits(folder: Path, tokens: Tensor) -> Tensor:
    """Logits of a saved model, loaded as users load it; every weight has to find its place."""
    from latentize.modeling.load import load_model

    return load_model(folder)(input_ids=tokens, use_cache=False).logits


def leftovers(tmp_path: Path, out: Path) -> list[str]:
    """What a conversion to ``out`` has left in its folder."""
    return sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(out.name))


def _environment(extra: dict[str, str] | None) -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return {**os.environ, **offline, **(extra or {})}


def run_python(
    code: str, *args: object, cwd: Path | None = None, env: dict[str, str] | None = None, flags: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, ``args`` in ``sys.argv[1:]``."""
    command = [sys.executable, *flags, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=_environment(env), timeout=300)


def run_cli(
    *args: object, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "latentize", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=_environment(env), timeout=600)


@dataclass
class Outcome:
    """What a command has printed, and its status."""

    returncode: int
    stdout: str
    stderr: str


def call_cli(capsys: Any, *args: object) -> Outcome:
    """Run the command line in this process, which saves the seconds that imports take."""
    from latentize.cli import main

    capsys.readouterr()
    argv, sys.argv = sys.argv, ["latentize", *map(str, args)]
    try:
        main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = argv
    return Outcome(status, *capsys.readouterr())


def last_json(stdout: str) -> Any:
    """The JSON object on the last line."""
    return json.loads(stdout.strip().splitlines()[-1])
