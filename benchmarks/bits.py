"""Bits where they count: coded rows of ``--bytes`` beside every other way to store a cache, at equal bytes.

    python benchmarks/bits.py MODEL --calibrate valid.txt --report raw-test.txt            # converts at four budgets
    python benchmarks/bits.py MODEL --report raw-test.txt --plans 12.5%=out --bytes        # only what is there
    python benchmarks/bits.py MODEL --print                                                # what was measured before

Every alternative rounds the source's own keys and values as its authors define it, in one pass: each token sees all
tokens before it as they come back from the cache. The first four of a text are exact, and each token sees its newest
four, itself included, as they are: coded rows have both, so all have. So is what a block of tokens lacks to be whole.
Bytes are counted over the evaluated context, scales and exact tokens included. Sources: KIVI (arXiv 2402.02750: keys by
channel in groups of 32 tokens, values by token in groups of 32 channels, scale and zero of 16 bits each); TurboQuant
(arXiv 2504.19874, algorithm 1: a rotation, and the best levels for a Gaussian, with a norm of 16 bits); rotated int8
and int4 as ``latentize compare`` has them, int3 and int2 with a scale and a zero of 16 bits for each head; q8_0, q5_1
and q4_0 as llama.cpp's ``ggml-quants.c`` rounds blocks of 32, after a Hadamard rotation of each head, as llama.cpp
rotates; HQQ and quanto by the layers of transformers' own ``QuantizedCache`` (groups of 64, scale and zero of 16 bits),
where hqq and optimum-quanto are installed. ``--latents transmla=out`` has other converted models with rows in int4.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.cache_utils import DynamicLayer, HQQQuantizedLayer, QuantoQuantizedLayer
from transformers.utils.import_utils import is_hqq_available, is_optimum_quanto_available

import latentize
from latentize.checkpoint import resolve
from latentize.evaluation.compare import _cached_parts, _row_bytes
from latentize.evaluation.grouped import SINKS, grouped_predictor
from latentize.evaluation.predict import Predict, predictor
from latentize.evaluation.quality import measure
from latentize.modeling.blocks import newest_blocks
from latentize.modeling.load import load_model
from latentize.runtime.rotation import rotation
from latentize.text.documents import documents
from latentize.text.tokenizer import load_tokenizer
from latentize.text.tokens import pack

ROOT = Path(__file__).resolve().parents[1]
GROUP, BLOCK = 32, 32
INT4 = "int4"
# As in coded rows: of each token's newest rows, how many it sees as they are.
NEWEST = 4
# What a user may ask for, of the source in 16 bits.
BUDGETS = ("25%", "18.75%", "12.5%", "6.25%")
# From keys or values ``[B, G, T, d]``, and whether they are keys, to what a cache gives back.
Rounds = Callable[[Tensor, bool], Tensor]


def even(x: Tensor, bits: int, axis: int) -> Tensor:
    """Between the least and the largest along an axis, with a scale and a zero of 16 bits."""
    low, high = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp_min(1e-8).half().float()
    return ((x - low) / scale).round() * scale + low.half().float()


def kivi(bits: int) -> Rounds:
    def rounds(x: Tensor, keys: bool) -> Tensor:
        if not keys:
            return even(x.unflatten(-1, (-1, GROUP)), bits, -1).flatten(-2)
        whole = x.shape[2] // GROUP * GROUP
        made = even(x[:, :, :whole].unflatten(2, (-1, GROUP)), bits, 3).flatten(2, 3)
        return torch.cat([made, x[:, :, whole:]], dim=2)

    return rounds


def rotated(rounds: Callable[[Tensor], Tensor], seed: int | None = None) -> Rounds:
    """In the basis of each head's rotation: Hadamard's, or a random one."""

    def made(x: Tensor, keys: bool) -> Tensor:
        turn = rotation(x.shape[-1]).to(x.dtype)
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            turn = torch.linalg.qr(torch.randn(x.shape[-1], x.shape[-1], generator=generator))[0]
        return rounds(x @ turn) @ turn.mT

    return made


def blocks(name: str) -> Callable[[Tensor], Tensor]:
    """llama.cpp's, of 32 values; scales are fp16."""

    def rounds(x: Tensor) -> Tensor:
        b = x.unflatten(-1, (-1, BLOCK))
        if name == "q5_1":
            return even(b, 5, -1).flatten(-2)
        top = b.gather(-1, b.abs().argmax(-1, keepdim=True))
        if name == "q8_0":
            scale = (top.abs() / 127).half().float().clamp_min(1e-8)
            return ((b / scale).round() * scale).flatten(-2)
        scale = (top / -8).half().float()
        scale = torch.where(scale == 0, 1e-8, scale)
        return (((b / scale + 8.5).floor().clamp(0, 15) - 8) * scale).flatten(-2)

    return rounds


