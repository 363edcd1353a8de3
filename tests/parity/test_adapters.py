"""Adapters and prompts of peft count, learn, merge and come and go as on the plain model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.common import relative_error
from tests.parity.pair import ATTENTION, IDS, Pair, assert_same, generated

import latentize
from latentize.errors import LatentizeError

UP = r".*kv_b_proj"
ADAPTERS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules=ATTENTION),
    "lora on everything": lambda: peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "lora on up-projections": lambda: peft.LoraConfig(r=4, target_modules=UP),
    "dora": lambda: peft.LoraConfig(r=4, target_modules=ATTENTION, use_dora=True),
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=ATTENTION),
    "ia3": lambda: peft.IA3Config(target_modules=ATTENTION, feedforward_modules=[]),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=ATTENTION),
    "hra": lambda: peft.HRAConfig(r=4, target_modules=UP),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=UP),
    "modules to save": lambda: peft.LoraConfig(r=4, target_modules=".*o_proj", modules_to_save=["kv_b_proj"]),
}


def adapted(model: Any, name: str, strength: float = 0.3) -> Any:
    torch.manual_seed(0)
    model = peft.get_peft_model(model, ADAPTERS[name]()).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += strength * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_count_and_learn(pair: Pair, name: str) -> None:
    """As on the plain model; and what is merged, whose weights are plain again, says the same."""
    model, expected = adapted(pair.model(), name), adapted(pair.plain(), name)
    with torch.no_grad():
        assert relative_error(model(IDS).logits, pair.plain()(IDS).logits) > 1e-2, "the adapter does something"
    assert_same(model, expected, 1e-4)
    for one in (model, expected):
        one(input_ids=IDS, labels=IDS).loss.backward()
    learnt = 0
    for (parameter, mine), its in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert (mine.grad is None) == (its.grad is None), parameter
        if its.grad is not None and its.grad.abs().max() > 0:
            assert relative_error(mine.grad, its.grad) <= 1e-3, parameter
            learnt += 1
    assert learnt > 0
    merged = copy.deepcopy(expected).merge_and_unload()
    assert_same(model, merged, 1e-3)
    assert_same(model.merge_and_unload(), merged, 1e-3)


def test_adapters_come_and_go(pair: Pair) -> None:
    model, expected = adapted(pair.model(), "lora"), adapted(pair.plain(), "lora")
    model.merge_adapter()
    assert_same(model, expected, 1e-4)
    model.unmerge_adapter()
    for one in (model, expected):
        torch.manual_seed(5)
        config = peft.LoraConfig(r=2, target_modules=ATTENTION, init_lora_weights=False)
        one.add_adapter("other", config)
        one.set_adapter("other")
        one.eval()
    assert_same(model, expected, 1e-4)
    with model.disable_adapter():
        assert_same(model, pair.plain())
    # Each sequence of a batch with its own is a prompt's matter: absorbed, all share one matrix.
    names = {"adapter_names": ["default", "other"]}
    with torch.no_grad():
        assert relative_error(model(IDS, **names).logits, expected(IDS, **names).logits) <= 1e-4
    if pair.fast:
        with pytest.raises(LatentizeError, match="LZ213"):
            generated(model, **names)


def test_accelerated_around_and_inside_an_adapted_model(pair: Pair) -> None:
    expected = adapted(pair.plain(), "lora")
    around = latentize.accelerate(copy.deepcopy(expected))
    assert_same(around, expected, 1e-4)
    inside = copy.deepcopy(expected)
    latentize.accelerate(inside.get_base_model())
    assert latentize.is_accelerated(inside)
    assert_same(inside, expected, 1e-4)
    for model in (around, inside):
        assert not latentize.is_accelerated(latentize.decelerate(model))
        assert_same(model, expected)


@pytest.mark.parametrize(
    "config",
    [
        lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        lambda: peft.PromptEncoderConfig(num_virtual_tokens=4, task_type="CAUSAL_LM", encoder_hidden_size=16),
    ],
    ids=["prompt tuning", "p-tuning"],
)
def test_tuned_prompts(pair: Pair, config: Callable[[], Any]) -> None:
    made = []
    for model in (pair.model(), pair.plain()):
        torch.manual_seed(0)
        made.append(peft.get_peft_model(model, config()).eval())
    assert_same(*made)
    made[0](input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in made[0].parameters() if p.requires_grad)


def test_tuned_prefixes_are_refused(pair: Pair) -> None:
    config = peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    with pytest.raises(LatentizeError, match="prefix tuning"):
        peft.get_peft_model(pair.model(), config)(IDS)


def test_adapters_of_transformers(pair: Pair, tmp_path: Path) -> None:
    model = pair.model()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=ATTENTION, init_lora_weights=False))
    model.save_pretrained(tmp_path)
    expected = pair.plain()
    expected.load_adapter(str(tmp_path))
    assert_same(model.eval(), expected.eval(), 1e-4)
