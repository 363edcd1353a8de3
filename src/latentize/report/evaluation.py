"""What ``latentize eval`` has found beside one number, drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from latentize.report.chart import line_chart
from latentize.report.html import figure, table

__all__ = ["named", "positions", "probes", "score_cells", "tasks", "tasks_said", "with_error"]

# Nats below which a logarithmic axis would show noise.
_LEAST = 1e-6


def named(evaluation: Mapping[str, Any]) -> str:
    """Which evaluation it is."""
    cache = f", cache {evaluation['cache']}" if evaluation.get("cache") else ""
    window = f", window {evaluation['window']}" if evaluation.get("window") else ""
    return f"eval of {evaluation['at'][:10]}{cache}{window}"


def positions(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """The latest evaluation that knows them: losses by position, near misses, calibration; empty without one."""
    latest = next((e for e in reversed(evaluations) if e.get("by_position")), None)
    if latest is None:
        return ""
    bins = latest["by_position"]
    compared = all(b["reference_loss"] is not None for b in bins)
    names = {"the source": "reference_loss", "this model": "loss"} if compared else {"this model": "loss"}
    losses = {label: [(float(b["to"]), b[key]) for b in bins] for label, key in names.items()}
    options: dict[str, Any] = {"x_label": "tokens of context, at most", "legend_below": True}
    charts = figure(line_chart(losses, title="Nats per token", linear=True, **options))
    if compared:
        far = {"this model": [(float(b["to"]), max(b["kl"], _LEAST)) for b in bins]}
        charts += figure(line_chart(far, title="KL from the source, nats per token", **options))
    said = f"{named(latest)}, {latest['tokens']:,} tokens. {_sentence(latest)}"
    return f'<h2>Where in the context</h2><div class="pair">{charts}</div><p class=dim>{escape(said)}</p>'


def _sentence(found: Mapping[str, Any]) -> str:
    parts = []
    if found.get("top5_agreement") is not None:
        near = f"{found['top5_agreement']:.1%}"
        parts.append(f"The source's most likely token is among this model's five most likely {near} of the time.")
    if found.get("calibration_error") is not None:
        source = found.get("reference_calibration_error")
        beside = "" if source is None else f" (the source: {source:.1%})"
        parts.append(f"How sure it is and how often it is right differ by {found['calibration_error']:.1%}{beside}.")
    return " ".join(parts)


def probes(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """The latest evaluation that has probed long contexts, as a table; empty without one."""
    latest = next((e for e in reversed(evaluations) if e.get("probes")), None)
    if latest is None:
        return ""
    found = latest["probes"]
    compared = all(row["reference_gain"] is not None for row in found["rows"])
    keys = {"score": "score", "gain, nats": "gain"}
    if compared:
        keys = {"score": "score", "the source": "reference_score", "gain, nats": "gain", "lost": "gain_lost"}
    rows = [
        (row["probe"], f"{row['length']:,}", *(with_error(row, key) for key in keys.values())) for row in found["rows"]
    ]
    meaning = "; ".join(f"{name}: {text}" for name, text in _MEANING.items())
    said = (
        f"{named(latest)}, {found['rows'][0]['examples']} examples a row, the answer at depths "
        f"{', '.join(f'{depth:g}' for depth in found['depths'])} of held-out text. {meaning}. Score: the share of the "
        f"answer's tokens that are the most likely ones. Gain: how much likelier the answer is, nats per token, than "
        f"where the text lacks it; lost: of the source's gain. ± is the standard error."
    )
    head = ("probe", "tokens", *keys)
    return f"<h2>Asked for what lies far back</h2>{table(rows, head=head)}<p class=dim>{escape(said)}</p>"


_MEANING = {
    "needle": "one value under one name",
    "needles": "one of four",
    "tracking": "one of two values that are given on from name to name",
    "copy": "a row of words that begins again",
    "recall": "one of eight pairs of words",
}


def tasks(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """The latest evaluation that has run tasks, as a table; empty without one."""
    latest = next((e for e in reversed(evaluations) if e.get("tasks")), None)
    if latest is None:
        return ""
    found = latest["tasks"]
    head, rows = score_cells(found)
    said = f"{named(latest)}, {tasks_said(found)}"
    return f"<h2>Tasks</h2>{table(rows, head=head)}<p class=dim>{escape(said)}</p>"


def score_cells(found: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Scores of tasks with their intervals: names of columns, and the cells of each row."""
    compared = any(row["reference_value"] is not None for row in found["rows"])
    more = {"the source": "reference_", "difference": "difference_"} if compared else {}
    cells = []
    for row in found["rows"]:
        scores = [_score(row["value"], row["low"], row["high"])]
        for name, prefix in more.items():
            value = row["reference_value"] if name == "the source" else row["difference"]
            scores.append(_score(value, row[f"{prefix}low"], row[f"{prefix}high"], signed=name == "difference"))
        better = {True: " ↑", False: " ↓"}.get(row["higher_is_better"], "")
        cells.append((row["task"], row["metric"] + better, f"{row['examples']:,}", *scores))
    return ("task", "metric", "examples", "this model", *more), cells


def _score(value: float, low: float | None, high: float | None, *, signed: bool = False) -> str:
    form = "+.4f" if signed else ".4f"
    return f"{value:{form}}" + ("" if low is None or high is None else f" [{low:{form}}, {high:{form}}]")


def tasks_said(found: Mapping[str, Any]) -> str:
    """How to read scores of tasks."""
    limit = "" if found["limit"] is None else f", the first {found['limit']:,} examples of each"
    return (
        f"lm-eval {found['lm_eval']}{limit}. In brackets: 95 % intervals, 1.96 standard errors to either side, or from "
        f"{found['draws']:,} draws of the examples where the score is no mean. Difference: this model's minus the "
        f"source's, its interval from both models' results on each example; ↑ more is better, ↓ less."
    )


def with_error(row: Mapping[str, Any], key: str) -> str:
    """A mean with its standard error."""
    form, error = (".1%" if key.endswith("score") else ".2f"), row[f"{key}_error"]
    return f"{row[key]:{form}}" + ("" if error is None else f" ± {error:{form}}")
