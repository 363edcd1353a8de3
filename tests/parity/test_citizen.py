"""What a ``PreTrainedModel`` offers works on native and on accelerated models, or is refused by a sentence of ours."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.common import FP32, SMALL, relative_error, text_file
from tests.models import pico
from tests.parity.pair import IDS, Pair, assert_same, generated, reloaded
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import latentize
from latentize.errors import LatentizeError

# attention implementations


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_attention_that_is_there(pair: Pair, name: str) -> None:
    expected = pair.plain()
    assert_same(pair.model(attn_implementation=name), expected)
    model = pair.plain()
    model.set_attn_implementation(name)
    assert_same(latentize.accelerate(model) if pair.fast else model, expected)


@pytest.mark.parametrize(
    "name", ["flash_attention_2", "flash_attention_3", "flex_attention", "paged|sdpa", "none such"]
)
def test_attention_that_is_not(pair: Pair, name: str) -> None:
    model = pair.model()
    with pytest.raises(LatentizeError) as refused:
        model.set_attn_implementation(name)
    assert name in str(refused.value)
    assert_same(model, pair.plain())
    if pair.kind.startswith("native"):
        with pytest.raises(LatentizeError) as refused:
            pair.model(attn_implementation=name)
        assert name in str(refused.value)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_an_accelerated_model_keeps_its_attention(pair: Pair, name: str) -> None:
    model = pair.model()
    if not pair.fast:
        model.set_attn_implementation(name)
        assert_same(model, pair.plain())
        return
    with pytest.raises(LatentizeError, match="decelerate"):
        model.set_attn_implementation(name)
    model.config._attn_implementation = name
    if pair.kind.startswith("portable"):
        with pytest.raises(LatentizeError, match="decelerate"):
            model(IDS)
    latentize.decelerate(model)
    model.set_attn_implementation(name)
    assert_same(model, pair.plain())


def test_masks_of_other_attention_are_refused(pair: Pair) -> None:
    if not pair.kind.startswith("native"):
        pytest.skip("2026-11-27: a portable model's own layers are transformers', which read such masks")
    attention = pair.model().source.model.layers[1].self_attn
    for mask in (torch.ones(2, 4), object()):
        with pytest.raises(LatentizeError, match="attn_implementation"):
            attention(torch.zeros(2, 4, 64), attention_mask=mask)


def test_a_model_from_the_config_of_an_accelerated_one(pair: Pair) -> None:
    model = pair.model()
    other = AutoModelForCausalLM.from_config(model.config).eval()
    other.load_state_dict(model.state_dict())
    assert not latentize.is_accelerated(other)
    assert_same(other, pair.plain())


# where weights lie


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("where", ["cpu", "cpu, buffers", "disk"])
def test_offloaded(pair: Pair, where: str, when: str, tmp_path: Path) -> None:
    from accelerate import cpu_offload, disk_offload

    model = pair.plain() if when == "before" else pair.model()
    device = torch.device("cpu")
    if where == "disk":
        disk_offload(model, str(tmp_path), execution_device=device)
    else:
        cpu_offload(model, execution_device=device, offload_buffers="buffers" in where)
    model = latentize.accelerate(model) if pair.fast else model
    assert all(p.is_meta for p in model.parameters())
    assert_same(model, pair.plain())


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, "a layer on the disk"])
def test_device_maps(pair: Pair, device_map: Any, tmp_path: Path) -> None:
    if device_map == "a layer on the disk":
        model, device_map = pair.plain(), {}
        for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
            head, found, tail = name.partition(".layers.")
            part = f"{head}.layers.{tail.split('.')[0]}" if found else name.rpartition(".")[0]
            device_map[part] = "disk" if part.endswith(".layers.1") else "cpu"
    model = pair.model(device_map=device_map, offload_folder=str(tmp_path))
    assert_same(model, pair.plain())


# saving after changes


def test_saved_and_loaded(pair: Pair, tmp_path: Path) -> None:
    model = pair.model()
    assert_same(reloaded(model, tmp_path / "one"), model)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "sharded", dtype=torch.float32).eval(), model)


@pytest.mark.parametrize("options", [{}, {"pad_to_multiple_of": 64}], ids=["", "padded"])
def test_more_tokens(pair: Pair, options: dict[str, int], tmp_path: Path) -> None:
    model = pair.model()
    rows = 384 if options else 330
    with torch.no_grad():
        before = model(IDS).logits
    model.resize_token_embeddings(330, **options)
    assert model.config.vocab_size == rows
    made = model(IDS, labels=IDS)
    assert made.logits.shape[-1] == rows
    assert relative_error(made.logits[..., : before.shape[-1]], before) <= FP32
    made.loss.backward()
    again = reloaded(latentize.decelerate(model), tmp_path)
    assert model.config.vocab_size == again.config.vocab_size == rows
    assert_same(again, model)


def test_tied_and_untied(pair: Pair, tmp_path: Path) -> None:
    model = pair.model()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    tied = reloaded(model, tmp_path / "tied")
    assert tied.get_input_embeddings().weight is tied.get_output_embeddings().weight
    assert_same(tied, model)
    tied.config.tie_word_embeddings = False
    head = tied.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach() * torch.linspace(0.5, 2, len(head.weight))[:, None])
    untied = reloaded(tied, tmp_path / "untied")
    assert untied.get_input_embeddings().weight is not untied.get_output_embeddings().weight
    assert_same(untied, tied)


@pytest.mark.parametrize("tied", [False, True])
def test_what_a_source_leaves_to_its_family(tied: bool, tmp_path: Path) -> None:
    """Whether embeddings are tied is Llama's default or Gemma's where config.json does not say."""
    source = pico(tmp_path, "gemma3_text" if tied else "llama")
    data = (text_file(tmp_path),)
    latentize.convert(source, tmp_path / "out", format="native", keep=0.5, data=data, **SMALL)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["source_config"].pop("tie_word_embeddings", None)
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    model.tie_weights()
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert_same(model, expected)
    assert_same(reloaded(model, tmp_path / "again"), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_precisions(pair: Pair, dtype: torch.dtype, tmp_path: Path) -> None:
    model = pair.model(dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    with torch.no_grad():
        assert relative_error(model(IDS).logits, pair.plain()(IDS).logits) <= 0.1
    generated(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == dtype
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


@pytest.mark.parametrize("how", ["copied", "pickled"])
def test_copied_and_pickled(pair: Pair, how: str) -> None:
    model, expected = pair.model(), pair.plain()
    if how == "copied":
        other = copy.deepcopy(model)
    else:
        torch.save(model, buffer := io.BytesIO())
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert latentize.is_accelerated(other) == pair.fast
    assert_same(other, expected)
    assert_same(latentize.decelerate(other), expected)
    assert latentize.is_accelerated(model) == pair.fast


# calls


def test_inputs_and_outputs(pair: Pair) -> None:
    model, expected = pair.model(), pair.plain()
    embeddings = model.get_input_embeddings()(IDS)
    logits = model(IDS).logits
    assert relative_error(model(inputs_embeds=embeddings).logits, logits) <= FP32
    assert torch.equal(generated(model, inputs_embeds=embeddings), generated(model)[:, IDS.shape[1] :])
    assert relative_error(model(IDS, logits_to_keep=1).logits, logits[:, -1:]) <= FP32
    assert model._supports_logits_to_keep()
    mask = (torch.arange(20) >= torch.tensor([[4], [0]])).long()
    assert relative_error(model(IDS, mask).logits, model(input_ids=IDS, attention_mask=mask).logits) <= FP32
    assert isinstance(model(IDS, return_dict=False), tuple)
    wanted = expected(IDS, output_hidden_states=True).hidden_states
    found = model(IDS, output_hidden_states=True).hidden_states
    assert len(found) == len(wanted) == 3
    for mine, its in zip(found, wanted, strict=True):
        assert relative_error(mine, its) <= FP32
    assert model(IDS).past_key_values is not None and model(IDS, use_cache=False).past_key_values is None


@pytest.mark.parametrize("entry", ["output_hidden_states", "use_cache"])
def test_what_the_config_says_about_outputs_counts(pair: Pair, entry: str) -> None:
    model = pair.model()
    setattr(model.config, entry, entry != "use_cache")
    made = model(IDS)
    assert made.past_key_values is None if entry == "use_cache" else len(made.hidden_states) == 3
    generated(model)


def test_attention_probabilities_are_refused(pair: Pair) -> None:
    model = pair.model(attn_implementation="eager")
    with pytest.raises(LatentizeError, match="probabilities"):
        model(IDS, output_attentions=True)
    with pytest.raises(LatentizeError, match="probabilities"):
        generated(model, output_attentions=True, return_dict_in_generate=True)
    assert_same(model, pair.plain())


def test_loss_and_gradient_checkpointing(pair: Pair) -> None:
    model = pair.model().train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0 and relative_error(gradients[1][name], gradient) <= 1e-4, name
    model.requires_grad_(False)
    model.enable_input_require_grads()
    assert model(IDS).logits.requires_grad


def test_dropout_in_attention(pair: Pair) -> None:
    """Layers of the native format have none; accelerated ones of transformers say so."""
    model = pair.model().train()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    if pair.kind.startswith("portable"):
        with pytest.raises(LatentizeError, match="attention_dropout"):
            model(IDS)
    else:
        model(IDS)


def test_trainer(pair: Pair, tmp_path: Path) -> None:
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
    options: dict[str, Any] = {"max_steps": 2, "report_to": [], "use_cpu": True, "gradient_checkpointing": True}
    model = pair.model()
    trainer = Trainer(model, TrainingArguments(str(tmp_path), save_steps=2, **options), train_dataset=rows)
    trainer.train()
    assert_same(
        AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2", dtype=torch.float32).eval(), model.eval()
    )


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"num_beams": 3},
        {"guidance_scale": 1.5},
        {"prompt_lookup_num_tokens": 3, "input_ids": IDS[:1]},
        {"min_new_tokens": 4, "repetition_penalty": 1.3},
    ],
    ids=["static", "beams", "guided", "looked up", "penalised"],
)
def test_generate(pair: Pair, options: dict[str, Any]) -> None:
    inputs = {"input_ids": IDS, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    assert torch.equal(pair.model().generate(**inputs), pair.plain().generate(**inputs))


def test_a_generation_is_continued(pair: Pair) -> None:
    model = pair.model()
    first = generated(model, return_dict_in_generate=True)
    made = model.generate(
        first.sequences, past_key_values=first.past_key_values, max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    assert torch.equal(made, generated(pair.plain(), max_new_tokens=10))


def test_continuous_batching_is_refused(pair: Pair) -> None:
    with pytest.raises(LatentizeError, match="paged"):
        pair.model().generate_batch([[1, 2, 3], [4, 5]])


@pytest.mark.slow
def test_compiled(pair: Pair) -> None:
    model = torch.compile(pair.model(), backend="eager")
    try:
        assert_same(model, pair.plain())
    finally:
        torch.compiler.reset()


@pytest.mark.slow
def test_lm_eval(pair: Pair) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    assert lm_eval.__name__ == "lm_eval"
    lines = [("a b", " c d e"), ("one two", " three"), ("x", " y z")]
    asked = [Instance("loglikelihood", {}, line, n) for n, line in enumerate(lines)]
    scores = []
    for accelerated in (False, pair.fast):
        lm = HFLM(pretrained=str(pair.folder), device="cpu", dtype="float32", batch_size=2)
        if accelerated:
            latentize.accelerate(lm.model)
        scores.append(torch.tensor([value for value, _ in lm.loglikelihood(asked, disable_tqdm=True)]))
    assert relative_error(scores[1], scores[0]) <= FP32 and scores[0].max() < 0
