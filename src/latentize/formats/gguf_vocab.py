"""A BPE tokenizer as GGUF stores it, byte-level or SentencePiece's.

llama.cpp knows no pre-tokenizer by its rules, only by a name; the rules are in its sources. So the rules of
``tokenizer.json`` have to be the ones that it keeps under some name; where they are not, text would silently be cut
into other tokens than the model has learnt.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentize.errors import FormatError
from latentize.formats.gguf_pieces import Pieces, is_sentencepiece, pieces

__all__ = ["NORMAL", "Vocab", "pre_tokenizer_name", "read_vocab"]

# Token types of GGUF.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# (Pattern of the Split step, or what is in its place; ignore_merges) → name. Read in llama-vocab.cpp of llama.cpp.
_NAMES: dict[tuple[str, bool], str] = {
    ("", False): "gpt-2",
    ("digits", False): "smollm",
    (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}", True): "llama-bpe",
    (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}", False): "qwen2",
}


@dataclass(frozen=True)
class Vocab:
    """What a GGUF file says of its tokenizer.

    Attributes:
        pre: llama.cpp's name of the pre-tokenizer.
        tokens: By id, as many as the model has embeddings.
        types: GGUF's type of each.
        merges: Two pieces with a space between, in the order of their rank.
        scores: Of each token, where SentencePiece's take the place of merges.
        space_prefix: Of those: whether a text begins with a space that it has not.
        special: ``bos``, ``eos``, ``eot``, ``eom``, ``unk``, ``pad`` → id, where there is one; at ``eos``, ``eot`` and
            ``eom`` a text ends.
        add_bos: Whether texts begin with the bos token.
        chat_template: Jinja, if there is one; the default one of several.
        named_templates: Others by name, of letters, digits and ``_``.
        notes: What llama.cpp does differently.
    """

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: dict[str, int]
    add_bos: bool
    chat_template: str | None = None
    named_templates: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    scores: list[float] | None = None
    space_prefix: bool = False

    @property
    def model(self) -> str:
        """What llama.cpp calls the way in which text is cut."""
        return "gpt2" if self.scores is None else "llama"


def _refuse(what: str, folder: Path, fix: str) -> FormatError:
    return FormatError(f"llama.cpp cannot hold the tokenizer: {what}", where=str(folder / "tokenizer.json"), fix=fix)


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    return pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]


def _rule(steps: list[dict[str, Any]]) -> str | None:
    """The rule before byte-level encoding: a pattern, ``"digits"`` or nothing; ``None`` if it is none of these."""
    *before, last = steps or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if not before:
        return "" if last.get("use_regex", True) else None
    if len(before) > 1:
        return None
    step = before[0]
    if step["type"] == "Digits" and step.get("individual_digits") and last.get("use_regex", True):
        return "digits"
    isolated = step["type"] == "Split" and step.get("behavior") == "Isolated" and not step.get("invert")
    return step["pattern"].get("Regex") if isolated and not last.get("use_regex", True) else None


def pre_tokenizer_name(tokenizer: dict[str, Any]) -> str | None:
    """llama.cpp's name of the rules of a ``tokenizer.json``; ``None`` if it has none."""
    rule = _rule(_steps(tokenizer.get("pre_tokenizer")))
    return None if rule is None else _NAMES.get((rule, bool(tokenizer["model"].get("ignore_merges"))))


def _check_model(tokenizer: dict[str, Any], folder: Path) -> None:
    model, steps = tokenizer["model"], _steps(tokenizer.get("pre_tokenizer"))
    kind = model.get("type")
    if kind != "BPE" or not (is_sentencepiece(tokenizer) or any(s["type"] == "ByteLevel" for s in steps)):
        raise _refuse(
            f"it is no BPE of bytes, and none of SentencePiece ({kind})",
            folder,
            "put the original's tokenizer.model into the folder and use convert_hf_to_gguf.py of llama.cpp",
        )
    if not model["merges"]:
        raise _refuse("it merges nothing, and llama.cpp wants merges", folder, "use a tokenizer that was trained")


def _sentencepiece(entries: dict[str, Any], count: int, folder: Path) -> Pieces | None:
    """What is to be said of pieces, where a tokenizer has them.

    Raises:
        FormatError: llama.cpp would cut text in another way.
    """
    if not is_sentencepiece(entries):
        return None
    found = pieces(entries, count)
    if isinstance(found, str):
        raise _refuse(found, folder, "use the model's own tokenizer, or convert_hf_to_gguf.py of llama.cpp")
    return found


def _special_ids(tokenizer: Any) -> dict[str, int]:
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unk_token_id", "pad": "pad_token_id"}
    found = {name: getattr(tokenizer, attribute) for name, attribute in names.items()}
    return {name: number for name, number in found.items() if number is not None}


