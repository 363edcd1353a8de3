"""Light until something heavy is needed, and the names that users are promised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.common import run_python
from tests.models import pico_config

import latentize

HEAVY = """
import sys
heavy = {"torch", "transformers", "safetensors", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""


def test_import_latentize_imports_no_torch() -> None:
    done = run_python(f"import latentize; latentize.Recipe{HEAVY}")
    assert done.returncode == 0, done.stderr


def test_plan_imports_no_torch(tmp_path: Path) -> None:
    """Through the command line, with a name, and with a config of one's own."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(pico_config().to_json_string(use_diff=False))))
    code = f"""
import sys
from latentize.cli import main
for model in ("llama-3-8b", {str(config)!r}):
    sys.argv = ["latentize", "plan", model, "--json"]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
{HEAVY}
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip().splitlines()) == 2


def test_the_modules_below_torch_stay_below() -> None:
    modules = ("attention.spec", "errors", "recipe", "families", "planning.cache_sizes")
    code = f"import {', '.join('latentize.' + name for name in modules)}{HEAVY}"
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_names_that_are_packages_can_be_called_too() -> None:
    """``latentize.convert`` is a function to users, whatever was imported before."""
    code = """
import latentize
import latentize.methods.pooling, latentize.evaluation.quality
from latentize.errors import LatentizeError
for call in (lambda: latentize.convert("./nowhere", "out"), lambda: latentize.evaluate("./nowhere")):
    try:
        call()
    except LatentizeError as error:
        assert error.code == "LZ101", error
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_public_names() -> None:
    for name in latentize.__all__:
        assert getattr(latentize, name) is not None
    assert callable(latentize.convert)
    assert callable(latentize.evaluate)
    assert callable(latentize.verify)


@pytest.mark.parametrize(
    ("given", "policy", "looks"),
    [
        ({}, "PASSIVE", "1000"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE", None),
        ({"GOMP_SPINCOUNT": "77"}, None, "77"),
        ({"KMP_BLOCKTIME": "5"}, None, None),
    ],
)
def test_threads_soon_sleep_unless_told_otherwise(given: dict[str, str], policy: str | None, looks: str | None) -> None:
    """It is said before torch, and OpenMP with it, is loaded: neither reads it later."""
    code = """
import os, sys
from latentize.cli import main
sys.argv = ["latentize", "--version"]
assert "torch" not in sys.modules
try:
    main()
except SystemExit as end:
    assert not end.code
assert "torch" not in sys.modules
print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"))
import torch
"""
    # What the tests themselves were started with is not meant.
    unset = (
        "import os\nfor name in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'KMP_BLOCKTIME'):\n    os.environ.pop(name, 0)\n"
    )
    setting = f"os.environ.update({given!r})\n"
    done = run_python(unset + setting + code, env={"OMP_DISPLAY_ENV": "TRUE"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{policy} {looks}"
    # OpenMP says what it has read, where it is GNU's or LLVM's.
    if policy is not None and "OMP_WAIT_POLICY" in done.stderr:
        assert f"'{policy}'" in done.stderr.split("OMP_WAIT_POLICY", 1)[1].splitlines()[0]


def test_the_native_format_is_known_where_its_module_is_the_first_of_all() -> None:
    """It is what imports transformers then, and so what is told of its Auto classes while it is half there."""
    done = run_python("""
from latentize.modeling.native import LatentizeConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
assert all(LatentizeConfig in auto._model_mapping for auto in (AutoModelForCausalLM, AutoModelForImageTextToText))
assert type(AutoConfig.for_model("mistral4")) in AutoModelForCausalLM._model_mapping
""")
    assert done.returncode == 0, done.stderr