def gaussian_levels(bits: int) -> Tensor:
    """The best levels for a Gaussian of variance one (Lloyd 1982, Max 1960)."""
    x = torch.erfinv(torch.linspace(-1, 1, 200_003, dtype=torch.float64)[1:-1]) * 2**0.5
    levels = torch.linspace(-2, 2, 2**bits, dtype=torch.float64)
    for _ in range(300):
        cell = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
        levels = torch.zeros_like(levels).scatter_add_(0, cell, x) / torch.bincount(cell, minlength=len(levels))
    return levels.float()


def turboquant(bits: int) -> Callable[[Tensor], Tensor]:
    levels = gaussian_levels(bits)

    def rounds(x: Tensor) -> Tensor:
        norm = x.norm(dim=-1, keepdim=True).half().float().clamp_min(1e-8)
        unit = x / norm * x.shape[-1] ** 0.5
        back = levels[torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2)]
        return back / x.shape[-1] ** 0.5 * norm

    return rounds


def alternatives(head_dim: int) -> dict[str, tuple[Rounds, float]]:
    """By name: how it rounds, and bits of a value with its share of scales."""
    found: dict[str, tuple[Rounds, float]] = {}
    for bits in (4, 3, 2):
        found[f"KIVI {bits}"] = (kivi(bits), bits + 32 / GROUP)
        found[f"TurboQuant {bits}"] = (rotated(turboquant(bits), seed=0), bits + 16 / head_dim)
        found[f"rotated int{bits}"] = (rotated(lambda x, bits=bits: even(x, bits, -1)), bits + 32 / head_dim)
    found["rotated int8"] = (rotated(lambda x: even(x, 8, -1)), 8 + 32 / head_dim)
    for name, bits in (("q8_0", 8.5), ("q5_1", 6.0), ("q4_0", 4.5)):
        found[name] = (rotated(blocks(name)), bits)
    for name, widths in (("HQQ", (4, 3, 2)), ("quanto", (4, 2))):
        found |= {f"{name} {bits}": (of_transformers(name, bits), bits + 32 / 64) for bits in widths if has(name)}
    return found


def has(backend: str) -> bool:
    return {"HQQ": is_hqq_available, "quanto": is_optimum_quanto_available}[backend]()


def of_transformers(backend: str, bits: int) -> Rounds:
    """As a layer of ``QuantizedCache`` with its own settings rounds keys and values."""
    layer = {"HQQ": HQQQuantizedLayer, "quanto": QuantoQuantizedLayer}[backend](nbits=bits)

    def rounds(x: Tensor, keys: bool) -> Tensor:
        # What it asks device and type of.
        layer.keys = x[:0]
        axis = layer.axis_key if keys else layer.axis_value
        return layer._dequantize(layer._quantize(x.contiguous(), axis)).view_as(x)

    return rounds


class _Layer(DynamicLayer):
    """Gives back keys and values as they are stored, and after them all as they are."""

    def __init__(self, rounds: Rounds) -> None:
        super().__init__()
        self.rounds = rounds

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        halves = []
        for x, keys in ((key_states, True), (value_states, False)):
            old = x[:, :, : x.shape[2] - NEWEST]
            made = self.rounds(old[:, :, SINKS:].float(), keys).to(x.dtype)
            halves.append(torch.cat([old[:, :, :SINKS], made, x], dim=2))
        return super().update(*halves, *args, **kwargs)


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, _: Any, scaling: float, **__: Any
) -> tuple[Tensor, None]:
    """Over what :class:`_Layer` gives back, as transformers calls it."""
    key, value = (t.repeat_interleave(module.num_key_value_groups, dim=1) for t in (key, value))
    stored = query.shape[2] - NEWEST
    return newest_blocks(query, key, value, stored, NEWEST, scaling).transpose(1, 2), None


AttentionInterface.register("newest", attention)
AttentionMaskInterface.register("newest", lambda *_, **__: None)


def rounded(model: Any, rounds: Rounds) -> Predict:
    """Predictions from a cache that rounds."""

    @torch.no_grad()
    def predict(tokens_BT: Tensor, count: int) -> Tensor:
        cache = Cache(layers=[_Layer(rounds) for _ in range(model.config.num_hidden_layers)])
        usual = model.config._attn_implementation
        model.set_attn_implementation("newest")
        try:
            return model(input_ids=tokens_BT, past_key_values=cache, use_cache=True, logits_to_keep=count).logits
        finally:
            model.set_attn_implementation(usual)

    return predict


