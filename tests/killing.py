"""Kills a conversion, or an export, at random moments or after each step of its journal, resumes it, compares bytes.

    OMP_NUM_THREADS=1 python -m tests.killing [--what convert|export] [--times 30] [--steps] [--seed 0]

Children are forked from a process that has imported everything and computed nothing, so each starts at once. The
conversion is a small one, with everything that a large one has: settings compared, layers refined, then polished.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests.common import SMALL, text_file
from tests.models import pico, portable

from latentize import api
from latentize.checkpoint import Journal, OutputFolder
from latentize.conversion import latent
from latentize.conversion.pipeline import Effort
from latentize.formats.gguf import write_gguf
from latentize.training.polish import Polish
from latentize.training.refine import Refinement

RECIPE: dict[str, Any] = {**SMALL, "fast": False, "kv_lora_rank": 24, "qk_rope_head_dim": 8, "polish": True}


def contents(path: Path) -> dict[str, bytes]:
    """Of a folder or a file, by name."""
    if path.is_file():
        return {path.name: path.read_bytes()}
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def start(work: Callable[[], object]) -> int:
    """Run it in a forked child."""
    if child := os.fork():
        return child
    status = 1
    try:
        # Here, not in the parent: PyTorch's thread pool does not survive a fork where several threads then ask for it.
        torch.set_num_threads(1)
        work()
        status = 0
    except BaseException as error:
        print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def shortened() -> None:
    """Few steps, small shards: seconds instead of minutes, with every kind of step."""
    latent.effort_of = lambda recipe, spec, large: Effort(
        Refinement(steps=6, warmup=1), Polish(steps=8, warmup=1, looks=2)
    )
    assert OutputFolder.__init__.__kwdefaults__ is not None
    OutputFolder.__init__.__kwdefaults__["shard_bytes"] = 120_000


def dying_after(step: int) -> None:
    """From now on this process kills itself when it has noted so many steps."""
    noted, original = [0], Journal.note

    def note(self: Journal, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        noted[0] += 1
        if noted[0] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    Journal.note = note


class Victim:
    """What is killed.

    Args:
        folder: Where everything is.
        what: ``convert`` or ``export``.
    """

    def __init__(self, folder: Path, what: str) -> None:
        self.folder, self.what = folder, what
        if what == "convert":
            self.source, self.text = pico(folder, "llama", 2), text_file(folder)
        else:
            self.source = portable(folder, heads=4, rank=48, rope=16, nope=32, value=32, hidden=256)

    def run(self, out: Path, *, resume: bool) -> None:
        if self.what == "convert":
            api.convert(self.source, out, data=(self.text,), resume=resume, **RECIPE)
        else:
            write_gguf(self.source, out, "bf16", name="same", overwrite=True)

    def measured(self) -> tuple[dict[str, bytes], float]:
        """Bytes and seconds, undisturbed."""
        out = self.folder / "whole" / "out"
        out.parent.mkdir()
        started = time.monotonic()
        assert wait(start(lambda: self.run(out, resume=False))) == 0
        return contents(out), time.monotonic() - started

    def outcome(self, name: str, kill: Callable[[Path], None], expected: dict[str, bytes]) -> dict[str, Any]:
        """Kill it, look at what is there, go on, compare."""
        out = self.folder / name / "out"
        out.parent.mkdir()
        kill(out)
        # What is there under the final name is whole, or it is not there.
        whole = not out.exists() or contents(out) == expected
        left = sorted(p.name for p in out.parent.iterdir())
        status = 0
        if not out.exists() or len(left) > 1:
            status = wait(start(lambda: self.run(out, resume=True)))
        names = [p.name for p in out.parent.iterdir()]
        same = status == 0 and out.exists() and contents(out) == expected and names == ["out"]
        return {"killed": name, "left": left, "whole": whole, "equal": same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("convert", "export"), default="convert")
    parser.add_argument("--times", type=int, default=30, help="random moments")
    parser.add_argument("--steps", action="store_true", help="after each step of the journal, too")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shortened()
    with tempfile.TemporaryDirectory() as temporary:
        victim, draw, outcomes = Victim(Path(temporary), args.what), random.Random(args.seed), []
        expected, seconds = victim.measured()

        def at(moment: float) -> Callable[[Path], None]:
            def kill(out: Path) -> None:
                child = start(lambda: victim.run(out, resume=False))
                time.sleep(moment)
                os.kill(child, signal.SIGKILL)
                wait(child)

            return kill

        def after(step: int, died: list[int]) -> Callable[[Path], None]:
            def work(out: Path) -> None:
                dying_after(step)
                victim.run(out, resume=False)

            return lambda out: died.append(wait(start(lambda: work(out))))

        for number in range(args.times):
            moment = draw.uniform(0, seconds)
            outcomes.append(victim.outcome(f"{number}-at-{moment:.2f}-s", at(moment), expected))
        step, died = 0, [-signal.SIGKILL]
        while args.steps and died[-1] == -signal.SIGKILL:
            step += 1
            outcomes.append(victim.outcome(f"after-step-{step}", after(step, died), expected))
    good = [o for o in outcomes if o["whole"] and o["equal"]]
    for outcome in outcomes:
        if outcome not in good:
            print(outcome, file=sys.stderr)
    files = sorted(expected)
    print(json.dumps({"kills": len(outcomes), "equal": len(good), "steps": step, "seconds": seconds, "files": files}))
    sys.exit(len(good) != len(outcomes))


if __name__ == "__main__":
    main()
