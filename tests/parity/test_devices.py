"""Nothing in converting and healing makes a tensor without saying where: it would be beside a GPU, not on it.

There is no second device here to run on, so every factory of PyTorch that these packages call without ``device`` is
watched for. It finds what is made in the wrong place, not what is moved there; no GPU has run this.
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.coded_rows import coded_call, coded_configuration
from tests.common import SMALL, text_file
from tests.latent_models import mixture, saved
from tests.models import pico
from torch.overrides import TorchFunctionMode

import latentize
from latentize.runtime.coded_attention import attend_codes
from latentize.training.descent import Schedule

PACKAGES = ("conversion", "text", "methods", "modeling", "training", "healing", "attention", "runtime")
FACTORIES = {
    getattr(torch, name)
    for name in (
        *(
            "arange",
            "empty",
            "empty_strided",
            "eye",
            "full",
            "linspace",
            "ones",
            "rand",
            "randint",
            "randn",
            "randperm",
        ),
        *("tensor", "zeros", "as_tensor", "tril_indices", "triu_indices"),
    )
}


class Watched(TorchFunctionMode):
    """Notes the lines of ours that make a tensor nowhere in particular."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FACTORIES:
            self.calls += 1
            where = self._ours()
            if kwargs.get("device") is None and where is not None:
                self.found.add(where)
        return func(*args, **kwargs)

    @staticmethod
    def _ours() -> str | None:
        """The nearest caller, if it is in one of the packages."""
        root, frame = Path(latentize.__file__).parent, sys._getframe(2)
        while frame is not None and "/torch/" in frame.f_code.co_filename:
            frame = frame.f_back
        if frame is None or root not in Path(frame.f_code.co_filename).parents:
            return None
        path = Path(frame.f_code.co_filename).relative_to(root)
        line = f"{path}: {frame.f_code.co_name}"
        return line if path.parts[0] in PACKAGES else None


# What is made on the CPU because it stays there, or is moved: each with the reason.
ON_PURPOSE = {
    "attention/rope.py: half_to_interleaved": "row numbers of weights that are written",
    "text/repeated.py: repeated": "the text",
    "text/restyled.py: restyled": "the text",
    "conversion/self_generated.py: self_generated": "the text: drawn here, continued where the model is",
    "text/tokens.py: contiguous": "the text, moved as passages",
    "text/tokens.py: pack": "the text",
    "text/tokens.py: spread_positions": "the text",
    "modeling/canonical.py: attention_weights": "row numbers, compared with others of their kind",
    "modeling/canonical.py: half_layout": "row numbers of weights",
    "training/descent.py: batches": "numbers of sequences, in an order that no device changes",
    "modeling/turning.py: _check_frequencies": "the proof runs where transformers loads, on the CPU",
    "modeling/reading.py: _stream": "positions of a short text, moved at once",
    "methods/position.py: ladder": "moved by methods/calibrated.py",
    "training/refine.py: descend": "numbers of sequences",
    "healing/run.py: look": "sums of what was brought back",
    "conversion/texts.py: mixed": "the text",
    "conversion/latent.py: _with_its_own": "the text, as the first process has written it",
    "runtime/absorbed.py: has_fused": "tries an operator of the CPU",
    "runtime/rotation.py: rotation": "moved by rotation_on",
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """A calibrated conversion, refined, and what it made nowhere."""
    folder = tmp_path_factory.mktemp("devices")
    source = pico(folder)
    with pytest.MonkeyPatch.context() as patch, Watched() as watched:
        # A few steps of every descent are as good as all.
        patch.setattr(Schedule, "suited", lambda self, *_: replace(self, tokens=64, steps=6, warmup=2))
        latentize.convert(source, folder / "out", keep=0.5, **{**SMALL, "tokens": 512, "fast": False})
    assert watched.calls > 500
    return folder, watched.found


def test_a_calibrated_conversion(converted: tuple[Path, set[str]]) -> None:
    _, found = converted
    assert found <= ON_PURPOSE.keys()
    assert "training/descent.py: batches" in found, "the watch sees nothing"


@pytest.mark.parametrize("method", ["calibrated", "transmla", "mha2mla", "care"])
def test_every_method(method: str, tmp_path: Path) -> None:
    source = pico(tmp_path, "qwen2")
    native = {"format": "native"} if method in ("calibrated", "mha2mla") else {}
    with Watched() as watched:
        latentize.convert(source, tmp_path / "out", method=method, keep=0.5, **native, **SMALL)
    assert watched.found <= ON_PURPOSE.keys()


@pytest.mark.parametrize("name", ["deepseek_v2-lite", "glm4_moe_lite"])
def test_a_lower_rank(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Schedule, "suited", lambda self, *_: replace(self, tokens=64, steps=6, warmup=2))
    source = saved(mixture(name), tmp_path / "source")
    with Watched() as watched:
        latentize.convert(source, tmp_path / "out", keep=0.6, **{**SMALL, "tokens": 512, "fast": False})
    assert watched.found <= ON_PURPOSE.keys()


def test_attention_over_codes() -> None:
    random.seed(0)
    for _ in range(20):
        call, options = coded_call(coded_configuration())
        with Watched() as watched:
            attend_codes(*call, **options)
        assert watched.calls and watched.found <= ON_PURPOSE.keys()


@pytest.mark.parametrize("more", [{}, {"top_k": 8}, {"train": "lora", "cache": "int8"}])
def test_healing(converted: tuple[Path, set[str]], more: dict[str, Any], tmp_path: Path) -> None:
    folder, _ = converted
    with Watched() as watched:
        latentize.heal(
            folder / "out", tmp_path / "healed", folder / "source", tokens=512, data=[text_file(tmp_path)], **more
        )
    assert watched.found <= ON_PURPOSE.keys()


def test_weights_come_back_to_where_they_were(tmp_path: Path) -> None:
    """A conversion that goes on finds its weights on its device; the CPU's stand for any."""
    from latentize.conversion import kept

    t = torch.arange(6.0).view(2, 3).mT
    back = kept._laid(t.contiguous(), t.stride(), "meta")
    assert back.device.type == "meta" and back.stride() == t.stride()
