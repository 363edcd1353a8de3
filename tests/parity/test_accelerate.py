"""An accelerated model says what the stock one says: every form of generation, every cache of transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.common import FP32, SMALL, relative_error
from tests.mla import MLA, prompt, stock
from tests.models import pico, pico_model
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import latentize
from latentize.errors import UnsupportedModelError
from latentize.runtime.cache import LatentCache


@pytest.fixture(scope="module", params=[*MLA, "native", "native-mha2mla", "native-norms"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A stock model and an accelerated copy."""
    if request.param in MLA:
        model = stock(request.param)
    else:
        folder: Path = tmp_path_factory.mktemp("native")
        source = pico(folder, "qwen3" if request.param.endswith("norms") else "qwen2")
        method = "mha2mla" if request.param.endswith("mha2mla") else "calibrated"
        options = {**SMALL, "fast": method == "calibrated"}
        latentize.convert(source, folder / "out", format="native", method=method, keep=0.5, **options)
        model = AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32).eval()
    return model, latentize.accelerate(copy.deepcopy(model))


def generated(model: Any, **options: Any) -> Any:
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options}
    options = {k: copy.deepcopy(v) if k == "past_key_values" else v for k, v in options.items()}
    return model.generate(output_logits=True, output_scores=True, return_dict_in_generate=True, **options)


def assert_same(pair: tuple[Any, Any], **options: Any) -> None:
    torch.manual_seed(0)
    expected = generated(pair[0], **options)
    torch.manual_seed(0)
    made = generated(pair[1], **options)
    assert torch.equal(made.sequences, expected.sequences)
    if "num_beams" in options:
        # Beams of nearly equal scores may change places on the way.
        torch.testing.assert_close(made.sequences_scores, expected.sequences_scores, rtol=FP32, atol=FP32)
        return
    assert relative_error(torch.stack(made.logits), torch.stack(expected.logits)) <= FP32


@torch.no_grad()
def test_one_forward_pass(pair: tuple[Any, Any]) -> None:
    ids = prompt(3, 40)
    assert relative_error(pair[1](ids).logits, pair[0](ids).logits) <= FP32


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 1.5},
        {"num_beams": 3},
        {"num_return_sequences": 2, "do_sample": True},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 5},
        {"use_cache": False},
    ],
    ids=["greedy", "sampled", "beams", "several", "assisted", "chunked", "no-cache"],
)
def test_generate(pair: tuple[Any, Any], options: dict[str, Any]) -> None:
    assert_same(pair, input_ids=prompt(), **options)


def test_a_batch_that_is_padded_on_the_left(pair: tuple[Any, Any]) -> None:
    ids, seen = prompt(3), torch.ones(3, 23, dtype=torch.int64)
    for row, padded in enumerate((0, 4, 22)):
        ids[row, :padded], seen[row, :padded] = 0, 0
    assert_same(pair, input_ids=ids, attention_mask=seen)
    assert_same(pair, input_ids=ids, attention_mask=seen, num_beams=2)


@pytest.mark.parametrize("kind", ["dynamic", "static", "latent"])
def test_with_a_cache_of_the_users(pair: tuple[Any, Any], kind: str) -> None:
    config = pair[0].config
    made = {
        "dynamic": lambda: DynamicCache(),
        "static": lambda: StaticCache(config, max_cache_len=40),
        "latent": lambda: LatentCache(config),
    }[kind]()
    if kind == "static" and config.model_type == "latentize" and config.latent_layers[0]["rope_heads"] > 1:
        # transformers' static cache wants as many roped keys as latents.
        with pytest.raises(RuntimeError, match="same slice shapes"):
            generated(pair[1], input_ids=prompt(2), past_key_values=made)
        return
    assert_same(pair, input_ids=prompt(2), past_key_values=made)


@pytest.mark.parametrize("kind", ["static", "latent"])
def test_compiled(kind: str) -> None:
    """Dynamo takes it, with breaks; the code that Inductor would write from its graphs is not what is tested."""
    model = stock("deepseek_v3")
    fast = latentize.accelerate(copy.deepcopy(model))
    fast.forward = torch.compile(fast.forward, backend="aot_eager")
    caches = {
        "static": lambda: StaticCache(model.config, max_cache_len=40),
        "latent": lambda: LatentCache(model.config, latent="int8", rope="int8"),
    }
    expected = generated(latentize.accelerate(model), input_ids=prompt(2), past_key_values=caches[kind]())
    made = generated(fast, input_ids=prompt(2), past_key_values=caches[kind]())
    torch.compiler.reset()
    assert torch.equal(made.sequences, expected.sequences)


@torch.no_grad()
def test_several_tokens_at_a_time_continue_a_cache(pair: tuple[Any, Any]) -> None:
    ids = prompt(2, 60)
    expected = pair[0](ids).logits
    for sizes in ((40, 1, 1, 18), (20, 5, 35), (1, 59), (30, 30)):
        cache, parts = LatentCache(pair[1].config), []
        for part in ids.split(sizes, dim=1):
            parts.append(pair[1](part, past_key_values=cache).logits)
        assert relative_error(torch.cat(parts, dim=1), expected) <= FP32, sizes


@torch.no_grad()
def test_undone_it_is_the_stock_model_again() -> None:
    model = stock("deepseek_v3")
    before = {k for k in vars(model) if not k.startswith("_hf")}
    assert latentize.accelerate(latentize.accelerate(model)) is model
    assert latentize.is_accelerated(model)
    latentize.decelerate(latentize.decelerate(model))
    assert not latentize.is_accelerated(model)
    assert {k for k in vars(model) if not k.startswith("_hf")} == before
    assert model.config._attn_implementation == "sdpa"
    assert not any(m._forward_pre_hooks for m in model.modules())
    out = generated(model, input_ids=prompt())
    assert isinstance(out.past_key_values, DynamicCache)


@torch.no_grad()
def test_another_instance_stays_as_it_was() -> None:
    one = stock("deepseek_v3")
    other = type(one)(one.config).eval()  # They share it.
    expected = other(prompt()).logits
    latentize.accelerate(one)
    assert other.config._attn_implementation == "sdpa"
    assert torch.equal(other(prompt()).logits, expected)
    assert isinstance(generated(one, input_ids=prompt()).past_key_values, LatentCache)
    assert isinstance(generated(other, input_ids=prompt()).past_key_values, DynamicCache)


def test_a_model_without_latents_is_refused() -> None:
    model = pico_model("llama")
    with pytest.raises(UnsupportedModelError, match="no latent attention"):
        latentize.accelerate(model)


def test_gradients_flow_as_through_the_stock_model(pair: tuple[Any, Any]) -> None:
    ids = prompt(2, 20)
    for model in pair:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
    grads = [{n: p.grad for n, p in model.named_parameters() if p.grad is not None} for model in pair]
    assert grads[0].keys() == grads[1].keys() != set()
    for name, gradient in grads[0].items():
        assert relative_error(grads[1][name], gradient) <= 1e-4, name
