"""Text that a model writes follows its own predictions, holds no control tokens, and is the same for the same seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.common import SMALL
from tests.models import byte_tokenizer
from torch import Tensor

import latentize
from latentize.conversion.self_generated import self_generated
from latentize.errors import OptionError
from latentize.modeling.attending import NAME, attending, cache_of
from latentize.modeling.load import load_model
from latentize.text.tokenizer import load_tokenizer


class Chain:
    """A model whose next token depends on the last alone, by a table of probabilities; it counts what it is asked."""

    device, config = torch.device("cpu"), None
    modules = staticmethod(list)

    def __init__(self, next_VV: Tensor) -> None:
        self.next_VV, self.asked = next_VV, 0

    def get_output_embeddings(self) -> Any:
        return SimpleNamespace(weight=self.next_VV)

    def __call__(self, tokens_BT: Tensor, *, past_key_values: int | None, use_cache: bool) -> Any:
        seen = (past_key_values or 0) + tokens_BT.shape[1]
        self.asked += tokens_BT.numel()
        return SimpleNamespace(logits=self.next_VV.log()[tokens_BT], past_key_values=seen)


def table(seed: int = 0) -> Tensor:
    vocabulary = len(byte_tokenizer()) + 3  # rows that the tokenizer does not know, as padded embeddings have
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(vocabulary, vocabulary, generator=generator).pow(8).softmax(-1)


def test_continuations_follow_the_predictions_of_the_model() -> None:
    tokenizer, next_VV = byte_tokenizer(), table()
    vocabulary = len(next_VV)
    # Two likely successors each, three to one; all others so unlikely that they do not occur.
    next_VV = torch.full_like(next_VV, 1e-12)
    plain = torch.arange(40, 240)
    for token in range(vocabulary):
        next_VV[token, plain[token % 200]], next_VV[token, plain[(7 * token + 1) % 200]] = 0.75, 0.25
    model = Chain(next_VV)
    drawn_NT = self_generated(model, tokenizer, sequences=16, length=512)
    assert drawn_NT.shape == (16, 512)
    pieces = drawn_NT.view(-1, 128)
    before, after = pieces[:, :-1].flatten(), pieces[:, 1:].flatten()
    first, second = plain[before % 200], plain[(7 * before + 1) % 200]
    apart = first != second
    assert bool(((after == first) | (after == second)).all())
    share = float((after == first)[apart].float().mean())
    # 8,000 draws: five standard deviations are 0.024.
    assert share == pytest.approx(0.75, abs=0.025)
    assert model.asked == 64 * 127, "each token was read once"


def test_no_control_token_and_none_that_the_tokenizer_does_not_know() -> None:
    tokenizer = byte_tokenizer()
    control = {*tokenizer.all_special_ids, *range(len(tokenizer), len(tokenizer) + 3)}
    assert len(control) > 3
    drawn = self_generated(Chain(table()), tokenizer, sequences=40, length=256)
    assert not control & set(drawn.flatten().tolist())
    assert len(set(drawn[:, 0].tolist())) > 20, "beginnings are from all over the vocabulary"


def test_the_same_for_the_same_seed_and_nobody_elses_draws_change() -> None:
    def draw(seed: int) -> Tensor:
        return self_generated(Chain(table()), byte_tokenizer(), sequences=3, length=100, seed=seed)

    torch.manual_seed(5)
    undisturbed = torch.rand(3)
    torch.manual_seed(5)
    first = draw(1)
    assert torch.equal(torch.rand(3), undisturbed)
    assert torch.equal(draw(1), first) and not torch.equal(draw(2), first)


def test_sequences_begin_as_texts_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentize.conversion.self_generated.leading_tokens", lambda tokenizer: [42, 43])
    drawn = self_generated(Chain(table()), byte_tokenizer(), sequences=5, length=300)
    assert drawn.shape == (5, 300)
    assert drawn[:, :2].tolist() == [[42, 43]] * 5


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen2", "gpt_neox", "lfm2", "mixtral"])
def test_a_model_with_its_cache_draws_as_one_that_reads_all_again(source: Callable[..., Path], family: str) -> None:
    folder = source(family)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    drawn_NT = self_generated(model, tokenizer, sequences=2, length=60)

    class Forgetful:
        device, config = model.device, None
        modules = staticmethod(list)
        get_output_embeddings = staticmethod(model.get_output_embeddings)

        def __call__(self, read_BT: Tensor, *, past_key_values: Tensor | None, use_cache: bool) -> Any:
            whole_BT = read_BT if past_key_values is None else torch.cat([past_key_values, read_BT], dim=1)
            return SimpleNamespace(logits=model(whole_BT, use_cache=False).logits, past_key_values=whole_BT)

    again_NT = self_generated(Forgetful(), tokenizer, sequences=2, length=60)
    assert float((drawn_NT == again_NT).float().mean()) > 0.95, "but for draws that fall between two roundings"


@pytest.mark.parametrize(
    ("family", "grows"), [("llama", True), ("qwen2", True), ("lfm2", False), ("gemma3_text", False)]
)
def test_room_is_set_aside_where_a_cache_is_keys_and_values_of_all_tokens(
    source: Callable[..., Path], family: str, grows: bool
) -> None:
    assert (cache_of(load_model(source(family)), 10) is not None) == grows


def test_a_model_attends_as_before_once_the_text_is_written(source: Callable[..., Path]) -> None:
    folder = source()
    model = load_model(folder)
    self_generated(model, load_tokenizer(folder), sequences=1, length=20)
    assert model.config._attn_implementation == "sdpa"
    with attending(model):
        assert model.config._attn_implementation == NAME
    with pytest.raises(ValueError, match="interrupted"), attending(model):
        raise ValueError("interrupted")
    assert model.config._attn_implementation == "sdpa"


REFINED = {**SMALL, "fast": False, "polish": False, "kv_lora_rank": 24, "qk_rope_head_dim": 8}


@pytest.mark.parametrize(("share", "own"), [(None, 1024), ("25%", 512), (0, 0), (1.0, 2048)])
def test_text_of_its_own_beside_the_users(
    source: Callable[..., Path], text: str, tmp_path: Path, share: str | float | None, own: int
) -> None:
    options = {**REFINED, "tokens": 2048, "sequence_length": 64, "self_generated": share}
    report = latentize.convert(source(), tmp_path / "out", data=(text,), **options)
    assert report["self_generated_tokens"] == own
    assert report["calibration_tokens"] == 2048 + own
    card = (tmp_path / "out" / "README.md").read_text()
    assert (f"{own:,} of them" in card) == bool(own)


def test_only_the_calibrated_method_takes_it(source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="calibrated method learns from text that the model writes"):
        latentize.convert(source(), tmp_path / "out", data=(text,), method="transmla", self_generated=0.5)
