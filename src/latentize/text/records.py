"""Records of data sets: plain text, questions with answers, and conversations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from latentize.errors import DataError

__all__ = ["Chat", "Renderer", "chat_renderer", "document_of", "fields", "plainly"]

# Names of the fields that text is looked for in, the first that a record has.
_TEXT, _CHATS, _CONTENT = "text", ("messages", "conversations"), "content"
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
)
# Further text of a question: what an instruction is about.
_ABOUT = "input"
# What data sets call who speaks, where chat templates have another word.
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_FIX = "a record has `text`, `content`, `messages`, or `prompt` and `completion`, or the like (docs/text.md)"


def fields() -> set[str]:
    """All that :func:`document_of` looks at."""
    return {_TEXT, *_CHATS, _CONTENT, _ABOUT, *(name for pair in _PAIRS for name in pair)}


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Attributes:
        turns: Role and text of each.
    """

    turns: tuple[tuple[str, str], ...]

    def messages(self) -> list[dict[str, str]]:
        """As chat templates take it."""
        return [{"role": role, "content": text} for role, text in self.turns]


Renderer = Callable[[Chat], str]


def plainly(chat: Chat) -> str:
    """A conversation for a model that has no template: a paragraph a turn, with the role before it."""
    return "".join(f"{role}: {text}\n\n" for role, text in chat.turns)


def chat_renderer(tokenizer: Any, tell: Callable[[str], None]) -> Renderer:
    """How a model sees a conversation.

    Args:
        tokenizer: A transformers tokenizer; its chat template is used, if it has one.
        tell: Told where it is not.
    """
    template = getattr(tokenizer, "chat_template", None)
    start = getattr(tokenizer, "bos_token", None)

    def render(chat: Chat) -> str:
        if not template:
            tell("the tokenizer has no chat template: conversations are written as `role: text`")
            return plainly(chat)
        try:
            text = tokenizer.apply_chat_template(chat.messages(), tokenize=False)
        # A template is a program that refuses what it was not made for.
        except Exception as error:
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            tell(f"the model's chat template refuses some conversations, which are written as `role: text`: {reason}")
            return plainly(chat)
        # What begins a text is put before each sequence.
        return text.removeprefix(start) if isinstance(start, str) and start else text

    return render


def document_of(record: object, where: str) -> str | Chat:
    """The text, or the conversation, of a record.

    Args:
        record: A mapping by names of fields.
        where: For messages.

    Raises:
        DataError: it has neither.
    """
    if isinstance(record, Mapping):
        if isinstance(record.get(_TEXT), str):
            return record[_TEXT]
        for name in _CHATS:
            if record.get(name) is not None:
                return Chat(tuple(_turns(record[name], name, where)))
        if isinstance(record.get(_CONTENT), str):
            return record[_CONTENT]
        for asked, answered in _PAIRS:
            if record.get(asked) is not None and record.get(answered) is not None:
                return _pair(record, asked, answered, where)
    names = f"; it has {', '.join(map(str, list(record)[:8]))}" if isinstance(record, Mapping) and record else ""
    raise DataError(f"a record has no `text` field{names}", where=where, fix=_FIX)


def _pair(record: Mapping[str, Any], asked: str, answered: str, where: str) -> Chat:
    turns: list[tuple[str, str]] = []
    for name, role in ((asked, "user"), (answered, "assistant")):
        value = record[name]
        if isinstance(value, str):
            about = record.get(_ABOUT) if name == "instruction" else None
            turns.append((role, f"{value}\n\n{about}" if isinstance(about, str) and about.strip() else value))
        else:
            turns += _turns(value, name, where)
    return Chat(tuple(turns))


def _turns(value: object, field: str, where: str) -> list[tuple[str, str]]:
    """Turns of a list of messages; those without words, as calls of tools, are left out."""
    turns = []
    for message in value if isinstance(value, Sequence) and not isinstance(value, str) else [None]:
        entries = message if isinstance(message, Mapping) else {}
        role, content = entries.get("role") or entries.get("from"), _words(entries)
        if not isinstance(role, str) or content is None:
            raise DataError(
                f"`{field}` of a record is no list of messages",
                where=where,
                fix="a message has a `role` and a `content`, which is text or a list of parts with `text`",
            )
        if content.strip():
            turns.append((_ROLES.get(role, role), content))
    return turns


def _words(message: Mapping[str, Any]) -> str | None:
    """What a message says; nothing, where its ``content`` is null; ``None`` where it makes no sense."""
    content = message.get("content", message.get("value"))
    if content is None:
        return "" if "content" in message or "tool_calls" in message else None
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        return None
    parts = [part if isinstance(part, str) else part.get("text") for part in content if isinstance(part, str | Mapping)]
    return "".join(part for part in parts if isinstance(part, str))
