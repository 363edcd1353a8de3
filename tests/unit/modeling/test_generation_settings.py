"""Text from a model whose settings, tokenizer or prompt ask for something odd: what can be had is, the rest is said."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tests.common import SMALL, call_cli, last_json, mutants, text_file
from tests.models import pico

from latentize import api
from latentize.errors import CheckpointError, LatentizeError, OptionError
from latentize.modeling.load import load_model
from latentize.text.tokenizer import load_tokenizer

PROMPT = "some words"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model and what was made of it; tests change their ``generation_config.json`` for a while."""
    folder = tmp_path_factory.mktemp("settings")
    source, out = pico(folder), folder / "out"
    api.convert(source, out, keep="50%", data=(text_file(folder),), **SMALL)
    return {"source": source, "converted": out}


@contextmanager
def settings(folder: Path, entries: dict[str, Any]) -> Iterator[None]:
    """``generation_config.json`` for a while: the folder serves other tests, too."""
    path = folder / "generation_config.json"
    before = path.read_text()
    path.write_text(json.dumps(entries))
    try:
        yield
    finally:
        path.write_text(before)


def ask(folder: Path, entries: dict[str, Any], **options: Any) -> dict[str, Any]:
    with settings(folder, entries):
        return api.generate(folder, PROMPT, **{"max_new_tokens": 8, **options})


NEUTRAL = {"eos_token_id": 0}


@pytest.mark.parametrize("kind", ["source", "converted"])
@pytest.mark.parametrize(
    ("entries", "word"),
    [
        ({"num_return_sequences": 3}, "one continuation"),
        ({"num_beams": 1000}, "no sense"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive"),
        ({"prompt_lookup_num_tokens": 10**9}, "no sense"),
        ({"assistant_early_exit": 1}, "ahead"),
        ({"cache_implementation": "static"}, "cache"),
        ({"cache_implementation": "quantized", "cache_config": {"backend": "quanto"}}, "cache"),
        ({"use_cache": False}, "cache"),
        ({"dola_layers": "low"}, "hub"),
        ({"constraints": [1], "num_beams": 1}, "hub"),
        ({"guidance_scale": 1.5}, "second cache"),
        ({"token_healing": True}, "prompt"),
        ({"repetition_penalty": "strong"}, "no sense"),
        ({"suppress_tokens": 5}, "no sense"),
        ({"bad_words_ids": [[9999]]}, "no sense"),
        ({"streamer": 1}, "not known"),
    ],
)
def test_what_cannot_be_had_is_left_out_and_said(
    models: dict[str, Path], kind: str, entries: dict[str, Any], word: str
) -> None:
    plain = ask(models[kind], NEUTRAL)
    found = ask(models[kind], {**NEUTRAL, **entries})
    assert found["text"] == plain["text"] and plain["notes"] == []
    (note,) = found["notes"]
    assert "generation_config.json" in note and word in note and next(iter(entries)) in note


@pytest.mark.parametrize("kind", ["source", "converted"])
@pytest.mark.parametrize(
    "entries",
    [
        {"num_beams": 4},
        {"num_beams": 3, "length_penalty": 0},
        {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 2},
        {"repetition_penalty": 3},
        {"suppress_tokens": list(range(100))},
        {"bad_words_ids": [[n] for n in range(1, 60)]},
        {"sequence_bias": [[[7], 50.0]]},
    ],
    ids=str,
)
def test_what_can_be_had_is_as_transformers_has_it(models: dict[str, Path], kind: str, entries: dict[str, Any]) -> None:
    """The same tokens as transformers alone, with its own cache, asked for the same."""
    found = ask(models[kind], {**NEUTRAL, **entries})
    assert found["notes"] == []
    if "length_penalty" in entries:
        entries = {**entries, "length_penalty": float(entries["length_penalty"])}
    if "repetition_penalty" in entries:
        entries = {**entries, "repetition_penalty": float(entries["repetition_penalty"])}
    from transformers import AutoTokenizer, GenerationConfig

    model, tokenizer = load_model(models[kind]), AutoTokenizer.from_pretrained(models[kind])
    model.generation_config = GenerationConfig()
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 0}
    wanted = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options, **entries)
    assert found["text"] == tokenizer.decode(wanted[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("entries", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 3}, {"repetition_penalty": 1.5}])
