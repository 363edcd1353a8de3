"""What quantising the weights of a checkpoint costs: the source, and what it becomes in either format.

Weights of every linear layer of the decoder layers are rounded as common engines do, and put back in float32; the
output head and the embedding stay, as in most of them. Activations and the cache are not quantised. The table is in
docs/formats.md.

    python benchmarks/quantised_checkpoint.py build/quantised --json benchmarks/results/quantised-checkpoint.json
    python benchmarks/quantised_checkpoint.py build/quantised-smollm2 --source SMOLLM2 --calibration VALIDATION \
        --text TEST --tokens 4096

llama.cpp's formats are put on what the GGUF export makes of a portable folder, the others on what the folder holds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import latentize
from latentize.formats.balance import unbalance
from latentize.text.documents import documents
from latentize.text.tokenizer import load_tokenizer
from latentize.text.tokens import pack

SOURCE = Path(__file__).parents[1] / "models" / "tiny-llama-gqa"
MODELS = ("source", "native", "deepseek_v3")
FP8, INT8 = 448.0, 127.0
# The sixteen values of NormalFloat4 (Dettmers et al., arXiv 2305.14314, appendix E).
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def _steps(t: Tensor, largest: float, kind: str) -> Tensor:
    """Rounded to fp8 (e4m3) or whole numbers; ``t`` is at most ``largest``."""
    return t.to(torch.float8_e4m3fn).to(t.dtype) if kind == "fp8" else t.round().clamp(-largest, largest)


def _scaled(t: Tensor, top: Tensor, kind: str) -> Tensor:
    largest = FP8 if kind == "fp8" else INT8
    scale = (top / largest).clamp_min(torch.finfo(t.dtype).tiny)
    return _steps(t / scale, largest, kind) * scale


def by_tensor(w_od: Tensor, kind: str) -> Tensor:
    """One scale for the matrix."""
    return _scaled(w_od, w_od.abs().amax(), kind)


def by_channel(w_od: Tensor, kind: str) -> Tensor:
    """A scale for each row."""
    return _scaled(w_od, w_od.abs().amax(-1, keepdim=True), kind)


def by_block(w_od: Tensor, kind: str, size: int = 128) -> Tensor:
    """A scale for each square, as DeepSeek's own checkpoints have."""
    found = torch.empty_like(w_od)
    for rows in torch.arange(len(w_od)).split(size):
        for columns in torch.arange(w_od.shape[1]).split(size):
            at = rows[:, None], columns[None]
            found[at] = by_tensor(w_od[at], kind)
    return found


def nf4(w_od: Tensor, size: int = 64) -> Tensor:
    """Sixteen values and a scale for each 64 weights, in the order that they lie in, as bitsandbytes does."""
    missing = -w_od.numel() % size
    blocks = nn.functional.pad(w_od.flatten(), (0, missing)).view(-1, size)
    top = blocks.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(w_od.dtype).tiny)
    values = torch.tensor(_NF4, dtype=w_od.dtype)
    borders = (values[1:] + values[:-1]) / 2
    found = values[torch.bucketize(blocks / top, borders)] * top
    return found.flatten()[: w_od.numel()].view_as(w_od)


def _fp16(t: Tensor) -> Tensor:
    return t.half().to(t.dtype)


def q8_0(w_od: Tensor) -> Tensor:
    """llama.cpp's: 32 weights of a row share a step in fp16. Rows that this does not divide are fp16."""
    if w_od.shape[1] % 32:
        return _fp16(w_od)
    blocks = w_od.unflatten(-1, (-1, 32))
    step = blocks.abs().amax(-1, keepdim=True) / 127
    whole = torch.where(step > 0, blocks / step, 0.0).round()
    return (whole * _fp16(step)).flatten(-2)


def q5_0(w_od: Tensor) -> Tensor:
    """llama.cpp's: 5 bits, of which the largest weight of 32 is -16."""
    blocks = w_od.unflatten(-1, (-1, 32))
    top = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    step = top / -16
    whole = torch.where(step != 0, blocks / step, 0.0).round().clamp(-16, 15)
    return (whole * _fp16(step)).flatten(-2)


def q4_k(w_od: Tensor) -> Tensor:
    """llama.cpp's, without its search: 4 bits in blocks of 32 with step and offset, those in 6 bits with factors in
    fp16 for 256 weights. Where 256 does not divide a row it takes q5_0, where 32 does not fp16."""
    if w_od.shape[1] % 256:
        return _fp16(w_od) if w_od.shape[1] % 32 else q5_0(w_od)
    blocks = w_od.unflatten(-1, (-1, 8, 32))
    offset = (-blocks.amin(-1, keepdim=True)).clamp_min(0)
    step = (blocks.amax(-1, keepdim=True) + offset).clamp_min(0) / 15
    step, offset = (_six_bits(t) for t in (step, offset))
    whole = torch.where(step > 0, (blocks + offset) / step, 0.0).round().clamp(0, 15)
    return (whole * step - offset).flatten(-3)


def _six_bits(t: Tensor) -> Tensor:
    """Whole parts of 63 of the largest of eight, that in fp16."""
    unit = t.amax(-2, keepdim=True) / 63
    return torch.where(unit > 0, t / unit, 0.0).round().clamp(0, 63) * _fp16(unit)


QUANTISATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "fp8 by tensor": lambda w: by_tensor(w, "fp8"),
    "fp8 by 128 x 128": lambda w: by_block(w, "fp8"),
    "fp8 by channel": lambda w: by_channel(w, "fp8"),
    "int8 by tensor": lambda w: by_tensor(w, "int8"),
    "int8 by channel": lambda w: by_channel(w, "int8"),
    "nf4": nf4,
    "q8_0": q8_0,
    "q4_K": q4_k,
}
# On what the GGUF export makes of a portable folder.
OF_GGUF = ("q8_0", "q4_K")
# What a quantisation leaves as it is: the export writes it in float32 beside q8_0.
LEFT = {"q8_0": ("kv_a_proj_with_mqa",)}


def linears(model: Any, left: tuple[str, ...] = ()) -> dict[str, nn.Linear]:
    """Of the decoder layers, by name."""
    layers = getattr(model, "source", model).model.layers
    found = {name: module for name, module in layers.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in found.items() if not name.endswith(left or ("-",))}


def stock(folder: Path) -> Any:
    """As transformers loads it, in float32: nothing is rescaled on the way."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def as_exported(model: Any) -> Any:
    """A portable model with the weights that its GGUF file has."""
    unbalance(model)
    return model


@torch.no_grad()
def quantised(model: Any, kind: str) -> dict[str, Tensor]:
    """Quantise in place; what was there, to be put back by :func:`restore`."""
    kept = {name: module.weight.data for name, module in linears(model).items()}
    for module in linears(model, LEFT.get(kind, ())).values():
        module.weight.data = QUANTISATIONS[kind](module.weight.data)
    return kept


def restore(model: Any, kept: Mapping[str, Tensor]) -> None:
    for name, module in linears(model).items():
        module.weight.data = kept[name]


@torch.no_grad()
def log_probabilities(model: Any, tokens_NT: Tensor) -> Tensor:
    """``[N, T - 1, V]``, of the next token."""
    parts = [model(part, use_cache=False).logits[:, :-1] for part in tokens_NT.split(4)]
    return torch.cat(parts).float().log_softmax(-1)


def loss(log_p_NTV: Tensor, tokens_NT: Tensor) -> float:
    return -float(log_p_NTV.gather(-1, tokens_NT[:, 1:, None]).mean())


def rows(
    model: Any, tokens_NT: Tensor, names: Iterable[str], exact_NTV: Tensor | None = None
) -> dict[str, dict[str, float]]:
    """Loss as it is and quantised, in nats, and how far each quantisation takes its predictions from its own."""
    exact_NTV = log_probabilities(model, tokens_NT) if exact_NTV is None else exact_NTV
    found = {"none": {"loss": loss(exact_NTV, tokens_NT), "kl": 0.0}}
    for name in names:
        kept = quantised(model, name)
        log_p_NTV = log_probabilities(model, tokens_NT)
        restore(model, kept)
        kl = (exact_NTV.exp() * (exact_NTV - log_p_NTV)).sum(-1).mean()
        found[name] = {"loss": loss(log_p_NTV, tokens_NT), "kl": float(kl)}
        print(f"  {name}: {found[name]['loss']:.4f}, KL {found[name]['kl']:.5f}", flush=True)
    return found


def all_rows(folder: Path, tokens_NT: Tensor) -> dict[str, dict[str, float]]:
    """Of one checkpoint; llama.cpp's formats on the weights that its GGUF file has."""
    found = rows(stock(folder), tokens_NT, [name for name in QUANTISATIONS if name not in OF_GGUF])
    exported = rows(as_exported(stock(folder)), tokens_NT, OF_GGUF)
    return found | {name: exported[name] for name in OF_GGUF}


def table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    names = list(found)
    lines = ["| weights | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for kind in found[names[0]]:
        cells = (f"{found[n][kind]['loss']:.4f} ({found[n][kind]['kl']:.4f})" for n in names)
        lines.append(f"| {'as stored' if kind == 'none' else kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where converted models go; what is there already stays")
    parser.add_argument("--source", type=Path, default=SOURCE)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS, help="which of them")
    parser.add_argument("--keep", default="50%")
    parser.add_argument("--calibration", help="text that is converted with; by default that of `convert`")
    parser.add_argument("--text", help="text that is measured on; by default held-out modules of the standard library")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    text = documents((args.text,), "all") if args.text else documents((), "heldout")
    held = pack(load_tokenizer(args.source), text, tokens=args.tokens, sequence_length=512).long()
    calibration = (args.calibration,) if args.calibration else ()
    found = {}
    for name in args.models:
        folder = args.source if name == "source" else args.folder / name
        if not folder.exists():
            latentize.convert(args.source, folder, keep=args.keep, format=name, fast=True, data=calibration)
        print(name, flush=True)
        found[name] = all_rows(folder, held)
    print(table(found))
    if args.json is not None:
        facts = {"source": args.source.name, "keep": args.keep, "fast": True, "tokens": held.numel(), "models": found}
        args.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
