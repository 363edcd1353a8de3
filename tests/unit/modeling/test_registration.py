"""The native format is known to transformers' Auto classes, whatever is imported first."""

from __future__ import annotations

import subprocess
import sys

import pytest

_ASKED = """
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from latentize.modeling.native import LatentizeConfig
assert all(LatentizeConfig in auto._model_mapping for auto in (AutoModelForCausalLM, AutoModelForImageTextToText))
from transformers import AutoConfig
assert type(AutoConfig.for_model("mistral4")) in AutoModelForCausalLM._model_mapping
"""


@pytest.mark.parametrize(
    "first",
    ["import latentize", "import transformers, latentize", "import latentize.modeling.native"],
    ids=["latentize", "transformers", "the format itself"],
)
def test_whatever_is_imported_first(first: str) -> None:
    done = subprocess.run([sys.executable, "-c", first + _ASKED], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
