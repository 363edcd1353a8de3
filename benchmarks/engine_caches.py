"""What caches of engines cost a converted model, with rows suited to them (``convert --cache-for``) and without.

    python benchmarks/engine_caches.py plain=out suited=out-q4_0 --report raw-test.txt --tokens 8192
    python benchmarks/engine_caches.py source=model.gguf --report raw-test.txt    # of keys and values as they are
    python benchmarks/engine_caches.py --print

Each model against itself with a cache in float32, in the same engine: llama.cpp with its own q8_0 and q4_0, and fp8 as
vLLM stores it (e4m3 without a scale) by the same rounding in PyTorch. ``make engines ENGINE=llama.cpp`` makes the
engine. Writes ``benchmarks/results/engine-caches.json`` and prints Markdown.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

import latentize
from latentize.engines.run import run_engine
from latentize.modeling.load import load_model
from latentize.text.documents import documents
from latentize.text.tokenizer import load_tokenizer
from latentize.text.tokens import pack

ROOT = Path(__file__).resolve().parents[1]
CACHES = ("f16", "q8_0", "q4_0")


class _Float8Layer(DynamicLayer):
    """Gives everything back as it comes out of e4m3, as an engine reads it."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # What is too large becomes the largest, as vLLM has it, not NaN.
        halves = [x.float().clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) for x in (key_states, value_states)]
        return super().update(*halves, *args, **kwargs)


@torch.no_grad()
def in_fp8(folder: Path, prompts: list[list[int]]) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of each prompt with a cache in float32, and in fp8."""
    model = load_model(folder, dtype=torch.float32)
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for ids in prompts:
        for kept, layer in zip(found, (DynamicLayer, _Float8Layer), strict=True):
            cache = Cache(layers=[layer() for _ in range(model.config.num_hidden_layers)])
            kept.append(model(torch.tensor([ids]), past_key_values=cache).logits[0])
    return found


def lost(prompts: list[list[int]], exact: list[Tensor], made: list[Tensor]) -> dict[str, float]:
    """Nats per token: divergence, and how much less likely the text has become."""
    divergence = excess = 0.0
    count = 0
    for ids, exact_TV, made_TV in zip(prompts, exact, made, strict=True):
        log_p, log_q = (t.float().log_softmax(-1) for t in (exact_TV, made_TV))
        divergence += float((log_p.exp() * (log_p - log_q)).sum())
        said_T1 = torch.tensor(ids[1:])[:, None]
        excess += float((log_p[:-1].gather(1, said_T1) - log_q[:-1].gather(1, said_T1)).sum())
        count += len(ids)
    return {"kl": divergence / count, "excess": excess / (count - len(prompts))}


def measured(name: str, model: Path, prompts: list[list[int]], environment: Path | None) -> list[dict[str, Any]]:
    facts: dict[str, Any] = {"name": name, "cache_for": None, "date": datetime.date.today().isoformat()}
    if model.suffix == ".gguf":
        return list(in_llama_cpp(facts, model, prompts, environment, (*CACHES, "q5_1")))
    report = json.loads((model / "latentize.json").read_text())["measurements"]
    facts |= {size: report.get(size) for size in ("cache_for", "kv_lora_rank", "qk_rope_head_dim")}
    rows = [{**facts, "cache": "fp8", "engine": "PyTorch", **lost(prompts, *in_fp8(model, prompts))}]
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "model.gguf"
        latentize.export(model, file, kind="f32")
        return [*rows, *in_llama_cpp(facts, file, prompts, environment, CACHES)]


def in_llama_cpp(
    facts: dict[str, Any], file: Path, prompts: list[list[int]], environment: Path | None, caches: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """A row for each type of llama.cpp's cache."""

    def asked(cache: str) -> Any:
        return run_engine("llama.cpp", file, prompts, new_tokens=0, cache=cache, environment=environment)

    exact = asked("f32")
    for cache in caches:
        found = asked(cache)
        logits = [[torch.from_numpy(t) for t in answers.logits_TV] for answers in (exact, found)]
        engine = " ".join(f"{k} {v}" for k, v in found.versions.items())
        row = {**facts, "cache": cache, "engine": engine, **lost(prompts, *logits)}
        print(row, flush=True)
        yield row


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| model | sizes | rows suited to | engine | cache | KL, nats | excess, nats |"]
    lines.append("| -- | -- | -- | -- | -- | -- | -- |")
    for r in rows:
        sizes = f"{r['kv_lora_rank']} + {r['qk_rope_head_dim']}" if "kv_lora_rank" in r else "keys and values"
        cells = [r["name"], sizes, r["cache_for"] or "none", r["engine"]]
        lines.append("| " + " | ".join([*cells, r["cache"], f"{r['kl']:.5f}", f"{r['excess']:+.5f}"]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="NAME=MODEL", help="a portable folder, or a source's GGUF file")
    parser.add_argument("--report", type=Path, help="a text file")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--length", type=int, default=2048, help="of a context")
    parser.add_argument("--environment", type=Path, help="a virtual environment with llama-cpp-python")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--print", action="store_true", help="measure nothing")
    args = parser.parse_args()
    path = args.out / "engine-caches.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for model in [] if args.print else args.models:
        name, _, folder = model.partition("=")
        text = documents((str(args.report),), "all")
        tokens_NT = pack(load_tokenizer(Path(folder)), text, tokens=args.tokens, sequence_length=args.length)
        found = measured(name, Path(folder), tokens_NT.tolist(), args.environment)
        rows = [row for row in rows if row["name"] != name] + found
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps({"text": args.report.name, "tokens": args.tokens, "length": args.length, "rows": rows}, indent=2)
            + "\n"
        )
    print(markdown(rows))


if __name__ == "__main__":
    main()
