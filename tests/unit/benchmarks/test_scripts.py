"""Every benchmark finds what it imports: none runs in these tests as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.common import run_python

ROOT = Path(__file__).parents[3]
# In a process of their own: some set what holds for all that is imported after them.
CODE = """
import importlib, sys
folder, root, *names = sys.argv[1:]
sys.path[:0] = [folder, root]
for name in names:
    try:
        importlib.import_module(name)
    except Exception as error:
        print(f"{name}: {error!r}")
"""


@pytest.mark.slow
def test_all_are_imported() -> None:
    folder = ROOT / "benchmarks"
    names = sorted(path.stem for path in folder.glob("*.py"))
    assert len(names) > 20
    done = run_python(CODE, folder, ROOT, *names)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
