"""Write the data of the tasks in ``examples/tasks``: which line comes next, and whole texts.

    python examples/make_tasks.py

From the held-out part of the Python standard library's source (PSF licence), which no conversion looks at. The files
are in the repository, so that a result does not depend on the version of Python; this says how they were made.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from latentize.text.documents import documents
from latentize.text.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
TASKS = ROOT / "examples" / "tasks"
# Of the bundled tokenizer: with the end-of-text token before it, a text is one sequence of 256.
TEXT_TOKENS = 255


def questions(count: int, draw: Random) -> list[dict[str, object]]:
    """Twelve lines, and four that may follow: the one that does, and three from elsewhere in the same file."""
    found = []
    for text in documents((), "heldout"):
        lines = text.splitlines()
        usable = [n for n in range(12, len(lines)) if 12 <= len(lines[n].strip()) <= 80 and lines[n].isascii()]
        if len(usable) < 40:
            continue
        for at in draw.sample(usable, 2):
            others = sorted({lines[n] for n in usable if abs(n - at) > 12 and lines[n] != lines[at]})
            choices = [lines[at], *draw.sample(others, 3)]
            draw.shuffle(choices)
            context = "\n".join(lines[at - 12 : at]) + "\n"
            found.append({"context": context, "choices": choices, "answer": choices.index(lines[at])})
    return found[:count]


def texts(count: int) -> list[dict[str, object]]:
    """Stretches of ``TEXT_TOKENS`` tokens, which stay as many when they are tokenised again."""
    tokenizer = load_tokenizer(ROOT / "models" / "tiny-llama-gqa")
    found = []
    for text in documents((), "heldout"):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        piece = tokenizer.decode(ids[512 : 512 + TEXT_TOKENS])
        if tokenizer(piece, add_special_tokens=False)["input_ids"] == ids[512 : 512 + TEXT_TOKENS] and len(ids) > 1024:
            found.append({"text": piece})
    return found[:count]


def main() -> None:
    for name, rows in (("next_line", questions(40, Random(0))), ("text", texts(12))):
        path = TASKS / f"stdlib_{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} examples, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