@pytest.mark.parametrize("cache", [{"cache": "int8"}, {"window": 16}, {"window": 16, "cache": "int4"}])
def test_caches_of_all_kinds(models: dict[str, Path], entries: dict[str, Any], cache: dict[str, Any]) -> None:
    """A prompt that goes in by parts, too. Wrong guesses cannot be taken back in a window, so there are none."""
    found = ask(models["converted"], {**NEUTRAL, **entries}, **cache)
    guesses = "window" in cache and "prompt_lookup_num_tokens" in entries
    assert [("window" in note and "guess" in note) for note in found["notes"]] == [True] * guesses
    if "prompt_lookup_num_tokens" in entries:
        assert found["text"] == ask(models["converted"], NEUTRAL, **cache)["text"]
    long = api.generate(models["converted"], "ab c " * 500, max_new_tokens=2, **cache)
    assert long["prompt_tokens"] == 2500 and 1 <= long["tokens"] <= 2


def ascii_only(count: int) -> list[int]:
    """Tokens of a byte tokenizer that are not printed as one letter, to be suppressed."""
    return [n for n in range(count) if not 34 <= n <= 94]


@pytest.mark.parametrize("kind", ["source", "converted"])
def test_text_ends_where_it_is_said(models: dict[str, Path], kind: str) -> None:
    """At a string, at one of several tokens, in the middle of which there is one that no vocabulary has."""
    barred = {**NEUTRAL, "suppress_tokens": ascii_only(257)}
    whole = ask(models[kind], barred)
    assert whole["tokens"] == 8 and len(whole["text"]) == 8
    third = whole["text"][2]
    stopped = ask(models[kind], {**barred, "stop_strings": [third]})
    assert stopped["text"] == whole["text"][: whole["text"].index(third) + 1]
    ids = load_tokenizer(models[kind])(third)["input_ids"]
    ended = ask(models[kind], {**barred, "eos_token_id": [0, 10**9, *ids]})
    assert ended["tokens"] == whole["text"].index(third) + 1


def test_the_command_says_it_on_stderr(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = models["converted"]
    for more in ((), ("--json",)):
        with settings(folder, {**NEUTRAL, "num_beams": 2, "num_return_sequences": 2}):
            done = call_cli(capsys, "generate", folder, PROMPT, "--max-new-tokens", 4, *more)
        assert done.returncode == 0, done.stderr
        assert "num_return_sequences = 2 is left out" in done.stderr
        assert (last_json(done.stdout)["tokens"] == 4) if more else done.stdout.startswith(PROMPT)


def test_a_prompt_of_nothing_begins_as_a_text_does(models: dict[str, Path]) -> None:
    ask(models["converted"], NEUTRAL)
    found = api.generate(models["converted"], "", max_new_tokens=4)
    assert found["prompt_tokens"] == 1 and found["tokens"] >= 1
    assert found["text"] == api.generate(models["converted"], "<|endoftext|>", max_new_tokens=4)["text"]


def test_a_prompt_of_nothing_that_nothing_begins(models: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models["source"], tmp_path / "model"))
    path = folder / "tokenizer_config.json"
    entries = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in entries.items() if k not in ("bos_token", "eos_token")}))
    with pytest.raises(OptionError, match="empty"):
        api.generate(folder, "", max_new_tokens=2)


def test_a_prompt_that_is_no_text(models: dict[str, Path]) -> None:
    """What is no text in a prompt is what it is in a text that is calibrated on, and it is said."""
    made, other = (api.generate(models["source"], prompt, max_new_tokens=2) for prompt in ("a\udcff", "a\ufffd"))
    assert made["text"] == other["text"]
    assert "UTF-8" in made["notes"][0] and other["notes"] == []


def documents_of(folder: Path, document: Callable[[int], str]) -> str:
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": document(n)}) + "\n" for n in range(150)))
    return str(path)


