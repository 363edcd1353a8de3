"""The model that heals computes what the one on disk does, and so does what is written of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.common import FP32, SMALL, STOCK, random_tokens, relative_error

import latentize
from latentize.checkpoint import open_checkpoint
from latentize.healing.loop import _recompute
from latentize.healing.recipe import Healing
from latentize.healing.student import Student
from latentize.healing.targets import Live, inputs
from latentize.modeling.load import load_model
from latentize.runtime.accelerate import accelerate
from latentize.runtime.cache import LatentCache, cache_formats
from latentize.text.tokens import Passages, spread_positions

KINDS = {
    "deepseek_v3": {"format": "deepseek_v3", "keep": "50%"},
    "native": {"format": "native", "keep": "50%"},
    "mha2mla": {"method": "mha2mla", "keep": "50%"},
    "pooled": {"to": "mqa"},
}


@pytest.fixture(scope="module")
def converted(
    source: Callable[..., Path], text: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def convert(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("heal") / kind
            options = {**SMALL, **KINDS[kind], "data": (text,)}
            options = {k: v for k, v in options.items() if k != "fast" or kind in ("deepseek_v3", "native")}
            latentize.convert(source(), made[kind], **options)
        return made[kind]

    return convert


@torch.no_grad()
def predictions(student: Student, tokens: torch.Tensor) -> torch.Tensor:
    hidden = student.body(input_ids=tokens, use_cache=False).last_hidden_state
    return student.model.get_output_embeddings()(hidden)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_is_the_model_on_disk_before_and_after(
    kind: str, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, tokens = converted(kind), random_tokens()
    student = Student(folder, Healing())
    with torch.no_grad():
        stock = load_model(folder)(input_ids=tokens, use_cache=False).logits
    assert relative_error(predictions(student, tokens), stock) <= STOCK
    files = open_checkpoint(folder)
    stored = dict(student.stored(files, tokens))
    assert list(stored) == list(files.names())
    reloaded = load_model(folder)
    reloaded.load_state_dict(stored, strict=False)
    with torch.no_grad():
        again = reloaded(input_ids=tokens, use_cache=False).logits
    assert relative_error(again, stock) <= STOCK


@pytest.mark.parametrize("train", ["attention", "all"])
def test_what_was_learnt_is_what_is_stored(train: str, converted: Callable[[str], Path]) -> None:
    folder, tokens = converted("deepseek_v3"), random_tokens()
    student = Student(folder, Healing(train=train))  # type: ignore[arg-type]
    with torch.no_grad():
        for _, parameter in student.trained():
            parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter) if parameter.ndim > 1 else 0.0)
    reloaded = load_model(folder)
    reloaded.load_state_dict(dict(student.stored(open_checkpoint(folder), tokens)), strict=False)
    with torch.no_grad():
        stock = reloaded(input_ids=tokens, use_cache=False).logits
    assert relative_error(predictions(student, tokens), stock) <= STOCK


def test_only_attention_learns_unless_more_is_asked_for(converted: Callable[[str], Path]) -> None:
    folder = converted("deepseek_v3")
    assert all(".self_attn." in name for name, _ in Student(folder, Healing()).trained())
    everything = Student(folder, Healing(train="all"))
    assert len(list(everything.trained())) == len(list(everything.parameters()))


def test_fresh_adapters_change_nothing_and_learnt_ones_are_merged(converted: Callable[[str], Path]) -> None:
    folder, tokens = converted("native"), random_tokens()
    whole, student = Student(folder, Healing()), Student(folder, Healing(train="lora", lora_rank=2))
    assert relative_error(predictions(student, tokens), predictions(whole, tokens)) <= FP32
    learning = dict(student.trained())
    assert all("lora_" in name for name in learning)
    assert {name.split(".self_attn.")[1].split(".")[0] for name in learning} == {
        "q_proj",
        "kv_a_proj",
        "k_rope_proj",
        "kv_b_proj",
        "o_proj",
    }
    with torch.no_grad():
        for parameter in learning.values():
            # Twice as much makes logits so large that on some machines rounding alone comes to FP32.
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert relative_error(predictions(student, tokens), predictions(whole, tokens)) > 1e-3
    reloaded = load_model(folder)
    reloaded.load_state_dict(dict(student.stored(open_checkpoint(folder), tokens)), strict=True)
    with torch.no_grad():
        stock = reloaded(input_ids=tokens, use_cache=False).logits
    assert relative_error(predictions(student, tokens), stock) <= FP32


@pytest.mark.parametrize("formats", ["int4", "int8", "fp8", "bf16", "int4+int4"])
@pytest.mark.parametrize("kind", ["deepseek_v3", "mha2mla"])
def test_simulated_rounding_is_the_caches(kind: str, formats: str, converted: Callable[[str], Path]) -> None:
    folder, tokens = converted(kind), random_tokens()
    model = accelerate(load_model(folder))
    with torch.no_grad():
        cached = model(input_ids=tokens, past_key_values=LatentCache(model.config, **cache_formats(formats))).logits
    exact = predictions(Student(folder, Healing()), tokens)
    simulated = predictions(Student(folder, Healing(cache=formats)), tokens)
    # A value on the edge of two levels falls either way; errors of the rounding itself are a hundred times larger.
    difference = (simulated - cached).norm() / (exact - cached).norm()
    assert float(difference) <= 0.2
    assert relative_error(simulated, exact) > 1e-4


def spread(tokens: torch.Tensor) -> Passages:
    return Passages(tokens, spread_positions(*tokens.shape, 200))


@pytest.mark.parametrize("kind", ["deepseek_v3", "native", "pooled"])
def test_what_comes_after_a_jump_sees_what_came_before(kind: str, converted: Callable[[str], Path]) -> None:
    """transformers takes positions that are not in a row for several documents, unless it is told."""
    text, student = spread(random_tokens()), Student(converted(kind), Healing())
    assert (text.positions_NT.diff(dim=1) > 1).any()
    length = text.length
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        hidden = student.body(**inputs(text), use_cache=False).last_hidden_state
        expected = student.body(
            input_ids=text.tokens_NT, position_ids=text.positions_NT, attention_mask=causal, use_cache=False
        ).last_hidden_state
        in_a_row = student.body(input_ids=text.tokens_NT, use_cache=False).last_hidden_state
    assert relative_error(hidden, expected) <= FP32
    assert relative_error(hidden[0], in_a_row[0]) <= FP32, "the first does not jump"
    assert relative_error(hidden[1], in_a_row[1]) > 1e-3


def gradients(student: Student, teacher: Live, tokens: torch.Tensor) -> list[torch.Tensor]:
    text = spread(tokens)
    student(text, teacher(torch.arange(len(text)), text)).total.backward()
    return [p.grad for _, p in student.trained() if p.grad is not None]


def test_recomputed_layers_have_the_same_gradients(
    source: Callable[..., Path], converted: Callable[[str], Path]
) -> None:
    folder, tokens, teacher = converted("deepseek_v3"), random_tokens(), Live(load_model(source()))
    kept, again = (Student(folder, Healing(cache="int8")) for _ in range(2))
    _recompute(again)
    pairs = zip(gradients(kept, teacher, tokens), gradients(again, teacher, tokens), strict=True)
    assert all(relative_error(mine, its) <= FP32 for its, mine in pairs)


def test_losses_against_their_definitions(source: Callable[..., Path], converted: Callable[[str], Path]) -> None:
    folder, tokens, model = converted("deepseek_v3"), random_tokens(), load_model(source())
    student = Student(folder, Healing(ce=0.25, temperature=2.0, match_hidden=0.5))
    student._tokens_at_once = lambda: 7
    text = Passages.contiguous(tokens)
    losses = student(text, Live(model, hidden=True)(torch.arange(2), text))
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False, output_hidden_states=True)
        found = student.body(input_ids=tokens, use_cache=False, output_hidden_states=True)
        q = student.model.get_output_embeddings()(found.last_hidden_state[:, :-1]).flatten(0, 1)
        p = expected.logits[:, :-1].flatten(0, 1)
        kl = torch.nn.functional.kl_div(
            (q / 2).log_softmax(-1), (p / 2).log_softmax(-1), log_target=True, reduction="batchmean"
        )
        ce = torch.nn.functional.cross_entropy(q, tokens[:, 1:].flatten())
        pairs = zip(found.hidden_states[1:], expected.hidden_states[1:], strict=True)
        hidden = torch.stack([(a - b).square().mean() / b.var() for a, b in pairs]).mean()
    assert float(losses.kl) == pytest.approx(float(kl), rel=1e-4)
    assert float(losses.ce) == pytest.approx(float(ce), rel=1e-4)
    assert float(losses.hidden) == pytest.approx(float(hidden), rel=1e-4)
    assert float(losses.total.detach()) == pytest.approx(
        0.75 * 4 * float(kl) + 0.25 * float(ce) + 0.5 * float(hidden), rel=1e-4
    )
