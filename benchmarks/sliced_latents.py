"""What a latent would lose that ranks share out, each attending to its slice alone (TPLA: arXiv 2508.15881).

    python benchmarks/sliced_latents.py OUT --calibrate TEXT --report RAW [--slices 2 4] [--tokens 16384]

With tensor parallelism every rank has all of the latent. A rank that has a slice of it, and the roped key, cannot know
the scores of the others: it takes its own, as many times as they are of the whole, and has a softmax of its own. Sums
are exact otherwise: each rank's slice goes through its part of the up-projection, and the parts are added. What is lost
depends on the basis that is sliced: the latent's own, a random rotation of it, or one of components that have the same
variance in latents and queries (balanced: Moore, IEEE Trans. Autom. Control 26, 1981). Nothing is trained. Writes
``benchmarks/results/sliced-latents-<model>.json`` and prints Markdown.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentize.attention.grouped import by_groups
from latentize.attention.masks import causal_mask
from latentize.modeling.load import load_model
from latentize.runtime import accelerate as runtime
from latentize.runtime.accelerate import accelerate
from latentize.text.documents import documents
from latentize.text.tokenizer import load_tokenizer
from latentize.text.tokens import pack

ROOT = Path(__file__).resolve().parents[1]
BASES = ("own", "rotated", "balanced and rotated")
# Of all latents' variance, added to each direction: some have nearly none.
DAMPING = 1e-6


heads = runtime.heads


class Moments:
    """Second moments of latents and of absorbed queries, layer by layer, as the model runs.

    Each latent counts as much as is attended to it: the first ones of a text are few, unlike all others, and in every
    softmax. Their mean is taken away, which is the same in all scores of a query.
    """

    def __init__(self) -> None:
        self.found: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, q_nope: Tensor, q_rope: Tensor, rows: Any, up: Any, mask: Tensor | None, backend: Any) -> Tensor:
        (c_B1Sr, k_B1SR), q_BHTr = rows.tensors(), by_groups(q_nope, up.k_up_UNr)
        score_BHTS = up.softmax_scale * (q_BHTr @ c_B1Sr.mT + q_rope @ k_B1SR.mT)
        seen = causal_mask(score_BHTS.shape[2], score_BHTS.shape[3])
        weight_S1 = score_BHTS.masked_fill(~seen, -torch.inf).softmax(-1).mean((0, 1, 2))[:, None].double()
        c_Sr, q_nr = c_B1Sr[0, 0].double(), up.softmax_scale * q_BHTr.flatten(0, 2).double()
        c_Sr = c_Sr - (weight_S1 * c_Sr).sum(0)
        moments = c_Sr.mT @ (weight_S1 * c_Sr), q_nr.mT @ q_nr / len(q_nr)
        before = self.found.get(up.k_up_UNr.data_ptr(), (0.0, 0.0))
        self.found[up.k_up_UNr.data_ptr()] = tuple(a + b for a, b in zip(moments, before, strict=True))
        return heads(q_nope, q_rope, rows, up, mask, backend)


def basis(name: str, c_rr: Tensor, q_rr: Tensor) -> tuple[Tensor, Tensor]:
    """From latents to components, and how much each is worth."""
    rank = len(c_rr)
    c_rr = c_rr + DAMPING * c_rr.trace() * torch.eye(rank, dtype=c_rr.dtype)
    turn_rr = torch.eye(rank, dtype=c_rr.dtype)
    if "rotated" in name:
        turn_rr = torch.linalg.qr(torch.randn(rank, rank, generator=torch.Generator().manual_seed(0)).double())[0]
    if "balanced" in name:
        lower_rr = torch.linalg.cholesky(c_rr)
        _, worth_r, v_rr = torch.linalg.svd(lower_rr.mT @ q_rr @ lower_rr)
        into_rr = worth_r.clamp_min(DAMPING * worth_r.max()).pow(0.25)[:, None] * (v_rr @ torch.linalg.inv(lower_rr))
        turn_rr = turn_rr @ into_rr
    back_rr = torch.linalg.inv(turn_rr)
    return turn_rr, (turn_rr @ c_rr @ turn_rr.mT).diagonal() * (back_rr.mT @ q_rr @ back_rr).diagonal()


class Sliced:
    """Heads of ranks that each have a slice."""

    def __init__(self, moments: Moments, name: str, slices: int) -> None:
        self.layers = {}
        for key, (c_rr, q_rr) in moments.found.items():
            into_rr, worth_r = basis(name, c_rr, q_rr)
            shares = torch.arange(len(worth_r)).chunk(slices)
            gains = [float(worth_r.sum() / worth_r[share].sum()) for share in shares]
            both = into_rr.float(), torch.linalg.inv(into_rr).float()
            self.layers[key] = (*both, list(zip(shares, gains, strict=True)))

    def __call__(self, q_nope: Tensor, q_rope: Tensor, rows: Any, up: Any, mask: Tensor | None, backend: Any) -> Tensor:
        into_rr, back_rr, shares = self.layers[up.k_up_UNr.data_ptr()]
        c_B1Sr, k_B1SR = rows.tensors()
        mask = rows.expanded_mask(mask)
        if mask is None:
            mask = causal_mask(q_nope.shape[2], c_B1Sr.shape[2])
        u_B1Sr, w_BHTr = c_B1Sr @ into_rr.mT, by_groups(q_nope, up.k_up_UNr) @ back_rr
        roped_BHTS = q_rope @ k_B1SR.mT
        summed_BHTr = torch.zeros_like(w_BHTr)
        for share, gain in shares:
            score_BHTS = up.softmax_scale * (gain * (w_BHTr[..., share] @ u_B1Sr[..., share].mT) + roped_BHTS)
            p_BHTS = score_BHTS.masked_fill(~mask, -torch.inf).softmax(-1)
            summed_BHTr[..., share] = p_BHTS @ u_B1Sr[..., share]
        return by_groups(summed_BHTr @ back_rr.mT, up.v_up_UVr.mT, up.v_up_bias_UV)


@torch.no_grad()
def run(model: Any, made: Callable[..., Tensor], passages: list[Tensor]) -> list[Tensor]:
    """Logits with heads made so."""
    runtime.heads = made
    try:
        return [model(ids[None], use_cache=False).logits[0].log_softmax(-1) for ids in passages]
    finally:
        runtime.heads = heads


def lost(passages: list[Tensor], exact: list[Tensor], made: list[Tensor]) -> dict[str, float]:
    """Nats per token."""
    kl = sum(float((a.exp() * (a - b)).sum()) for a, b in zip(exact, made, strict=True))
    said = [ids[1:, None] for ids in passages]
    gone = sum(float((a[:-1] - b[:-1]).gather(1, s).sum()) for a, b, s in zip(exact, made, said, strict=True))
    return {"kl": kl / sum(map(len, passages)), "excess": gone / sum(map(len, said))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="converted to deepseek_v3")
    parser.add_argument("--calibrate", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--slices", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--length", type=int, default=2048)
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, dtype=torch.float32), load_tokenizer(args.model)
    accelerate(model)

    def passages(file: Path, tokens: int) -> list[Tensor]:
        text = documents((str(file),), "all")
        return list(pack(tokenizer, text, tokens=tokens, sequence_length=args.length).long())

    moments, texts = Moments(), passages(args.report, args.tokens)
    run(model, moments, passages(args.calibrate, 4 * args.length))
    exact = run(model, heads, texts)
    facts = {"model": args.model.name, "tokens": args.tokens, "length": args.length}
    facts |= {"date": datetime.date.today().isoformat(), "rank": model.config.kv_lora_rank}
    found, rope = [], model.config.qk_rope_head_dim
    print("| slices | values a token on each rank | basis | excess loss | KL |\n| -- | -- | -- | -- | -- |", flush=True)
    for slices in args.slices:
        for name in BASES:
            made = run(model, Sliced(moments, name, slices), texts)
            row = {"slices": slices, "basis": name, **lost(texts, exact, made)}
            found.append(row)
            values = f"{model.config.kv_lora_rank // slices} + {rope}"
            print(f"| {slices} | {values} | {name} | {row['excess']:.4f} | {row['kl']:.4f} |", flush=True)
    out = ROOT / "benchmarks" / "results" / f"sliced-latents-{args.model.name}.json"
    out.write_text(json.dumps({**facts, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
