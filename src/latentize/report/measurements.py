"""What was measured of an output after it was made: one JSON object a line, never rewritten."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentize.checkpoint import MANIFEST_NAME
from latentize.checkpoint.places import append_line, require_file
from latentize.errors import CheckpointError

__all__ = ["MEASUREMENTS_NAME", "cached_rows", "calibration_text", "is_output", "measured", "record", "require_record"]

MEASUREMENTS_NAME = "measurements.jsonl"
# Entries that count calibration tokens of a kind, and what that is.
_KINDS = {
    "self_generated_tokens": "written by the model itself",
    "restyled_tokens": "in other styles",
    "repeated_tokens": "where a passage is read twice",
}


def is_output(folder: Path) -> bool:
    """Whether latentize has written it."""
    # ``os.path`` says no to names that are too long; ``pathlib`` raises.
    return os.path.isfile(folder / MANIFEST_NAME)


def record(folder: Path, kind: str, result: dict[str, Any]) -> None:
    """Append what a command found.

    Args:
        folder: An output of latentize.
        kind: ``eval``, ``bench``, ``sample`` or ``heal``.
        result: What the command prints.

    Raises:
        OutputError: it cannot be written.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    append_line(folder / MEASUREMENTS_NAME, json.dumps({"kind": kind, "at": now, "result": result}))


def require_record(folder: Path) -> None:
    """That :func:`record` can write, and that what it wrote before can be read.

    Raises:
        OutputError: the folder, or the file in it, cannot be written.
        CheckpointError: a line is damaged.
    """
    require_file(folder / MEASUREMENTS_NAME)
    measured(folder)


def calibration_text(entries: Mapping[str, Any]) -> str:
    """What a conversion learnt from, in words; ``entries`` are its measurements."""
    told = f"{entries['calibration_tokens']:,} tokens of {entries['calibration_text']}"
    of_them = " of them"
    for name, what in _KINDS.items():
        if tokens := entries.get(name, 0):
            told += f", {tokens:,}{of_them} {what}"
            of_them = ""
    return told


def measured(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """All that was recorded, by kind, oldest first.

    Raises:
        CheckpointError: a line is not what :func:`record` writes.
    """
    path, found = folder / MEASUREMENTS_NAME, {}
    if not path.is_file():
        return {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise CheckpointError(f"it cannot be read: {error.strerror}", code="LZ118", where=str(path)) from error
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            found.setdefault(entry["kind"], []).append({"at": entry["at"], **entry["result"]})
        except (ValueError, KeyError, TypeError, RecursionError):
            raise CheckpointError(
                "a line is damaged", code="LZ118", where=f"{path}, line {number}", fix="remove the line, or the file"
            ) from None
    return found


def cached_rows(report: Mapping[str, Any]) -> dict[str, str]:
    """What cached rows take in codes, or what cache they are suited to, under its name; nothing if a conversion did
    neither."""
    if "cache_for" in report:
        return {"rows suited to": f"a cache in {report['cache_for']}"}
    if report.get("bytes") is None:
        return {}
    row = f"{report['row_bytes_per_token_layer']:.1f} of {2 * report['source_cache_values_per_token_layer']}"
    return {"bytes of a cached token and layer": f"{row}; {report['bytes']:.2%} of all, exact tokens included"}