@pytest.fixture(scope="module")
def narrow(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models whose embedding has 100 rows for a tokenizer of 257; what was made of one, of text that needs no more."""
    folder = tmp_path_factory.mktemp("narrow")
    source, out = pico(folder, vocab_size=100), folder / "out"
    # Letters of ASCII are the first tokens, without the space.
    text = documents_of(folder, lambda n: ",".join(str(n * k * k) for k in range(60)))
    api.convert(source, out, keep="50%", data=(text,), **SMALL)
    return {"source": source, "converted": out}


COMMANDS: dict[str, Callable[..., Any]] = {
    "generate": lambda model, text, out: api.generate(model, "\u00fc", max_new_tokens=2),
    "eval": lambda model, text, out: api.evaluate(model, data=(text,), tokens=512, sequence_length=64),
    "compare": lambda model, text, out: api.compare(model, [str(model)], data=(text,), tokens=512, sequence_length=64),
    "convert": lambda model, text, out: api.convert(model, out, keep="50%", data=(text,), **SMALL),
}


@pytest.mark.parametrize(
    ("command", "kind"),
    # An output is not converted again.
    [(c, k) for c in COMMANDS for k in ("source", "converted") if (c, k) != ("convert", "converted")],
)
def test_a_token_without_a_row_is_the_same_error_everywhere(
    narrow: dict[str, Path], tmp_path: Path, command: str, kind: str
) -> None:
    text = documents_of(tmp_path, lambda n: f"{n} \u00fc\u00e4 " * 60)
    with pytest.raises(CheckpointError) as caught:
        COMMANDS[command](narrow[kind], text, tmp_path / "out")
    assert caught.value.code == "LZ117" and "100 rows" in caught.value.what
    assert not list(tmp_path.glob("out*"))


def test_the_healing_of_a_model_without_a_row(narrow: dict[str, Path], tmp_path: Path) -> None:
    text = documents_of(tmp_path, lambda n: f"{n} \u00fc\u00e4 " * 60)
    options: dict[str, Any] = {"tokens": 512, "sequence_length": 64, "selection_tokens": 128, "evaluation_tokens": 256}
    with pytest.raises(CheckpointError) as caught:
        api.heal(narrow["converted"], tmp_path / "healed", narrow["source"], data=(text,), **options)
    assert caught.value.code == "LZ117"
    assert not list(tmp_path.glob("healed*"))


def names() -> list[str]:
    from transformers import GenerationConfig

    return sorted({*GenerationConfig().to_dict(), "streamer", "logits_processor", "custom_generate", "anything"})


NUMBERS = st.one_of(st.integers(-3, 300), st.sampled_from([2**31, 2**63, 10**40]), st.floats(), st.booleans())
LEAVES = st.one_of(st.none(), NUMBERS, st.text(max_size=4))
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
)
TOKENIZER = (
    "add_bos_token", "add_eos_token", "add_prefix_space", "added_tokens_decoder", "additional_special_tokens",
    "bos_token", "chat_template", "clean_up_tokenization_spaces", "eos_token", "extra_special_tokens",
    "fast_tokenizer_files", "legacy", "model_input_names", "model_max_length", "pad_token", "padding_side",
    "split_special_tokens", "tokenizer_class", "truncation_side", "unk_token", "use_fast",
)  # fmt: skip


@mutants()
@given(st.data(), st.sampled_from([0.0, 0.8]))
@pytest.mark.slow
def test_no_setting_ends_in_a_traceback(models: dict[str, Path], data: Any, temperature: float) -> None:
    entries = data.draw(st.dictionaries(st.sampled_from(names()), VALUES, max_size=4))
    refused_or_done(lambda: ask(models["converted"], entries, max_new_tokens=3, temperature=temperature))


@mutants()
@given(st.dictionaries(st.sampled_from(TOKENIZER), VALUES, min_size=1, max_size=2))
@example({"model_input_names": ["token_type_ids"]})
@example({"model_max_length": "many"})
@example({"eos_token": 5})
def test_no_entry_of_a_tokenizer_ends_in_a_traceback(models: dict[str, Path], entries: dict[str, Any]) -> None:
    folder = models["source"]
    path = folder / "tokenizer_config.json"
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), **entries}))
    try:
        refused_or_done(lambda: ask(folder, NEUTRAL, max_new_tokens=3))
    finally:
        path.write_text(before)


def refused_or_done(run: Callable[[], Any]) -> None:
    started = time.monotonic()
    with suppress(LatentizeError):
        assert 0 <= run()["tokens"] <= 3
    assert time.monotonic() - started < 60
