"""Tables of what was measured, in Markdown."""

from __future__ import annotations

from collections import Counter
from typing import Any

__all__ = ["markdown"]


def markdown(result: dict[str, Any]) -> str:
    lines = [f"{result['machine']['device']}, {result['machine']['date']}", ""]
    lines += _checks("kernel", result["correctness"]) + _checks("graph", result["graphs"])
    if result["copy_bytes_per_second"]:
        lines.append(f"A copy reads and writes {result['copy_bytes_per_second'] / 1e12:.2f} TB/s.")
    if result["layer"]:
        lines += ["", f"One layer, {result['sizes']}:", "", *_table(result["layer"], "rows")]
    if result["model"]:
        lines += ["", "A whole model, one CUDA graph a step:", "", *_table(result["model"], "context")]
    if result["conversion"]:
        lines += ["", _conversion(result["conversion"])]
    return "\n".join(lines)


def _checks(what: str, rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    worst: dict[str, float] = {}
    for row in rows:
        kind = row.get("dtype", "torch.float32")
        worst[kind] = max(worst.get(kind, 0.0), row["error"])
    counted, errors = Counter(row["right"] for row in rows), ", ".join(f"{k} {v:.1e}" for k, v in worst.items())
    return [f"{counted[True]} of {len(rows)} {what} checks right; largest errors: {errors}"]


def _table(rows: list[dict[str, Any]], size: str) -> list[str]:
    lines = [f"| | B × {size} | µs | cache, MB | of a copy's bandwidth | error |", "|---|---|---|---|---|---|"]
    for row in rows:
        start = f"| {row['name']} | {row['batch']} × {row[size]:,} |"
        if "trouble" in row:
            lines.append(f"{start} not measured: {row['trouble'].splitlines()[0][:80]} | | | |")
            continue
        took = f"{1e3 * row['milliseconds']:.1f}" if "milliseconds" in row else "not timed"
        share = f"{row['share_of_copy']:.0%}" if "share_of_copy" in row else ""
        error = f"{row['error']:.1e}" if "error" in row else ""
        lines.append(f"{start} {took} | {row['cache_bytes'] / 1e6:,.1f} | {share} | {error} |")
    return lines


def _conversion(row: dict[str, Any]) -> str:
    if "trouble" in row:
        return f"Conversion not measured: {row['trouble']}"
    (first, second) = row["layers"]
    if "seconds" not in row:
        return f"Converted at a tiny size, {first} and {second} layers; not timed."
    a, b = row["seconds"]
    return (
        f"Conversion: {a:.0f} s for {first} layers, {b:.0f} s for {second}; {row['seconds_a_layer']:.1f} s a layer, "
        f"so {row['seconds_of_32_layers_computed'] / 60:.1f} minutes for 32 (computed, not run)."
    )
