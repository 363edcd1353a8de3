"""Who decodes: what is chosen, what is declined and why, and whole generations with the kernels interpreted."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.common import FP32
from tests.mla import prompt, stock

import latentize
from latentize.errors import OptionError
from latentize.runtime import backends
from latentize.runtime.accelerate import backend_of
from latentize.runtime.cache import LatentCache
from latentize.runtime.kernels import trial
from latentize.runtime.rows import TensorRows

ROOT = Path(__file__).parents[3]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="2026-11-24: triton is not installed (extra: triton)"
)
# Of the 27 that `python -m tests.interpreted_generate` has; quantised caches are restored for the prompt alone.
CASES = ("int8", "int4, residual", "int8, window", "window, padded", "int8, looked up", "static, int4, padded")
CASES += ("StaticCache", "codes, padded", "static, codes, padded")


@needs_triton
@pytest.mark.slow
def test_generations_with_interpreted_kernels_say_what_torch_says() -> None:
    command = [sys.executable, "-m", "tests.interpreted_generate", "--trials", "--cases", *CASES]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = [line for line in lines if "case" in line]
    assert {made["case"] for made in found} == set(CASES) and len(found) == len(CASES) + 3
    for made in found:
        assert made["same"] and made["error"] <= FP32, made
        # Every decode step of both layers, and nothing else.
        assert list(made["used"]) == ["triton"] and made["used"]["triton"] >= 8, made
        assert made["restored"] <= 2, made
    tried = [line for line in lines if "trial" in line]
    assert len(tried) == 14 and all(made["error"] <= made["limit"] / 2 for made in tried), tried


def decoded(model: Any, **cache: Any) -> dict[str, int]:
    model.generate(prompt(), max_new_tokens=4, pad_token_id=0, past_key_values=LatentCache(model.config, **cache))
    return dict(backend_of(model).used)


def test_on_a_cpu_torch_decodes_and_says_why() -> None:
    assert decoded(latentize.accelerate(stock("deepseek_v3"))) == {"torch: tensors on 'cpu'": 6}
    assert decoded(latentize.accelerate(stock("deepseek_v3"), backend="torch")) == {"torch: asked for": 6}


def test_a_backend_that_cannot_be() -> None:
    model = stock("deepseek_v3")
    with pytest.raises(OptionError, match="auto, torch, triton"):
        latentize.accelerate(model, backend="cuda")
    with pytest.raises(OptionError, match=r"TRITON_INTERPRET|latentize\[triton\]"):
        latentize.accelerate(model, backend="triton")
    assert not latentize.is_accelerated(model) and not hasattr(model, "_latentize_accelerated")


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_has_triton", lambda: False)
    assert decoded(latentize.accelerate(stock("deepseek_v3"))) == {"torch: triton is not installed": 6}
    with pytest.raises(OptionError, match="not installed"):
        latentize.accelerate(stock("deepseek_v3"), backend="triton")


def test_each_model_has_its_own_backend_until_it_is_decelerated() -> None:
    one = latentize.accelerate(stock("deepseek_v3"))
    other = latentize.accelerate(copy.deepcopy(latentize.decelerate(one)), backend="torch")
    latentize.accelerate(one)
    decoded(other)
    assert backend_of(one).name == "auto" and not backend_of(one).used
    latentize.decelerate(one)
    assert not any(name.startswith("_latentize") for m in one.modules() for name in vars(m))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"mask": torch.ones(2, 1, 3, 9, dtype=torch.bool)}, None),
        ({"mask": torch.ones(1, 1, 3, 9, dtype=torch.bool)}, None),
        ({"mask": torch.zeros(2, 1, 3, 9)}, "added"),
        ({"mask": torch.ones(2, 4, 3, 9, dtype=torch.bool)}, "each head"),
        ({"mask": torch.ones(2, 1, 1, 1, dtype=torch.bool)}, "another shape"),
        ({"q": torch.ones(2, 4, 3, 6, requires_grad=True)}, "gradients"),
        ({"q": torch.ones(2, 4, 3, 6, dtype=torch.float64)}, "float64"),
        ({"key": torch.ones(2, 1, 9, 6, dtype=torch.float64)}, "float64"),
        ({"q": torch.ones(2, 4, 3, 1025, dtype=torch.bfloat16)}, "rank beyond 1024"),
        ({"q": torch.ones(2, 4, 3, 1024, dtype=torch.bfloat16)}, None),
        ({"q": torch.ones(2, 4, 3, 513)}, "rank beyond 512"),
        ({"q_rope": torch.ones(2, 4, 3, 257)}, "beyond 256"),
    ],
)
def test_what_kernels_decline(changes: dict[str, Any], why: str | None) -> None:
    shapes = {"q": (2, 4, 3, 6), "q_rope": (2, 4, 3, 4), "key": (2, 1, 9, 6)}
    call: dict[str, Any] = {**{n: torch.ones(s) for n, s in shapes.items()}, "mask": None, **changes}
    rows = TensorRows(call["key"], torch.ones(2, 1, 9, 4))
    said = backends.refusal(call["q"], call["q_rope"], rows, call["mask"])
    assert said is None if why is None else why in str(said)


@pytest.mark.parametrize("trouble", ["wrong", "nan", "raises"])
def test_a_kernel_that_fails_its_trial_is_not_used(trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU that cannot run it: the twin's tokens, one warning for each variant."""

    def broken(q: torch.Tensor, *_: Any, **__: Any) -> Any:
        if trouble == "raises":
            raise RuntimeError("out of resource: shared memory")
        return torch.full_like(q, float("nan") if trouble == "nan" else 1.0), None

    expected = latentize.accelerate(stock("deepseek_v3"), backend="torch").generate(prompt(), max_new_tokens=4)
    monkeypatch.setattr(trial, "absorbed_decode", broken)
    monkeypatch.setattr(trial, "_tried", {})
    monkeypatch.setattr(backends, "_has_triton", lambda: True)
    monkeypatch.setattr(backends.Backend, "_declines", lambda self, *call: backends.refusal(*call))
    model = latentize.accelerate(stock("deepseek_v3"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert torch.equal(model.generate(prompt(), max_new_tokens=4), expected)
    told = [str(w.message) for w in said if "without its Triton kernel" in str(w.message)]
    assert len(told) == 1 and {"raises": "shared memory", "nan": "inf", "wrong": "error of"}[trouble] in told[0]
    assert list(backend_of(model).used) == ["torch: the kernel failed its trial on this device"]


def test_a_trial_that_is_passed_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin in the kernel's place passes, and its sums are taken."""
    calls = {"trial": 0, "decode": 0}

    def twin(name: str) -> Any:
        def run(*call: Any, **options: Any) -> Any:
            calls[name] += 1
            out, lse = trial.absorbed_decode_reference(*call, **options)
            return out.to(call[0].dtype), lse.float()

        return run

    monkeypatch.setattr(trial, "absorbed_decode", twin("trial"))
    monkeypatch.setattr(trial, "_tried", {})
    monkeypatch.setattr(backends, "absorbed_decode", twin("decode"))
    expected = latentize.accelerate(stock("deepseek_v3"), backend="torch").generate(prompt(), max_new_tokens=5)
    monkeypatch.setattr(backends.Backend, "_declines", lambda self, *call: backends.refusal(*call))
    model = latentize.accelerate(stock("deepseek_v3"))
    assert torch.equal(model.generate(prompt(), max_new_tokens=5), expected)
    assert dict(backend_of(model).used) == {"triton": 8} and calls == {"trial": 1, "decode": 8}


def test_a_format_that_kernels_do_not_know_is_the_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unknown(TensorRows):
        def storage(self, q_rope_BHTR: torch.Tensor) -> Any:
            (part,), lengths, options = super().storage(q_rope_BHTR)
            return [dataclasses.replace(part, latent=dataclasses.replace(part.latent, format="int6"))], lengths, options

    backend = backends.Backend("auto")
    monkeypatch.setattr(backends.Backend, "_declines", lambda *_: None)
    rows, q = Unknown(torch.ones(1, 1, 5, 6), torch.ones(1, 1, 5, 4)), torch.ones(1, 2, 1, 6)
    assert backend.attend(q, torch.ones(1, 2, 1, 4), rows, 1.0, None) is None
    assert backend.used == {"torch: rows in int6": 1}


def test_values_with_factors_are_the_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel multiplies what it sums."""
    backend, q, q_rope = backends.Backend("auto"), torch.zeros(1, 4, 1, 16), torch.zeros(1, 4, 1, 8)
    rows = TensorRows(torch.zeros(1, 1, 5, 16), torch.zeros(1, 1, 5, 8 + 2), key_scales=2)
    monkeypatch.setattr(backend, "_declines", lambda *_: None)
    assert backend.attend(q, q_rope, rows, 1.0, None, scales_values=True) is None
    assert backend.used == {"torch: values have factors": 1}
