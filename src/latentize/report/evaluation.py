"""What ``latentize eval`` has found beside one number, drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from latentize.report.chart import line_chart
from latentize.report.html import figure, table

__all__ = ["named", "positions", "probes", "with_error"]

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


def with_error(row: Mapping[str, Any], key: str) -> str:
    """A mean with its standard error."""
    form, error = (".1%" if key.endswith("score") else ".2f"), row[f"{key}_error"]
    return f"{row[key]:{form}}" + ("" if error is None else f" ± {error:{form}}")
