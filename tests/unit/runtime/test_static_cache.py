"""A static cache gives the growing one's tokens, and every step is the same operations on the same memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.common import FP32, SMALL, relative_error
from tests.mla import prompt, stock
from tests.models import pico, pico_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, StaticCache

import latentize
from latentize.errors import OptionError
from latentize.runtime import backends
from latentize.runtime.cache import LatentCache
from latentize.runtime.graphs import DecodeGraph

FORMATS = [None, "bf16", "fp8", "int8", "int4"]
# What waits for the device or takes its shape from values; and what brings a host's values there.
HOST = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh")


class Operations(TorchDispatchMode):
    """Names and shapes of all that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        shapes = [tuple(t.shape) for t in (*args, out) if isinstance(t, torch.Tensor)]
        self.seen.append((str(func), *shapes))
        return out


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("native")
    options = {**SMALL, "fast": False}
    latentize.convert(pico(folder, "qwen2"), folder / "out", format="native", method="mha2mla", keep=0.5, **options)
    native = AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32).eval()
    return {name: latentize.accelerate(model) for name, model in (("v3", stock("deepseek_v3")), ("native", native))}


def static(model: Any, latent: str | None, room: int = 48) -> LatentCache:
    return LatentCache(model.config, latent=latent, rope=None if latent is None else "int8", max_length=room)


@pytest.mark.parametrize("latent", FORMATS)
@pytest.mark.parametrize("kind", ["v3", "native"])
def test_generates_as_a_growing_cache(models: dict[str, Any], kind: str, latent: str | None) -> None:
    model, ids, seen = models[kind], prompt(2), torch.ones(2, 23, dtype=torch.int64)
    ids[1, :4], seen[1, :4] = 0, 0
    how = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    how |= {"output_logits": True, "return_dict_in_generate": True}
    for more in ({"input_ids": ids, "attention_mask": seen}, {"input_ids": prompt(), "prefill_chunk_size": 9}):
        growing = LatentCache(model.config, latent=latent, rope=None if latent is None else "int8")
        expected = model.generate(**more, **how, past_key_values=growing)
        made = model.generate(**more, **how, past_key_values=static(model, latent))
        assert torch.equal(made.sequences, expected.sequences)
        assert relative_error(torch.stack(made.logits), torch.stack(expected.logits)) <= FP32


def addresses(cache: Any) -> list[int]:
    tensors = [t for layer in cache.layers for t in (*layer.stored.tensors, layer.filled_B)]
    return [t.data_ptr() for t in tensors]


@torch.no_grad()
@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("latent", FORMATS)
@pytest.mark.parametrize("kind", ["v3", "native"])
def test_every_step_is_the_same_to_a_graph(
    models: dict[str, Any], kind: str, latent: str | None, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No operation waits for the device, none has another shape than before, no tensor of the cache is another.

    With a kernel, too: what stands for it notes what it was launched with.
    """
    launches = []

    def stand_in(q: Any, q_rope: Any, parts: Any, lengths: Any, scale: float, **options: Any) -> Any:
        (part,) = parts
        tensors = (lengths, *part.latent.tensors, *part.rope.tensors)
        launches.append([part.count, scale, options, *(t.data_ptr() for t in tensors)])
        return torch.zeros_like(q), None

    if kernel:
        monkeypatch.setattr(backends, "absorbed_decode", stand_in)
        monkeypatch.setattr(backends, "works", lambda *_, **__: True)
        monkeypatch.setattr(backends.Backend, "_declines", lambda self, *call: backends.refusal(*call))
    model = models[kind]
    cache = static(model, latent)
    model(prompt(2), past_key_values=cache)
    step, logs, places = DecodeGraph(model, cache, 2, capture=False), [], addresses(cache)
    step(torch.full((2, 1), 5))
    launches.clear()
    size = cache.nbytes
    for token in (6, 7, 8):
        with Operations() as log:
            step(torch.full((2, 1), token))
        logs.append(log.seen)
        assert addresses(cache) == places and cache.nbytes == size
    assert logs[0] == logs[1] == logs[2]
    assert len(logs[0]) > 100 and not [seen for seen in logs[0] if any(name in seen[0] for name in HOST)]
    assert len(launches) == (3 * 2 if kernel else 0)
    assert launches[:2] == launches[2:4] == launches[4:]
    assert int(cache.get_seq_length()) == cache.layers[0].seen == 27


@torch.no_grad()
def test_a_graph_over_any_static_cache_says_what_the_model_says(models: dict[str, Any]) -> None:
    """Uncaptured, as there is no GPU; the source of a conversion with transformers' cache, and ours."""
    llama = pico_model("llama")
    for model, cache in (
        (llama, StaticCache(llama.config, max_cache_len=30)),
        (models["v3"], static(models["v3"], None, room=30)),
    ):
        ids = prompt(2, 29)
        expected = model(ids).logits
        model(ids[:, :20], past_key_values=cache)
        step = DecodeGraph(model, cache, 2)
        for at in range(20, 29):
            assert relative_error(step(ids[:, at : at + 1]), expected[:, at]) <= FP32
        step(ids[:, :1])
        with pytest.raises(OptionError, match="full"):
            step(ids[:, :1])


@torch.no_grad()
def test_rewound_advanced_reset_and_reordered() -> None:
    model = latentize.accelerate(stock("deepseek_v3"))
    cache, ids = static(model, "int8"), prompt(2, 20)
    expected = model(ids, past_key_values=cache).logits[:, -1:]
    places = addresses(cache)
    cache.rewind(18)
    cache.advance(0)
    assert int(cache.get_seq_length()) == 18
    made = model(ids[:, 18:], past_key_values=cache).logits[:, -1:]
    assert relative_error(made, expected) <= FP32
    cache.crop(-2)
    cache.reorder_cache(torch.tensor([1, 0]))
    made = model(ids[[1, 0], 18:], past_key_values=cache).logits[:, -1:]
    assert relative_error(made, expected[[1, 0]]) <= FP32
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    assert relative_error(model(ids, past_key_values=cache).logits[:, -1:], expected) <= FP32
    assert addresses(cache) == places
    cache.batch_repeat_interleave(2)
    assert cache.layers[0].keys.shape[0] == 4


@torch.no_grad()
def test_a_model_that_is_not_accelerated_gets_what_is_filled() -> None:
    model = stock("deepseek_v3")
    cache = LatentCache(model.config, max_length=32)
    out = [model(part, past_key_values=cache).logits for part in prompt(2).split([20, 3], dim=1)]
    assert relative_error(torch.cat(out, dim=1), model(prompt(2)).logits) <= FP32


def test_refusals() -> None:
    model = latentize.accelerate(stock("deepseek_v3"))
    for wrong in ({"window": 16}, {"residual": 4}):
        with pytest.raises(OptionError, match="static"):
            LatentCache(model.config, max_length=64, **wrong)
    with pytest.raises(OptionError, match="static"):
        LatentCache(model.config, max_length=0)
    with pytest.raises(OptionError, match="larger max_length"):
        model(prompt(1, 9), past_key_values=LatentCache(model.config, max_length=8))
    growing = LatentCache(model.config)
    model(prompt(1, 9), past_key_values=growing)
    with pytest.raises(OptionError, match="static cache"):
        DecodeGraph(model, growing, 1)
    with pytest.raises(OptionError, match="static cache"):
        DecodeGraph(model, copy.deepcopy(static(model, None)), 1)
