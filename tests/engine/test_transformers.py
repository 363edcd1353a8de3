"""Stock transformers, in a process that latentize cannot be imported in; and what each precision costs there.

Needs nothing that is not installed with latentize, and always runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.common import random_tokens
from tests.engine.conftest import Record
from tests.models import portable
from torch import Tensor, nn

import latentize
from latentize.errors import EngineError, OptionError
from latentize.formats.deepseek_v3 import EPS, NORM_SHIFT
from latentize.modeling.load import load_model
from latentize.text.documents import documents
from latentize.text.tokenizer import load_tokenizer
from latentize.text.tokens import pack

SHAPES = {
    "random 512 + 64": {"heads": 4, "rank": 512, "rope": 64},
    "random 160 + 32, 6 heads": {"heads": 6, "rank": 160, "rope": 32},
}


@pytest.fixture(scope="module", params=sorted(SHAPES))
def shape(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("transformers")
    return request.param, portable(folder, nope=32, value=32, stored=torch.bfloat16, **SHAPES[request.param])


def test_without_latentize(shape: tuple[str, Path], record: Record) -> None:
    name, folder = shape
    found = record(name, latentize.verify(folder, engine="transformers", prompts=4, new_tokens=16))
    assert found["kl"] <= 1e-9 and found["largest_logprob_error"] <= 1e-4
    assert found["greedy_identical"] == found["prompts"] == 4
    assert found["texts_cut_alike"] == found["texts"] > 10
    assert found["versions"]["transformers"]


def kl(a: Tensor, b: Tensor) -> float:
    a, b = a.double().log_softmax(-1), b.double().log_softmax(-1)
    return float((a.exp() * (a - b)).sum(-1).mean())


def norm_free(folder: Path) -> Any:
    """The same model without a norm on the latent: its factors undone, nothing made small."""
    model = load_model(folder)
    for layer in model.model.layers:
        attention = layer.self_attn
        layer.input_layernorm.weight.data /= NORM_SHIFT
        attention.q_proj.weight.data *= NORM_SHIFT
        attention.kv_a_proj_with_mqa.weight.data *= NORM_SHIFT
        scale_r = attention.kv_a_layernorm.weight.data / math.sqrt(EPS)
        attention.kv_a_proj_with_mqa.weight.data[: len(scale_r)] *= scale_r[:, None]
        attention.kv_a_layernorm = nn.Identity()
    return model


def rounding(folder: Path, dtype: torch.dtype, tokens: Tensor | None = None) -> tuple[float, float]:
    """KL of a precision from float32: of the model as it is, and without the norm."""
    tokens, found = random_tokens(8, 48, vocab=300) if tokens is None else tokens, []
    with torch.no_grad():
        for make in (load_model, norm_free):
            exact = make(folder)(input_ids=tokens).logits
            found.append(kl(exact, make(folder).to(dtype)(input_ids=tokens).logits.float()))
    return found[0], found[1]


def test_the_norm_is_none_in_float32(shape: tuple[str, Path]) -> None:
    tokens = random_tokens(8, 48, vocab=300)
    with torch.no_grad():
        exact, free = (make(shape[1])(input_ids=tokens).logits for make in (load_model, norm_free))
    assert kl(exact, free) <= 1e-9


def test_the_norm_costs_nothing_in_bfloat16(shape: tuple[str, Path], record: Record) -> None:
    as_it_is, without = rounding(shape[1], torch.bfloat16)
    record(shape[0], {"engine": "transformers", "type": "bfloat16", "kl": as_it_is, "norm_free_kl": without})
    assert as_it_is <= 1.2 * without


def test_what_the_norm_costs_in_float16(shape: tuple[str, Path], record: Record) -> None:
    """Latents are below fp16's normal range: far more than fp16 rounds otherwise, about what bfloat16 does."""
    as_it_is, without = rounding(shape[1], torch.float16)
    record(shape[0], {"engine": "transformers", "type": "float16", "kl": as_it_is, "norm_free_kl": without})
    assert without <= 1e-5
    assert as_it_is <= 1e-3


@pytest.mark.parametrize(("dtype", "times"), [(torch.bfloat16, 1.2), (torch.float16, 2.5)])
def test_a_converted_model_in_the_precision_that_it_is_stored_in(
    models: Callable[[str], Path], record: Record, dtype: torch.dtype, times: float
) -> None:
    """In fp16 latents are larger, and their norm not linear to the last bit: together not much more than it rounds."""
    kind = str(dtype).removeprefix("torch.")
    folder = models("converted 32 + 32" + (", float16" if dtype == torch.float16 else ""))
    tokens = pack(load_tokenizer(folder), documents((), "heldout"), tokens=1024, sequence_length=128)
    as_it_is, without = rounding(folder, dtype, tokens.long())
    record(f"converted 32 + 32, stored in {kind}", {
        "engine": "transformers", "type": kind, "kl": as_it_is, "norm_free_kl": without,
    })  # fmt: skip
    assert as_it_is <= times * without
    with torch.no_grad():
        exact, free = (make(folder)(input_ids=tokens.long()).logits for make in (load_model, norm_free))
    assert kl(exact, free) <= 1e-6


def test_no_biases(shape: tuple[str, Path]) -> None:
    from latentize.checkpoint import open_checkpoint

    assert not [name for name in open_checkpoint(shape[1]).names() if name.endswith(".bias")]


def test_an_engine_that_computes_something_else_is_noticed(
    shape: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is asked about another model than the engine."""
    import latentize.engines.compare as module

    other = portable(tmp_path, heads=2, rank=32, rope=16, nope=16, value=16)
    original = module.load_model
    monkeypatch.setattr(module, "load_model", lambda folder: original(other))
    with pytest.raises(EngineError, match="KL") as error:
        latentize.verify(shape[1], engine="transformers", prompts=2, new_tokens=4)
    assert "log-probabilities differ" in error.value.what


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"engine": "tgi"}, OptionError, "no such engine"),
        ({"engine": "vllm", "environment": "missing"}, EngineError, "no environment"),
        ({"engine": "transformers", "environment": "empty"}, EngineError, "stopped"),
    ],
)
def test_an_engine_that_is_not_there(
    shape: tuple[str, Path], tmp_path: Path, options: dict[str, Any], kind: type[Exception], words: str
) -> None:
    empty = tmp_path / "empty" / "bin"
    empty.mkdir(parents=True)
    (empty / "python").write_text("#!/bin/sh\necho 'ModuleNotFoundError: transformers' >&2\nexit 1\n")
    (empty / "python").chmod(0o755)
    if "environment" in options:
        options = {**options, "environment": tmp_path / options["environment"]}
    with pytest.raises(kind, match=words):
        latentize.verify(shape[1], **options)


def test_a_gguf_file_needs_its_folder_and_llama_cpp(shape: tuple[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    latentize.export(shape[1], out, kind="bf16")
    with pytest.raises(OptionError, match="folder"):
        latentize.verify(out, engine="llama.cpp")
    with pytest.raises(OptionError, match="GGUF"):
        latentize.verify(out, engine="transformers", folder=shape[1])


def test_models(models: Callable[[str], Path]) -> None:
    """The fixture of the engine tests and the shapes here are the same."""
    for name in SHAPES:
        assert (models(name) / "config.json").is_file()
