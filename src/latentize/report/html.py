"""Pieces of a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["figure", "table"]


def table(rows: Iterable[Sequence[object]], head: Sequence[str] = ()) -> str:
    """A table with a head, or one of names and values."""
    top = "<tr>" + "".join(f"<th>{escape(str(cell))}</th>" for cell in head) + "</tr>" if head else ""
    lines = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    kind = "" if head else ' class="keys"'
    return f'<div class="scroll"><table{kind}>{top}{lines}</table></div>'


def figure(svg: str, caption: str = "", *, wide: bool = False) -> str:
    """A chart with what to say of it."""
    kind = ' class="wide"' if wide else ""
    return f"<figure{kind}>{svg}" + (f"<figcaption>{escape(caption)}</figcaption>" if caption else "") + "</figure>"
