"""Kills one of two processes that convert together, at some moment, sees both end, and goes on with one.

OMP_NUM_THREADS=1 python -m tests.dying [--times 10] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.common import SMALL, text_file
from tests.models import pico

import latentize
from latentize.checkpoint.journal import _read
from latentize.conversion import latent
from latentize.conversion.effort import effort_of
from latentize.conversion.pipeline import Effort
from latentize.training.polish import Polish
from latentize.training.refine import Refinement

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
OPTIONS: dict[str, Any] = {**SMALL, "fast": False, "tokens": 8192}
# Of two processes one dies once it has summed so often. MODEL OUT TEXT OPTIONS AT RANK
DYING = """
import json, os, signal, sys
import latentize
from latentize.processes import Team
from tests.dying import shortened
shortened()
model, out, text, options, at, rank = sys.argv[1:]
add_up, done = Team.add_up, [0]
def counted(self, tensors):
    done[0] += self.size > 1
    if self.rank == int(rank) and done[0] == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
    add_up(self, tensors)
Team.add_up = counted
latentize.convert(model, out, data=(text,), **json.loads(options))
"""


def shortened() -> None:
    """Few steps of everything."""
    how = Effort(Refinement(steps=24, warmup=3), Polish(steps=24, warmup=3))
    latent.effort_of = lambda recipe, spec, large: effort_of(recipe, spec, large=large) if recipe.hurries else how


def torchrun(script: str, tmp_path: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "script.py"
    path.write_text(script)
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": root}
    command = [*TORCHRUN, str(path), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def died_and_resumed(model: Path, text: str, folder: Path, at: int, rank: int) -> bool:
    """One of two processes dies as it sums for the ``at``-th time, and one goes on. Whether anything was kept."""
    out = folder / "out"
    entries = {**OPTIONS, "kv_lora_rank": 20, "qk_rope_head_dim": 8, "polish": False}
    done = torchrun(DYING, folder, model, out, text, json.dumps(entries), at, rank)
    assert done.returncode != 0 and not out.exists()
    assert "exitcode  : -9" in done.stderr, done.stderr[-2000:]
    left = list(folder.glob("out.partial-*"))
    assert len(left) <= 1
    # torchrun may end the first process before it has removed a folder in which nothing that took long is finished.
    kept = any(step["file"] for path in left for step in _read(path / "journal.jsonl")[0].values())
    resumed = latentize.convert(model, out, data=(text,), resume=True, **entries)
    assert resumed["kl"] > 0 and latentize.verify(out)["ok"]
    assert not list(folder.glob("out.partial-*"))
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    order = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        model, text = pico(Path(name)), text_file(Path(name))
        for number in range(args.times):
            folder = Path(name) / str(number)
            folder.mkdir()
            # Two layers: statistics, 24 steps and a solution each, and what latents are like.
            at, rank = order.randint(1, 55), order.randint(0, 1)
            kept = died_and_resumed(model, text, folder, at, rank)
            print(f"process {rank} at sum {at}: ended, {'resumed' if kept else 'begun anew'}", flush=True)


if __name__ == "__main__":
    main()
