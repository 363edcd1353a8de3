"""A conversion onto a disk of one megabyte: too small, filled on the way, read-only; then with room again.

    OMP_NUM_THREADS=1 python -m tests.filling [--megabytes 1]

Runs itself in namespaces of its own (``unshare``), where it may mount; nothing is left mounted. Prints one JSON object:
what each attempt ended with and left, and whether what was resumed has the bytes of an undisturbed conversion.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tests.common import SMALL, text_file
from tests.killing import contents
from tests.models import pico

from latentize import api
from latentize.checkpoint import Journal
from latentize.conversion import latent
from latentize.conversion.pipeline import Effort
from latentize.errors import LatentizeError
from latentize.training.refine import Refinement

SEPARATE = ["unshare", "--map-root-user", "--mount"]
RECIPE: dict[str, Any] = {**SMALL, "fast": False, "polish": False, "kv_lora_rank": 24, "qk_rope_head_dim": 8}
RECIPE |= {"dtype": "bfloat16"}


def mountable() -> bool:
    """Whether this user may mount a tmpfs in a namespace of its own."""
    try:
        test = 'd=$(mktemp -d) && mount -t tmpfs -o size=64k tmpfs "$d" && umount "$d" && rmdir "$d"'
        return subprocess.run([*SEPARATE, "sh", "-c", test], capture_output=True, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def mount(disk: Path, *options: str) -> None:
    subprocess.run(["mount", *options, str(disk)], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """A file that leaves so many bytes free."""
    path, stat = disk / "ballast", os.statvfs(disk)
    path.write_bytes(bytes(max(0, stat.f_bavail * stat.f_frsize - leave)))
    return path


def filling_when_something_is_kept(disk: Path) -> None:
    """From now on the disk is full as soon as the journal has kept its first tensors."""
    original = Journal.keep

    def keep(self: Journal, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        Journal.keep = original
        fill(disk)

    Journal.keep = keep


class Attempts:
    """Conversions of one model.

    Args:
        folder: With the model, on a disk with room.
        disk: The small one.
    """

    def __init__(self, folder: Path, disk: Path) -> None:
        self.model, self.text, self.disk = pico(folder), text_file(folder), disk

    def convert(self, out: Path, *, resume: bool = False) -> str:
        """The code that it ends with."""
        try:
            api.convert(self.model, out, data=(self.text,), resume=resume, **RECIPE)
        except LatentizeError as error:
            return error.code
        return ""

    def attempt(self, *, resume: bool = False) -> dict[str, Any]:
        """What the small disk has afterwards; ``finished``: files that a model would be loaded by."""
        code = self.convert(self.disk / "out", resume=resume)
        left = sorted(p.name for p in self.disk.iterdir() if p.name != "ballast")
        finished = sorted(str(p.relative_to(self.disk)) for p in self.disk.rglob("config.json"))
        return {"code": code, "left": left, "finished": finished}


def inside(folder: Path, megabytes: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    latent.effort_of = lambda recipe, spec, large: Effort(Refinement(steps=6, warmup=1))
    disk = folder / "disk"
    disk.mkdir()
    mount(disk, "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs")
    attempts, found = Attempts(folder, disk), {}
    attempts.convert(folder / "whole" / "out")
    ballast = fill(disk, leave=200_000)
    found["too small"] = attempts.attempt()
    ballast.unlink()
    filling_when_something_is_kept(disk)
    found["filled"] = attempts.attempt()
    found["still full"] = attempts.attempt(resume=True)
    ballast.unlink()
    mount(disk, "-o", "remount,ro")
    found["read-only"] = attempts.attempt(resume=True)
    mount(disk, "-o", "remount,rw")
    found["resumed"] = attempts.attempt(resume=True)
    found["equal"] = contents(disk / "out") == contents(folder / "whole" / "out")
    subprocess.run(["umount", str(disk)], check=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1, help="of the disk")
    parser.add_argument("--inside", action="store_true", help="mount here and now")
    args = parser.parse_args()
    if not args.inside:
        sys.exit(
            subprocess.run([*SEPARATE, sys.executable, "-m", "tests.filling", *sys.argv[1:], "--inside"]).returncode
        )
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(inside(Path(temporary), args.megabytes)))


if __name__ == "__main__":
    main()
