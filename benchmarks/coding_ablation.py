"""What each part of coded rows is worth: one removed at a time, nothing trained.

    python benchmarks/coding_ablation.py MODEL --calibrate TEXT [--row-bytes 98] [--tokens 6144] [--only NAME ...]

The model's own rows are coded exactly as ``convert --bytes`` codes them before any training, in so many bytes a token
and layer: 98 are two bits of each of SmolLM2's 384 values, and two gains. KL from the model, in nats per token, is of
other passages of the text, in contexts of 1,024. Parts are replaced from outside. Writes
``benchmarks/results/coding-ablation-<model>.json`` and prints Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from latentize.attention import codebooks, quantizer
from latentize.conversion import coding as conversion
from latentize.conversion.coding import Coding, code_rows
from latentize.conversion.draft import Draft, observe
from latentize.families.opening import open_source
from latentize.methods import rate
from latentize.methods.registry import needs, settings
from latentize.methods.setting import Setting
from latentize.modeling.attention import LatentAttention
from latentize.modeling.source import SourceModel
from latentize.progress import silent
from latentize.recipe import Recipe
from latentize.text.drawing import Part, draw
from latentize.text.tokenizer import load_tokenizer
from latentize.text.tokens import Passages
from latentize.training.student import Student

ROOT = Path(__file__).resolve().parents[1]
LENGTH = 1024
# Of the best uniform quantiser of a Gaussian value, in standard deviations (Max, 1960).
STEPS = {1: 1.596, 2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 8: 0.0308}
Removal = Callable[[], AbstractContextManager[Any]]


def whole() -> AbstractContextManager[Any]:
    return contextlib.nullcontext()


def one_value_at_a_time() -> AbstractContextManager[Any]:
    """Uniform steps instead of codebooks."""

    def words(bits: int) -> Tensor:
        levels = STEPS[bits] * (torch.arange(2.0**bits) - (2**bits - 1) / 2)
        values = codebooks.VALUES_AT_ONCE[bits]
        return torch.cartesian_prod(*[levels] * values).view(2 ** (bits * values), values)

    return forgetting(patch.object(codebooks, "words", words))


@contextlib.contextmanager
def forgetting(change: AbstractContextManager[Any]) -> Any:
    known = (codebooks.codebook, codebooks.finder, quantizer.quantizer)
    for made in known:
        made.cache_clear()
    with change:
        yield
    for made in known:
        made.cache_clear()


def no_gain() -> AbstractContextManager[Any]:
    def ones(self: quantizer.Quantizer, x_Bsn: Tensor) -> Tensor:
        return torch.full((*x_Bsn.shape[:-1], self._counted_nh.shape[-1]), 128, dtype=torch.int32)

    stack = contextlib.ExitStack()
    stack.enter_context(patch.object(quantizer.Quantizer, "gain_codes", ones))
    stack.enter_context(patch.object(rate, "_gains", lambda parts, _: torch.ones(len(parts))))
    return stack


def no_basis() -> AbstractContextManager[Any]:
    """Values of the heads as they are, each in units of what its errors cost."""

    def diagonal(moment: Tensor) -> Tensor:
        return moment.diagonal(dim1=-2, dim2=-1).real.clamp_min(1e-30).sqrt().diag_embed().to(moment.dtype)

    def same(root: Tensor, _: Tensor) -> Tensor:
        return torch.eye(root.shape[-1], dtype=root.dtype).expand_as(root)

    stack = contextlib.ExitStack()
    stack.enter_context(patch.object(rate, "_root", diagonal))
    stack.enter_context(patch.object(rate, "_basis", same))
    return stack


def plain_energy() -> AbstractContextManager[Any]:
    """Every direction of a layer's half costs what they cost on average."""

    def even(moment: Tensor) -> Tensor:
        mean = moment.diagonal(dim1=-2, dim2=-1).real.mean().sqrt()
        return (mean * torch.eye(moment.shape[-1], dtype=moment.dtype)).expand_as(moment)

    return patch.object(rate, "_root", even)


def stored_means() -> AbstractContextManager[Any]:
    return patch.object(rate, "_mean", lambda k_nPF, _: torch.zeros_like(k_nPF[0]))


def same_widths() -> AbstractContextManager[Any]:
    """Two bits of everything."""

    def two(self: Any, *_: Any) -> Tensor:
        return torch.full((self.nats_bm.shape[1],), 2)

    return patch.object(rate.Half, "widths", two)


