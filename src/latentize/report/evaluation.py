"""What ``latentize eval`` has found beside one number, drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from latentize.report.chart import line_chart
from latentize.report.html import figure

__all__ = ["positions"]

# Nats below which a logarithmic axis would show noise.
_LEAST = 1e-6


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
        far = {"KL from the source": [(float(b["to"]), max(b["kl"], _LEAST)) for b in bins]}
        charts += figure(line_chart(far, title="Nats per token from the source", **options))
    cache = f", cache {latest['cache']}" if latest.get("cache") else ""
    said = f"eval of {latest['at'][:10]}{cache}, {latest['tokens']:,} tokens. {_sentence(latest)}"
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
