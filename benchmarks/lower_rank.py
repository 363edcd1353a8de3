"""Lower the rank of models that have latent attention: the bundled one, converted, and one whose norm is at work.

The second is the first with its norm switched on, as in models that were trained with one, and its attention trained
for some steps to predict what the bundled model predicts. Numbers are in docs/lower-rank.md.

    python benchmarks/lower_rank.py build/lower-rank --steps 150
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import latentize
from latentize.modeling.load import load_model
from latentize.text.documents import documents
from latentize.text.tokenizer import load_tokenizer
from latentize.text.tokens import pack

SOURCE = Path(__file__).parents[1] / "models" / "tiny-llama-gqa"


@torch.no_grad()
def switch_norms_on(model, tokens_NT: torch.Tensor) -> None:
    """Latents of about one, so that every token's own size is divided out; the norm's weight has the mean size back."""
    sizes: dict[int, torch.Tensor] = {}
    hooks = [
        layer.self_attn.kv_a_layernorm.register_forward_pre_hook(
            lambda module, args, index=index: sizes.__setitem__(index, args[0].square().mean().sqrt())
        )
        for index, layer in enumerate(model.model.layers)
    ]
    model(tokens_NT, use_cache=False)
    for hook in hooks:
        hook.remove()
    for index, layer in enumerate(model.model.layers):
        attention, size = layer.self_attn, sizes[index]
        attention.kv_a_proj_with_mqa.weight[: attention.kv_lora_rank] /= size
        attention.kv_a_layernorm.weight *= size / attention.kv_a_layernorm.variance_epsilon**0.5


def train(model, teacher, tokens_NT: torch.Tensor, steps: int, *, rate: float = 1e-3) -> None:
    """Minimise KL(teacher ‖ model) over the attention's weights, AdamW with a linear decay."""
    trained = [p for n, p in model.named_parameters() if "self_attn" in n]
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    # Matrices of the portable format have scales of their own; a step is relative to each.
    groups = [{"params": [p], "lr": rate * float(p.square().mean().sqrt()) * 20} for p in trained]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.02, steps)
    for step, rows in enumerate(tokens_NT.split(4)[:steps]):
        with torch.no_grad():
            wanted = teacher(rows, use_cache=False).logits.log_softmax(-1)
        loss = (wanted.exp() * (wanted - model(rows, use_cache=False).logits.log_softmax(-1))).sum(-1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        decay.step()
        if step % 10 == 0:
            print(f"step {step}: {loss.item():.4f}", flush=True)


def with_norms(half: Path, out: Path, steps: int) -> None:
    tokens_NT = pack(load_tokenizer(half), documents((), "training"), tokens=steps * 2048, sequence_length=512, seed=1)
    model = load_model(half)
    switch_norms_on(model, tokens_NT[:8])
    train(model, load_model(SOURCE), tokens_NT, steps)
    model.save_pretrained(out)
    load_tokenizer(half).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--shares", default="0.75,0.5")
    parser.add_argument("--refine", action="store_true", help="layer by layer, too")
    parser.add_argument("--tokens", type=int, default=16_384)
    args = parser.parse_args()
    half, normed = args.folder / "half", args.folder / "normed"
    if not half.exists():
        args.folder.mkdir(parents=True, exist_ok=True)
        latentize.convert(SOURCE, half, keep="50%", fast=True)
    if not normed.exists():
        with_norms(half, normed, args.steps)
    for model in (half, normed):
        before = latentize.evaluate(model, SOURCE, tokens=args.tokens)
        print(json.dumps({"model": model.name, "kl_from_bundled": before["kl"]}), flush=True)
        rank = json.loads((model / "config.json").read_text())["kv_lora_rank"]
        for share in map(float, args.shares.split(",")):
            for fast in (True, False)[: 1 + args.refine]:
                lower = round(share * rank)
                out = args.folder / f"{model.name}-{lower}-{'fast' if fast else 'refined'}"
                if not out.exists():
                    latentize.convert(model, out, kv_lora_rank=lower, fast=fast, evaluation_tokens=args.tokens)
                found = latentize.evaluate(out, model, tokens=args.tokens)
                layers = json.loads((out / "latentize.json").read_text())["layers"]
                spread = sum(layer["norm_spread"] for layer in layers) / len(layers)
                facts = {"model": model.name, "rank": lower, "of": rank, "fast": fast, "kl": found["kl"]}
                facts |= {"perplexity": found["perplexity"], "from": found["reference_perplexity"]}
                facts |= {"kl_from_bundled": latentize.evaluate(out, SOURCE, tokens=args.tokens)["kl"]}
                print(json.dumps({**facts, "norm_spread": spread}), flush=True)


if __name__ == "__main__":
    main()
