"""What is known of a source is what transformers makes of it, and nothing is converted if it is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.common import FP32, SMALL, text_file
from tests.latent_models import MIXTURES, mixture, saved
from tests.models import FAMILIES, ONLY_MHA, WITHOUT_ROPE, pico
from torch import Tensor

import latentize
from latentize.checkpoint import Checkpoint, open_checkpoint
from latentize.errors import CheckpointError, LatentizeError
from latentize.families import ModelSpec, latent_model
from latentize.families.opening import open_source
from latentize.modeling.latent_source import LatentSource
from latentize.modeling.reading import prove
from latentize.modeling.source import SourceModel

TOKENS = torch.arange(48) % 40 + 3


def opened(tmp_path: Path, family: str) -> tuple[Checkpoint, ModelSpec]:
    return open_source(pico(tmp_path, family, 4 if family in ONLY_MHA else 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read_as_transformers_reads_it(tmp_path: Path, family: str) -> None:
    assert prove(SourceModel(*opened(tmp_path, family)), TOKENS) <= FP32


def attention(**changes: Callable[[Any], Any]) -> Callable[[ModelSpec], ModelSpec]:
    def change(spec: ModelSpec) -> ModelSpec:
        made = {name: f(getattr(spec.attention, name)) for name, f in changes.items()}
        return replace(spec, attention=replace(spec.attention, **made))

    return change


def scaled(name: str) -> Callable[[ModelSpec], ModelSpec]:
    return lambda spec: replace(spec, **{name: 1.1 * getattr(spec, name)})


SPECS: dict[str, Callable[[ModelSpec], ModelSpec]] = {
    "theta": attention(rope=lambda rope: replace(rope, theta=1.01 * rope.theta)),
    "scaling of RoPE": attention(rope=lambda rope: replace(rope, scaling={"rope_type": "linear", "factor": 2.0})),
    "factor on logits": attention(softmax_scale=lambda scale: 1.01 * scale),
    "soft cap": attention(softcap=lambda cap: 0.9 * cap if cap else 5.0),
    "epsilon": lambda spec: replace(spec, norm_eps=10 * spec.norm_eps),
    "embedding multiplier": scaled("embedding_scale"),
    "residual multiplier": scaled("residual_scale"),
    "logit multiplier": scaled("logit_scale"),
}


# Of a model without RoPE nothing is to be noticed.
_ROPE = ("theta", "scaling of RoPE")


@pytest.mark.parametrize(
    ("family", "wrong"),
    [(f, wrong) for f in FAMILIES for wrong in SPECS if f not in WITHOUT_ROPE or wrong not in _ROPE],
)
def test_a_wrong_number_is_noticed(tmp_path: Path, family: str, wrong: str) -> None:
    checkpoint, spec = opened(tmp_path, family)
    with pytest.raises(CheckpointError) as caught:
        prove(SourceModel(checkpoint, SPECS[wrong](spec)), TOKENS)
    assert caught.value.code == "LZ122"


# Parts of the names of what stands where an MLP does.
MLPS = ("mlp", "feed_forward", "block_sparse_moe")


def turned(t: Tensor) -> Tensor:
    """Heads in another order, or values of a vector."""
    return t.roll(16, 0) if t.ndim else t


PARTS = ("embedding", "positions", "final norm", "norm", "heads", "bias", "MLP", "another layer")


@pytest.mark.parametrize(
    ("family", "part"), [(f, part) for f in FAMILIES for part in PARTS if part != "positions" or f in WITHOUT_ROPE]
)
def test_a_wrong_tensor_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, part: str) -> None:
    checkpoint, spec = opened(tmp_path, family)
    layer = spec.layer_prefix(spec.converted[-1])
    matrices = [n for n in checkpoint.names() if n.startswith(layer) and len(checkpoint.shape(n)) > 1]
    endings = {
        "embedding": (spec.module("embedding") + ".weight",),
        "positions": (spec.module("positions") + ".weight",),
        "final norm": (spec.module("norm") + ".weight",),
        "norm": (layer + spec.module("input_norm") + ".weight", layer + "post_attention_layernorm.weight"),
        "heads": tuple(f"{layer}{spec.module('attention')}.{spec.module(p)}.weight" for p in ("o_proj",)),
        "bias": tuple(n for n in checkpoint.names() if n.startswith(layer) and n.endswith(".bias"))[:1],
        "MLP": tuple(n for n in matrices if any(p in n for p in MLPS))[:1],
        "another layer": tuple(n for n in checkpoint.names() if n.startswith(layer)),
    }
    names = [name for name in endings[part] if name in checkpoint]
    if not names:
        assert part == "bias"
        pytest.skip(f"2026-11-27: layers of '{family}' have no bias")
    load, rows = checkpoint.load, checkpoint.load_rows
    monkeypatch.setattr(checkpoint, "load", lambda n: turned(load(n)) if n in names else load(n))
    monkeypatch.setattr(checkpoint, "load_rows", lambda n, r: turned(rows(n, r)) if n in names else rows(n, r))
    with pytest.raises(CheckpointError) as caught:
        prove(SourceModel(checkpoint, spec), TOKENS)
    assert caught.value.code == "LZ122"


@pytest.mark.parametrize("family", ["llama", "glm", "gpt2", "gpt_neox", "phi3", "olmo2"])
def test_wrong_heads_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """The tensors are right, what is made of them is not."""
    from latentize.modeling import source as module

    right = module.attention_weights

    def wrong(*args: Any) -> Any:
        w = right(*args)
        return replace(w, q_HdD=w.q_HdD.flip(0))

    monkeypatch.setattr(module, "attention_weights", wrong)
    with pytest.raises(CheckpointError, match="attention"):
        prove(SourceModel(*opened(tmp_path, family)), TOKENS)


@pytest.mark.parametrize("entry", [{"dtype": 5}, {"dtype": "float99"}, {"torch_dtype": []}, {"dtype": {"": "int8"}}])
def test_what_transformers_cannot_load_is_refused(tmp_path: Path, entry: dict[str, Any]) -> None:
    folder = pico(tmp_path, "llama", 2)
    path = folder / "config.json"
    stated = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("dtype", "torch_dtype")}
    path.write_text(json.dumps({**stated, **entry}))
    with pytest.raises(LatentizeError, match=r"transformers (cannot load the model|refuses the config): "):
        prove(SourceModel(*open_source(folder)), TOKENS)


def test_nothing_is_written_of_what_is_read_wrongly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from latentize.conversion import job

    def wrong(source: SourceModel, *args: Any, **kwargs: Any) -> float:
        source.spec = SPECS["residual multiplier"](source.spec)
        return prove(source, *args, **kwargs)

    monkeypatch.setattr(job, "prove", wrong)
    folder, out = pico(tmp_path), tmp_path / "out"
    with pytest.raises(CheckpointError, match="LZ122"):
        latentize.convert(folder, out, keep="50%", data=(text_file(tmp_path),), **SMALL)
    assert not out.exists()
    assert not list(tmp_path.glob("out.partial*"))


def test_a_conversion_says_to_what_error_it_was_read(tmp_path: Path) -> None:
    report = latentize.convert(pico(tmp_path), tmp_path / "out", keep="50%", data=(text_file(tmp_path),), **SMALL)
    assert 0 <= report["reading_error"] <= FP32
    assert "read as transformers reads it" in (tmp_path / "out" / "README.md").read_text()


def latent(tmp_path: Path, name: str) -> LatentSource:
    checkpoint = open_checkpoint(saved(mixture(name), tmp_path / name))
    return LatentSource(checkpoint, latent_model(checkpoint.config))


@pytest.mark.parametrize("name", MIXTURES)
def test_models_with_latents_are_read_as_transformers_reads_them(tmp_path: Path, name: str) -> None:
    assert prove(latent(tmp_path, name), TOKENS) <= FP32


# Experts of Mistral Small 4 are stored as one, and Kimi Linear's have names of their own.
OTHER_NAMES = {
    ("kimi_linear", "experts.1.up"): "experts.1.w3",
    ("kimi_linear", "mlp.gate"): "block_sparse_moe.gate",
    ("mistral4", "experts.1.up"): "experts.gate_up",
}


@pytest.mark.parametrize("part", ["embed_tokens", "model.norm", "o_proj", "mlp.gate", "experts.1.up", "kv_a_layernorm"])
@pytest.mark.parametrize("name", MIXTURES)
def test_a_wrong_tensor_of_a_model_with_latents_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, part: str
) -> None:
    source = latent(tmp_path, name)
    checkpoint = source.checkpoint
    part = OTHER_NAMES.get((name, part), part)
    names = {n for n in checkpoint.names() if part in n}
    if not names:
        assert name == "youtu" and part == "experts.1.up"
        pytest.skip("2026-11-27: layers of 'youtu' are no mixtures of experts")
    load, rows = checkpoint.load, checkpoint.load_rows
    monkeypatch.setattr(checkpoint, "load", lambda n: changed(load(n)) if n in names else load(n))
    monkeypatch.setattr(checkpoint, "load_rows", lambda n, r: changed(rows(n, r)) if n in names else rows(n, r))
    with pytest.raises(CheckpointError) as caught:
        prove(source, TOKENS)
    assert caught.value.code == "LZ122"


def changed(t: Tensor) -> Tensor:
    """Other values: a norm of ones is the same in any order."""
    return 1.1 * t.roll(1, 0)


def test_the_layers_of_a_model_with_latents_are_run_as_transformers_runs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = latent(tmp_path, "deepseek_v3")
    angles = source.angles
    monkeypatch.setattr(source, "angles", lambda kind: lambda x, positions: angles(kind)(x, 2 * positions))
    with pytest.raises(CheckpointError, match="what the layer adds"):
        prove(source, TOKENS)
