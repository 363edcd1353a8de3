"""What each part of the calibrated method is worth: one removed at a time.

    python benchmarks/ablation.py [--model DIR] [--keep 25%] [--effort 1] [--only NAME ...]

With less effort all rows take that share of the steps of refinement and polish; compare rows of one effort only.
Every row is a whole conversion with one part replaced by the simplest thing that could stand there, written to disk
and measured by ``latentize eval`` on held-out text. Parts are replaced from outside, so that the library does not
carry switches that nobody should use. Writes ``benchmarks/results/ablation-<model>.json`` and prints Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

import latentize
from latentize.conversion import draft, latent, search
from latentize.conversion import texts as text
from latentize.methods import calibrated, position
from latentize.methods.mha2mla import joint_svd
from latentize.methods.transmla import rorope
from latentize.modeling.precision import Use
from latentize.text import drawing
from latentize.training import descent, polish, refine

ROOT = Path(__file__).resolve().parents[1]
Part = Callable[[], AbstractContextManager[Any]]


def whole() -> AbstractContextManager[Any]:
    return contextlib.nullcontext()


def roped_as_transmla() -> AbstractContextManager[Any]:
    """RoRoPE: every ``(d / R)``-th frequency, real principal components of neighbouring ones."""

    def split(_: Any, w: Any, spec: Any, stats: Any, setting: Any) -> Any:
        size = setting.qk_rope_head_dim
        return rorope(w, spec, stats, rope_dim=size, freqfold=spec.head_dim // size)

    stack = contextlib.ExitStack()
    stack.enter_context(patch.object(calibrated.Calibrated, "split", split))
    # Its ladder, and only sizes that divide a head, as it needs them.
    stack.enter_context(patch.object(calibrated, "_STRIDES", tuple(float(2**n) for n in range(8))))
    stack.enter_context(patch.object(calibrated, "_ROPE_SHARES", (0.25, 0.5, 1.0)))
    stack.enter_context(patch.object(search, "likely_ladders", lambda source, candidates, *_: _widest(candidates)))
    return stack


def _widest(candidates: list[Any]) -> list[Any]:
    by_size: dict[int, Any] = {}
    for setting in candidates:
        by_size[setting.qk_rope_head_dim] = max(
            setting, by_size.get(setting.qk_rope_head_dim, setting), key=lambda s: s.stride
        )
    return list(by_size.values())


def uniform_distances() -> AbstractContextManager[Any]:
    original = position.key_components

    def components(w: Any, spec: Any, stats: Any) -> Any:
        flat_HT = torch.ones_like(stats.distances_HT)
        return original(w, spec, replace(stats, distances_HT=flat_HT / flat_HT.sum(1, keepdim=True)))

    return patch.object(calibrated, "key_components", components)


def no_constants() -> AbstractContextManager[Any]:
    original = position.position_aware_split

    def split(w: Any, spec: Any, c: Any, *rest: Any) -> Any:
        return original(w, spec, replace(c, rho_HF=torch.ones_like(c.rho_HF)), *rest)

    return patch.object(calibrated, "position_aware_split", split)


def first_frequencies() -> AbstractContextManager[Any]:
    return patch.object(search, "likely_ladders", lambda _, candidates, *__: [s for s in candidates if s.stride == 1.0])


def best_ladders() -> AbstractContextManager[Any]:
    """Of each size only the ladder that is best in closed form goes on."""
    original = search._finalists

    def finalists(*scored: Any) -> list[Any]:
        found: dict[tuple[int, int], Any] = {}
        for setting in original(*scored):
            found.setdefault((setting.kv_lora_rank, setting.qk_rope_head_dim), setting)
        return list(found.values())

    return patch.object(search, "_finalists", finalists)


def one_size() -> AbstractContextManager[Any]:
    return patch.object(calibrated, "_ROPE_SHARES", (0.5,))


def sizes_by_closed_form() -> AbstractContextManager[Any]:
    original = search.choose_by_layers

    def choose(source: Any, candidates: Any, calibration: Any, selection: Any, refines: bool, *rest: Any) -> Any:
        return original(source, candidates, calibration, selection, False, *rest)

    return patch.object(latent, "choose_by_layers", choose)


def svd_of_weights() -> AbstractContextManager[Any]:
    """No statistics in the low-rank step."""
    return patch.object(calibrated, "balanced_pca", lambda k, v, stats, rank: joint_svd(k, v, rank))


def no_refinement() -> AbstractContextManager[Any]:
    # No steps, not none at all: polish then still finds every head with its own up-projections.
    original = latent.effort_of

    def effort(*args: Any, **options: Any) -> Any:
        found = original(*args, **options)
        return replace(found, refinement=replace(found.refinement, steps=0))

    return patch.object(latent, "effort_of", effort)


def no_polish() -> AbstractContextManager[Any]:
    original = latent.effort_of
    return patch.object(latent, "effort_of", lambda *args, **options: replace(original(*args, **options), polish=None))


def sources_inputs() -> AbstractContextManager[Any]:
    """Each layer learns on the source's inputs to give the source's outputs."""

    def advance(self: draft.Draft, layer: Any, _: nn.Module) -> None:
        layer.run(self.text, use=Use.MEASURED if self.refinement is None else Use.LEARNT)

    return patch.object(draft.Draft, "advance", advance)


def adam() -> AbstractContextManager[Any]:
    """Adam everywhere, as in wide models."""
    stack = contextlib.ExitStack()
    for module in (refine, polish):
        stack.enter_context(patch.object(module, "descent", descent.Adam))
    return stack


def whole_errors() -> AbstractContextManager[Any]:
    """Errors of the whole residual stream, whatever the sizes of its tokens."""

    def energy(source_NTD: Any, _: Any) -> Any:
        return source_NTD.square().sum(-1).mean().expand(source_NTD.shape[:2])

    return patch.object(draft, "token_energy", energy)


def one_rate() -> AbstractContextManager[Any]:
    """One rate for all layers, that of a model whose closed form is at an error of 0.14."""
    original = refine.descent

    def steps(parameters: Any, schedule: Any, **options: Any) -> Any:
        return original(parameters, replace(schedule, rate=0.045), **options)

    return patch.object(refine, "descent", steps)


def one_passage() -> AbstractContextManager[Any]:
    """Calibration text as one long passage instead of from all over the documents."""
    original = drawing.pack

    def passage(tokenizer: Any, documents: Iterator[str], **options: Any) -> Any:
        return original(tokenizer, documents, **{**options, "pool": 4 * options["tokens"]})

    return patch.object(drawing, "pack", passage)


def without(share: str) -> Part:
    """None of a kind of calibration text."""
    return lambda: patch.object(text, share, 0.0)


PARTS: dict[str, Part] = {
    "nothing (the default)": whole,
    "position-aware selection: RoRoPE's instead": roped_as_transmla,
    "attended distances: uniform ones": uniform_distances,
    "constants ρ: left at one": no_constants,
    "choice of the ladder: the first frequencies": first_frequencies,
    "the widest ladder beside the best": best_ladders,
    "choice of sizes: half a head is roped": one_size,
    "refinement in that choice": sizes_by_closed_form,
    "statistics of the low-rank step": svd_of_weights,
    "refinement": no_refinement,
    "the converted prefix: the source's inputs": sources_inputs,
    "errors relative to each token: to all of the stream": whole_errors,
    "steps by what is to be repaired: one rate": one_rate,
    "polish": no_polish,
    "Muon: Adam": adam,
    "text from all over: one passage": one_passage,
    "text of the model's own": without("_SELF_GENERATED"),
    "text in other styles": without("_RESTYLED"),
    "passages that are read twice": without("_REPEATED"),
}


def with_effort(share: float) -> AbstractContextManager[Any]:
    """All training with a share of its steps."""
    original = latent.effort_of

    def effort(*args: Any, **options: Any) -> Any:
        found = original(*args, **options)
        parts = {name: getattr(found, name) for name in ("refinement", "polish")}
        return replace(found, **{n: p and replace(p, steps=max(1, round(share * p.steps))) for n, p in parts.items()})

    return patch.object(latent, "effort_of", effort)


def measure(model: Path, name: str, keep: str, tokens: int, effort: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        with with_effort(effort), PARTS[name]():
            made = latentize.convert(model, out, keep=keep)
        found = latentize.evaluate(out, model, tokens=tokens)
        sha256 = json.loads((out / "latentize.json").read_text())["files"]["model.safetensors"]
    facts = {"setting": made["setting"], "seconds": made["seconds"], "threads": torch.get_num_threads()}
    return {"without": name, "keep": keep, "effort": effort, **facts, "weights_sha256": sha256, **found}


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| without | sizes, stride | excess, nats | KL, nats | same top-1 |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        s = r["setting"]
        lines.append(
            f"| {r['without']} | {s['kv_lora_rank']} + {s['qk_rope_head_dim']}, {s['stride']:g} "
            f"| {r['excess_loss']:.4f} | {r['kl']:.4f} | {r['top1_agreement']:.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "tiny-llama-gqa")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--keep", default="25%")
    parser.add_argument("--effort", type=float, default=1.0, help="share of the steps of all training")
    parser.add_argument("--tokens", type=int, default=32_768, help="held-out tokens")
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS), metavar="NAME")
    args = parser.parse_args()
    path = args.out / f"ablation-{args.model.name}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for name in args.only:
        new = {
            **measure(args.model, name, args.keep, args.tokens, args.effort),
            "date": datetime.date.today().isoformat(),
        }
        print(json.dumps(new), flush=True)
        rows = [r for r in rows if (r["without"], r["keep"], r["effort"]) != (name, args.keep, args.effort)] + [new]
        rows.sort(key=lambda r: (r["keep"], -r["effort"], list(PARTS).index(r["without"])))
        machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"model": args.model.name, "machine": machine, "rows": rows}, indent=2) + "\n")
    print(markdown([r for r in rows if (r["keep"], r["effort"]) == (args.keep, args.effort)]))


if __name__ == "__main__":
    main()
