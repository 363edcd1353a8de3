"""The report of an output: made, and added to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentize.api.using import generate
from latentize.checkpoint import Manifest
from latentize.paths import expanded
from latentize.report.measurements import is_output, record, require_record
from latentize.report.page import require_report as require_report_of
from latentize.report.page import verdict, write_report
from latentize.text.documents import documents

__all__ = ["extend_report", "report", "require_report"]


def require_report(model: str | Path) -> None:
    """That what will be measured of an output of latentize can be added to its report; before it is measured.

    Args:
        model: What is to be measured; of what is no output of latentize nothing is kept.

    Raises:
        OutputError: the folder cannot be written.
        CheckpointError: what the folder says of itself is damaged.
    """
    folder = Path(model)
    if is_output(folder):
        require_record(folder)
        require_report_of(folder)


def extend_report(model: str | Path, kind: str, result: dict[str, Any]) -> Path | None:
    """Add what was measured to the report of an output of latentize; of any other model nothing is kept.

    Args:
        model: What was measured.
        kind: ``eval``, ``bench`` or ``sample``.
        result: What was found.

    Returns:
        The report, or ``None`` where there is none.

    Raises:
        OutputError: the folder cannot be written; what was measured is to be printed before.
        CheckpointError: what the folder says of itself is damaged.
    """
    folder = expanded(model)
    if not is_output(folder):
        return None
    record(folder, kind, result)
    return write_report(folder)


def report(
    out: str | Path, reference: str | Path | None = None, *, prompt: str = "", tokens: int = 64
) -> dict[str, Any]:
    """What ``latentize report --json`` prints; writes ``report.html``.

    Args:
        out: An output of latentize.
        reference: Its source: then both continue a prompt, side by side.
        prompt: What to continue; by default the beginning of a held-out document.
        tokens: How long.

    Raises:
        CheckpointError: the folder is not an output of latentize.
        OutputError: the folder cannot be written.
    """
    folder = expanded(out)
    if is_output(folder):
        require_record(folder)
    path = write_report(folder)
    if reference is not None:
        prompt = prompt or " ".join(next(iter(documents((), "heldout"))).split(" ")[:24])
        made = {
            name: generate(model, prompt, max_new_tokens=tokens)["text"]
            for name, model in (("source", reference), ("converted", folder))
        }
        path = extend_report(folder, "sample", {"prompt": prompt, **made}) or path
    short, long = verdict(Manifest.load(folder).measurements["excess_loss"])
    return {"report": str(path), "bytes": path.stat().st_size, "verdict": short, "meaning": long}