def _ends(folder: Path, special: dict[str, int], count: int) -> tuple[dict[str, int], list[str]]:
    """Tokens that end a text beside the tokenizer's own: ids by GGUF's names, and what it has no name for."""
    ids: list[Any] = []
    for name in ("generation_config.json", "config.json"):
        try:
            entries = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        stated = entries.get("eos_token_id") if isinstance(entries, dict) else None
        ids += stated if isinstance(stated, list) else [stated]
    known = [i for i in ids if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < count]
    names = [name for name in ("eos", "eot", "eom") if name not in special]
    more = [i for i in dict.fromkeys(known) if i != special.get("eos")]
    notes = (
        [] if len(more) <= len(names) else [f"a GGUF file has no place for more ends of a text: {more[len(names) :]}"]
    )
    return dict(zip(names, more, strict=False)), notes


def _templates(tokenizer: Any) -> tuple[str | None, dict[str, str], list[str]]:
    """The default chat template, others by GGUF's name, and what is left out, in sentences."""
    stated = tokenizer.chat_template
    templates = stated if isinstance(stated, dict) else {"default": stated}
    default, named, notes = None, {}, []
    for name, template in templates.items():
        # As llama.cpp's converter names them.
        short = "".join(c if c.isascii() and c.isalnum() else "_" for c in str(name))
        if not isinstance(template, str) or not short:
            continue
        if not _is_text(template) or short in named:
            notes.append(f"the chat template '{name}' is left out: another has its name, or it is not UTF-8")
        elif name == "default":
            default = template
        else:
            named[short] = template
    return default, named, notes


def _is_text(text: str) -> bool:
    return text == text.encode("utf-8", "replace").decode("utf-8")


def _tokens(tokenizer: Any, entries: dict[str, Any], count: int, folder: Path) -> tuple[list[str], list[int]]:
    """Tokens and their types by id; ids that the tokenizer does not use are padding."""
    tokens, types = [f"[PAD{number}]" for number in range(count)], [UNUSED] * count
    added = {entry["id"]: entry for entry in entries["added_tokens"]}
    for token, number in tokenizer.get_vocab().items():
        if number >= count:
            raise _refuse(
                f"token {number} of it has no embedding, there are {count}", folder, "use the model's own tokenizer"
            )
        tokens[number] = token
        types[number] = NORMAL if number not in added else CONTROL if added[number]["special"] else USER_DEFINED
    return tokens, types


def read_vocab(folder: Path, vocab_size: int) -> Vocab:
    """The tokenizer of a folder.

    Args:
        folder: Of the model; has ``tokenizer.json``.
        vocab_size: Rows of the embedding.

    Raises:
        FormatError: llama.cpp has no tokenizer that would cut text in the same way.
        CheckpointError: there is no tokenizer, or it is damaged.
    """
    from latentize.text.tokenizer import load_tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise _refuse("there is no tokenizer.json", folder, "put the model's own tokenizer.json into the folder")
    tokenizer, entries = load_tokenizer(folder), json.loads(path.read_text(encoding="utf-8"))
    _check_model(entries, folder)
    tokens, types = _tokens(tokenizer, entries, vocab_size, folder)
    extra = _sentencepiece(entries, vocab_size, folder)
    # Its pieces have no rules before them.
    name = pre_tokenizer_name(entries) if extra is None else "default"
    if name is None:
        raise _refuse(
            "llama.cpp has no name for its pre-tokenizer that we know",
            folder,
            f"known are {', '.join(sorted(_NAMES.values()))}; convert_hf_to_gguf.py of llama.cpp may know more",
        )
    merges = entries["model"]["merges"] if extra is None else []
    pairs = [m.split(" ") if isinstance(m, str) else m for m in merges]
    normalizer = entries.get("normalizer")
    notes = [] if extra is None else list(extra.notes)
    for number, kind in ({} if extra is None else extra.types).items():
        types[number] = kind
    if normalizer is not None and extra is None:
        notes.append(
            f"llama.cpp skips the tokenizer's normalizer ({normalizer['type']}): unusual Unicode is cut otherwise"
        )
    special = _special_ids(tokenizer)
    ends, left = _ends(folder, special, vocab_size)
    default, named, unnamed = _templates(tokenizer)
    notes += [*left, *unnamed]
    first = tokenizer("a")["input_ids"][0]
    return Vocab(
        pre=name,
        tokens=tokens,
        types=types,
        merges=[f"{left} {right}" for left, right in pairs],
        special={**special, **ends},
        add_bos=tokenizer.bos_token_id is not None and first == tokenizer.bos_token_id,
        chat_template=default,
        named_templates=named,
        notes=notes,
        scores=None if extra is None else extra.scores,
        space_prefix=extra is not None and extra.space_prefix,
    )