def same_bytes() -> AbstractContextManager[Any]:
    original = rate.plans

    def plans(layers: Any, factors: Any, row_bytes: float) -> Any:
        return [original([layer], [each], row_bytes)[0] for layer, each in zip(layers, factors, strict=True)]

    return patch.object(conversion, "plans", plans)


def no_factors() -> AbstractContextManager[Any]:
    return patch.object(conversion, "measured_factors", lambda layers, *_: [(1.0, 1.0)] * len(layers))


PARTS: dict[str, tuple[Removal, dict[str, int]]] = {
    "nothing": (whole, {}),
    "the newest four tokens are coded, too": (whole, {"newest": 0}),
    "the first four tokens are coded, too": (whole, {"sinks": 0}),
    "codebooks: one value at a time": (one_value_at_a_time, {}),
    "gain of each token": (no_gain, {}),
    "basis: values as they are": (no_basis, {}),
    "metric: plain energy": (plain_energy, {}),
    "means of keys are stored": (stored_means, {}),
    "bits by component: two for all": (same_widths, {}),
    "budgets by layer: the same bytes for each": (same_bytes, {}),
    "measured factors": (no_factors, {}),
}


@dataclass(frozen=True)
class InBytes(Coding):
    """So many bytes a row, whatever is exact beside them."""

    of_row: float = 98.0

    def row_bytes(self, *_: float) -> float:
        return self.of_row


def student_of(source: SourceModel, weights: list[Any]) -> Student:
    student = Student(source)
    for index, w in enumerate(weights):
        student.add(source.layer(index), LatentAttention.from_weights(w.to(torch.float32)))
    return student


def divergence(source: SourceModel, plain: Student, weights: list[Any], text: Passages) -> float:
    """KL where all rows are coded from where none is, in nats per token."""
    student, total = student_of(source, weights), 0.0
    # As a polish measures.
    with torch.autocast(torch.device(source.device).type, torch.bfloat16, enabled=source.precision.faster):
        for row in range(len(text)):
            entering = source.embed(text[row : row + 1])
            total += student.divergence(student.run(entering), plain.log_probs(plain.run(entering)))
    return total / len(text)


def exact(source: SourceModel, setting: Setting, text: Passages) -> list[Any]:
    """The source's layers as latent attention, nothing left out."""
    own = source.embed(text)
    draft, found = Draft(None, own), []
    for layer in source.layers():
        assert layer.spec is not None
        seen = observe(layer, own, needs(setting, layer.spec))
        found.append(draft.convert(layer, seen, setting).refined)
        layer.forget()
    return found


def measured(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    checkpoint, spec = open_source(args.model)
    source = SourceModel(checkpoint, spec)
    wanted = {"calibration": conversion.SAMPLED_TOKENS, "selection": conversion.TRIED_TOKENS, "heldout": args.tokens}
    parts = [Part(split, tokens) for split, tokens in wanted.items()]
    drawn = draw(load_tokenizer(checkpoint.path), (args.calibrate,), parts, sequence_length=LENGTH)
    calibration, selection, text = map(Passages.contiguous, drawn)
    (setting,) = settings(Recipe.build(bytes=0.5), spec.attention)
    weights = exact(source, setting, calibration[:4])
    plain = student_of(source, weights)
    for name, (part, options) in PARTS.items():
        if args.only and name not in args.only:
            continue
        began = time.monotonic()
        with part(), torch.no_grad():
            how = replace(InBytes(1.0, LENGTH, 0), of_row=args.row_bytes, **options)
            coded = code_rows(source, weights, calibration, selection, how, silent)
            found = divergence(source, plain, coded, text)
        used = math.fsum(w.code.row_bytes for w in coded) / len(coded)
        yield {"removed": name, "kl": found, "row_bytes": used, "seconds": time.monotonic() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibrate", required=True)
    parser.add_argument("--row-bytes", type=float, default=98.0)
    parser.add_argument("--tokens", type=int, default=6144)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    name, rows = Path(args.model).stem, []
    facts = {"model": name, "tokens": args.tokens, "date": datetime.date.today().isoformat()}
    print("| removed | KL, nats | bytes of a row |\n|---|---|---|")
    for row in measured(args):
        rows.append(row)
        print(f"| {row['removed']} | {row['kl']:.4f} | {row['row_bytes']:.1f} |", flush=True)
        path = args.out / f"coding-ablation-{name}.json"
        path.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