def share_of(bits: float, length: int) -> float:
    """Of the source's bytes in 16 bits, where the first and the newest tokens are exact."""
    exact = SINKS + NEWEST
    return (exact + (length - exact) * bits / 16) / length


def measured(args: argparse.Namespace) -> list[dict[str, Any]]:
    path = resolve(args.model)
    model = load_model(path)
    rows_of_text = pack(
        load_tokenizer(path), documents((args.report,), "all"), tokens=args.tokens, sequence_length=args.length
    )
    source = predictor(model)
    subjects: dict[str, tuple[Predict, float]] = {}
    for plan in args.plans:
        name, _, folder = plan.partition("=")
        report = json.loads((Path(folder) / "latentize.json").read_text())["measurements"]
        context, exact = args.length, SINKS + NEWEST
        row, values = report["row_bytes_per_token_layer"], report["cache_values_per_token_layer"]
        total = row * (context - exact) + 2 * values * exact
        share = total / (2 * report["source_cache_values_per_token_layer"] * context)
        subjects[f"coded, {name}"] = (predictor(load_model(Path(folder))), share)
    for latents in args.latents:
        name, _, folder = latents.partition("=")
        loaded = load_model(Path(folder))
        share = _row_bytes(_cached_parts(loaded), INT4, latents=True) / _row_bytes(
            _cached_parts(model), None, latents=False
        )
        subjects[f"{name}, {INT4}"] = (predictor(loaded, cache=INT4), share)
    if not args.bytes:
        spec = model.config
        head_dim = getattr(spec, "head_dim", None) or spec.hidden_size // spec.num_attention_heads
        for name, (rounds, bits) in alternatives(head_dim).items():
            if args.only and name not in args.only:
                continue
            subjects[name] = (rounded(model, rounds), share_of(bits, args.length))
        for budget in BUDGETS:
            window = round(args.length * float(budget.rstrip("%")) / 100) - SINKS
            if args.only and f"window {window}" not in args.only:
                continue
            subjects[f"window {window}"] = (grouped_predictor(model, window=window), (window + SINKS) / args.length)
    made, found = [], measure([predict for predict, _ in subjects.values()], source, rows_of_text)
    for (name, (_, share)), each in zip(subjects.items(), found, strict=True):
        quality = each.describe()
        kept = ("perplexity", "reference_perplexity", "excess_loss", "kl", "top1_agreement", "tokens")
        made.append({"name": name, "share": share, **{key: quality[key] for key in kept}})
        made[-1]["date"] = datetime.date.today().isoformat()
    return made


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| cache | of 16 bits | perplexity | excess, nats | KL, nats | same top-1 |", "|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: -row["share"]):
        cells = (f"{row['share']:.2%}", f"{row['perplexity']:.2f}", f"{row['excess_loss']:.4f}", f"{row['kl']:.4f}")
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {row['top1_agreement']:.2%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibrate", help="text to calibrate on; converts at every budget")
    parser.add_argument("--report", help="text to report on")
    parser.add_argument("--plans", nargs="*", default=[], metavar="BUDGET=FOLDER", help="models that are there")
    parser.add_argument("--latents", nargs="*", default=[], metavar="NAME=FOLDER", help="models whose rows are in int4")
    parser.add_argument("--bytes", action="store_true", help="leave out the alternatives")
    parser.add_argument("--only", nargs="*", help="alternatives by name; all by default")
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--outputs", type=Path, default=ROOT / "build" / "bits")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--print", action="store_true", help="measure nothing")
    args = parser.parse_args()
    path = args.out / f"bits-{Path(args.model).stem}.json"
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    if args.print:
        print(markdown(before))
        return
    if args.calibrate:
        for budget in BUDGETS:
            out = args.outputs / f"{Path(args.model).stem}-{budget.rstrip('%')}"
            if not out.exists():
                latentize.convert(args.model, out, bytes=budget, data=(args.calibrate,), bytes_context=args.length)
            args.plans.append(f"{budget}={out}")
    made = measured(args)
    names = {row["name"] for row in made}
    rows = [row for row in before if row["name"] not in names] + made
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"model": Path(args.model).stem, "sequence_length": args.length, "machine": machine}
    path.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")
    print(markdown(rows))


if __name__ == "__main__":
    main()
