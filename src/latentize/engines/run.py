"""Starting an engine in its own environment, and reading what it has computed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latentize.errors import EngineError, OptionError
from latentize.paths import expanded

__all__ = ["ENGINES", "Answers", "engine_python", "run_engine"]

# Name → what its environment has to be able to import.
ENGINES = {"transformers": "transformers", "llama.cpp": "llama_cpp", "vllm": "vllm"}
FOLDER_VARIABLE = "LATENTIZE_ENGINES"
_SECONDS = 3600


@dataclass(frozen=True)
class Answers:
    """What an engine has computed.

    Attributes:
        logits_TV: For each prompt logits or log-probabilities of each of its tokens; NaN where there are none.
        greedy: For each prompt the tokens that continue it.
        tokens: For each text its token ids; ``None`` if the engine was not asked.
        versions: Of what was run.
        settings: It was run with.
    """

    logits_TV: list[np.ndarray[Any, Any]]
    greedy: list[list[int]]
    tokens: list[list[int]] | None
    versions: dict[str, str]
    settings: dict[str, Any]


def engine_python(engine: str, environment: Path | None = None) -> Path:
    """The python of an engine's environment.

    Args:
        engine: One of :data:`ENGINES`.
        environment: Its folder; by default ``$LATENTIZE_ENGINES/ENGINE``, or ``.engines/ENGINE`` here. transformers
            needs none: that of latentize has it.

    Raises:
        OptionError: there is no such engine.
        EngineError: its environment is not there.
    """
    if engine not in ENGINES:
        raise OptionError(f"no such engine: '{engine}'", where="--engine", fix=", ".join(ENGINES))
    if environment is None:
        made = Path(os.environ.get(FOLDER_VARIABLE, ".engines")) / engine
        if engine == "transformers" and not made.is_dir():
            return Path(sys.executable)
        environment = made
    environment = expanded(environment)
    python = environment.absolute() / "bin" / "python"
    unfinished = (environment / ".unfinished").exists()
    if unfinished or not python.exists():
        what = (
            f"the environment with {engine} is not finished" if unfinished else f"there is no environment with {engine}"
        )
        raise EngineError(
            what,
            where=str(environment),
            fix=f"make engines ENGINE={engine}, or give a virtual environment that has it with --environment",
        )
    return python


def run_engine(
    engine: str,
    model: Path,
    prompts: list[list[int]],
    *,
    new_tokens: int,
    texts: list[str] | None = None,
    dtype: str = "float32",
    cache: str = "f32",
    environment: Path | None = None,
) -> Answers:
    """Have an engine predict.

    Args:
        engine: One of :data:`ENGINES`.
        model: A folder, or for llama.cpp a GGUF file.
        prompts: Token ids.
        new_tokens: So many greedy ones after each prompt.
        texts: To be cut into tokens by the engine's own tokenizer.
        dtype: To run in; llama.cpp takes the file's.
        cache: Type of llama.cpp's cache: f32, f16, q8_0, q5_1 or q4_0.
        environment: As in :func:`engine_python`.

    Raises:
        OptionError: there is no such engine.
        EngineError: the engine is missing, or stops.
    """
    python = engine_python(engine, environment)
    worker = Path(__file__).with_name(f"worker_{engine.replace('.', '_')}.py")
    with tempfile.TemporaryDirectory(prefix="latentize-engine-") as folder:
        job, out = Path(folder) / "job.json", Path(folder) / "out.npz"
        asked = {"model": str(model.absolute()), "prompts": prompts, "new_tokens": new_tokens, "texts": texts or []}
        job.write_text(json.dumps({**asked, "dtype": dtype, "cache": cache, "out": str(out)}), encoding="utf-8")
        # Isolated: what lies in this folder or in PYTHONPATH is not the engine's.
        command = [str(python), "-I", str(worker), str(job)]
        environ = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environ, timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            raise EngineError(f"{engine} has not answered in {_SECONDS} s", where=str(model)) from None
        if done.returncode or not out.is_file():
            raise EngineError(
                f"{engine} stopped: {_last_words(done.stderr)}",
                where=str(model),
                fix=f"try it by hand: {python} -c 'import {ENGINES[engine]}'",
            )
        answered = json.loads(done.stdout.strip().splitlines()[-1])
        with np.load(out) as arrays:
            logits = [arrays[f"logits_{number}"] for number in range(len(prompts))]
            greedy = [arrays[f"greedy_{number}"].tolist() for number in range(len(prompts))]
    return Answers(logits, greedy, answered["tokens"], answered["versions"], answered["settings"])


def _last_words(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return " | ".join(lines[-2:]) if lines else "without a word"
