"""Records of the usual data sets are text, as the model sees it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.models import byte_tokenizer

from latentize.errors import DataError
from latentize.text.documents import documents
from latentize.text.drawing import Part, draw, draw_all
from latentize.text.records import Chat, chat_renderer, document_of

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('no such role: ' + m.role) }}{% endif %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
)
ASKED, ANSWERED = "What is it?", "A llama."
USER, ASSISTANT = {"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}
TURNS = Chat((("user", ASKED), ("assistant", ANSWERED)))


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER, ASSISTANT]},
        {"messages": [USER, ASSISTANT], "content": "something else", "prompt": "something else"},
        {"text": None, "messages": [USER, ASSISTANT]},
        {"messages": [{**USER, "content": [{"type": "text", "text": ASKED}, {"type": "image"}]}, ASSISTANT]},
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{}]}, ASSISTANT]},
        {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWERED}]},
        {"prompt": ASKED, "completion": ANSWERED},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": ASKED, "response": ANSWERED},
        {"instruction": ASKED, "output": ANSWERED, "input": ""},
        {"question": ASKED, "answer": ANSWERED},
    ],
    ids=lambda record: "+".join(record),
)
def test_conversations(record: dict[str, Any], tmp_path: Path) -> None:
    assert document_of(record, "") == TURNS
    (tmp_path / "chat.jsonl").write_text(json.dumps(record))
    (document,) = documents([tmp_path / "chat.jsonl"], "all")
    assert document == f"user: {ASKED}\n\nassistant: {ANSWERED}\n\n"


@pytest.mark.parametrize("record", [{"text": "words"}, {"content": "words"}, {"text": "words", "messages": [USER]}])
def test_plain_text(record: dict[str, Any]) -> None:
    assert document_of(record, "") == "words"


def test_an_instruction_is_about_its_input() -> None:
    found = document_of({"instruction": "Translate.", "input": "llama", "output": "лама"}, "")
    assert found == Chat((("user", "Translate.\n\nllama"), ("assistant", "лама")))


@pytest.mark.parametrize("record", [None, 3, [USER], "words", {}, {"txt": "a"}, {"prompt": ASKED}, {"completion": "x"}])
def test_records_without_text_say_what_they_have(record: object) -> None:
    with pytest.raises(DataError, match="no `text` field") as caught:
        document_of(record, "file, line 7")
    assert caught.value.where == "file, line 7"
    assert all(name in caught.value.what for name in (record if isinstance(record, dict) else ()))


@pytest.mark.parametrize(
    "messages",
    [3, "words", {}, [3], ["words"], [{}], [{"role": "user"}], [{"role": 1, "content": "x"}], [{**USER, "content": 3}]],
)
@pytest.mark.parametrize("field", ["messages", "conversations", "prompt"])
def test_messages_that_are_none(messages: object, field: str) -> None:
    if field == "prompt" and isinstance(messages, str):
        return
    with pytest.raises(DataError, match=f"`{field}` of a record is no list of messages"):
        document_of({field: messages, "completion": "x"}, "")


def test_parquet_with_columns_of_conversations(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1, 2], "messages": [[USER, ASSISTANT]] * 2}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"prompt": [ASKED], "completion": [ANSWERED]}), tmp_path / "b.parquet")
    assert list(documents(tmp_path, "all")) == [f"user: {ASKED}\n\nassistant: {ANSWERED}\n\n"] * 3


def test_a_chat_template_writes_them_without_a_second_beginning() -> None:
    tokenizer, told = byte_tokenizer(), []
    tokenizer.chat_template = TEMPLATE
    assert chat_renderer(tokenizer, told.append)(TURNS) == f"[user]{ASKED}\n[assistant]{ANSWERED}\n"
    assert not told


@pytest.mark.parametrize("template", [None, TEMPLATE, "{{ broken", "{{ messages[99].content }}"])
def test_what_a_template_does_not_write_is_written_plainly(template: str | None) -> None:
    tokenizer, told = byte_tokenizer(), []
    tokenizer.chat_template = template
    chat = Chat((("narrator", "words"),))
    assert chat_renderer(tokenizer, told.append)(chat) == "narrator: words\n\n"
    assert len(told) == 1 and ("no chat template" if template is None else "refuses") in told[0]


def test_conversations_are_drawn_as_the_model_sees_them(tmp_path: Path) -> None:
    tokenizer, notes = byte_tokenizer(), []
    tokenizer.chat_template = TEMPLATE
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": f"{n}!" * 9}) + "\n" for n in range(400)))
    rows = draw(tokenizer, path, [Part("calibration", 640), Part("heldout", 640)], sequence_length=64, notes=notes)
    for rows_NT in (*rows, draw_all(tokenizer, path, tokens=640, sequence_length=64, notes=notes)):
        text = tokenizer.decode(rows_NT.flatten())
        assert "[user]" in text and "[assistant]" in text and "user:" not in text
    assert not notes


def test_a_template_does_not_decide_what_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": f"{n}!"}) + "\n" for n in range(200)))
    plain = list(documents(path, "heldout"))
    other = list(documents(path, "heldout", render=lambda chat: "".join(text for _, text in chat.turns)))
    assert [text.split()[1] for text in plain] == [text.split("?")[0] + "?" for text in other]
