"""Write the support matrix of docs/families.md from what the tests of every family have found.

LATENTIZE_FAMILY_RESULTS=benchmarks/results/families.json python -m pytest tests/integration/test_every_family.py
python benchmarks/family_table.py             # --check: only say whether it is up to date
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from latentize.families import families

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "families.json"
_BEGIN, _END = "<!-- families:begin -->", "<!-- families:end -->"
_KEPT = {
    "sliding_attention": "layers with a sliding window",
    "chunked_attention": "layers that attend in chunks",
    "conv": "convolutions",
    "linear_attention": "DeltaNet layers",
}


def _portable(entry: dict[str, Any]) -> str:
    if entry["format"] == "deepseek_v3":
        return f"yes{_fitted(entry['notes'])}"
    if "deepseek_v2" in entry:
        return f"as `deepseek_v2`{_fitted(entry['deepseek_v2'])}"
    reason = next(note for note in entry["notes"] if note.startswith("native format, because "))
    return f"no: {reason.removeprefix('native format, because ')}"


def _fitted(notes: list[str]) -> str:
    fitted = [note.split(" is ")[0].split(" are ")[0] for note in notes if "(approximate)" in note]
    return f", {' and '.join(fitted)} fitted linearly" if fitted else ""


def table(made: dict[str, Any]) -> str:
    """A row for each family: what it is, the error of the native format at full rank, and the portable format."""
    lines = [
        "| family | `model_type` | native at full rank, largest relative error of a logit | portable (`deepseek_v3`) |",
        "|---|---|---|---|",
    ]
    for name, entry in made["families"].items():
        kept = "".join(f"; {_KEPT[kind]} stay as they are" for kind in dict.fromkeys(entry["kept"]))
        lines.append(
            f"| {families()[name].about} | `{name}` | {entry['native_error']:.0e}{kept} | {_portable(entry)} |"
        )
    return "\n".join(lines)


def main() -> int:
    page = ROOT / "docs" / "families.md"
    text = page.read_text()
    before, _, rest = text.partition(_BEGIN)
    wanted = f"{before}{_BEGIN}\n{table(json.loads(RESULTS.read_text()))}\n{_END}{rest.partition(_END)[2]}"
    if "--check" in sys.argv:
        print("up to date" if wanted == text else "not up to date; run python benchmarks/family_table.py")
        return int(wanted != text)
    page.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
