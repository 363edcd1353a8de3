"""Train the small model that ships with latentize, from the Python standard library's own text.

    python examples/train_tiny_llama.py models/tiny-llama-gqa            # the bundled one
    python examples/train_tiny_llama.py /tmp/mha --kv-heads 8            # siblings for benchmarks
    python examples/train_tiny_llama.py /tmp/qwen3 --family qwen3

6 layers, hidden 256, heads of 32, byte-level BPE of 4,096. Sequences of 512, then for the last part of
2,048 tokens, so that the model is a model of 2,048 tokens of context. About 20 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import math
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from latentize.modeling.blocks import causal_blocks
from latentize.text.documents import stdlib_documents

CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
END_OF_TEXT = "<|endoftext|>"
LONG = 2048


def train_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with GPT-2's pre-tokenizer, which every engine knows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stdlib_documents("calibration"), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, model_max_length=LONG
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, split: str) -> torch.Tensor:
    stream: list[int] = []
    for text in stdlib_documents(split):
        stream += tokenizer(text, verbose=False)["input_ids"] + [tokenizer.eos_token_id]
    return torch.tensor(stream)


def epochs(stream: torch.Tensor, length: int, batch: int, generator: torch.Generator):
    """Endless shuffled batches ``[batch, length + 1]``; each epoch cuts the stream at another offset."""
    while True:
        offset = int(torch.randint(length, (), generator=generator))
        count = (len(stream) - offset - 1) // length
        for rows in torch.randperm(count, generator=generator).split(batch):
            if len(rows) == batch:
                yield torch.stack([stream[offset + r * length :][: length + 1] for r in rows.tolist()])


def loss_of(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    logits = model(batch[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


@torch.no_grad()
def heldout_loss(model: torch.nn.Module, stream: torch.Tensor, length: int, limit: int = 131_072) -> float:
    count = min(len(stream) - 1, limit) // length
    rows = [stream[i * length : (i + 1) * length + 1] for i in range(count)]
    losses = [loss_of(model, torch.stack(rows[i : i + 4])).item() for i in range(0, count - 3, 4)]
    return sum(losses) / len(losses)


def attention_in_blocks(module, query, key, value, attention_mask, scaling=None, **_):
    """transformers' attention function; on a CPU the fused one spends most of a training step in its backward pass."""
    share = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(share, dim=1), value.repeat_interleave(share, dim=1)
    heads = causal_blocks(query.bfloat16(), key.bfloat16(), value.bfloat16(), scaling)
    return heads.transpose(1, 2).contiguous(), None


def build(args: argparse.Namespace) -> torch.nn.Module:
    config = CONFIGS[args.family](
        vocab_size=args.vocab,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=args.kv_heads,
        head_dim=32,
        max_position_embeddings=LONG,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        rms_norm_eps=1e-5 if args.family == "llama" else 1e-6,
    )
    AttentionInterface.register("blocks", attention_in_blocks)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="blocks")


def optimisers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=0.02),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(model: torch.nn.Module, stream: torch.Tensor, args: argparse.Namespace) -> float:
    """Linear warm-up over 1 %, constant, linear decay over the second half. Returns seconds."""
    generator = torch.Generator().manual_seed(args.seed)
    short, long = epochs(stream, 512, 8, generator), epochs(stream, LONG, 2, generator)
    steps = args.tokens // 4096
    long_steps = int(steps * args.long_share)
    groups = [(o, [g["lr"] for g in o.param_groups]) for o in optimisers(model)]
    step_loss = torch.compile(loss_of, dynamic=False) if args.compile else loss_of
    started, running = time.time(), 0.0
    for step in range(steps):
        factor = min(1.0, (step + 1) / (0.01 * steps), 2.0 * (1 - step / steps))
        for optimiser, rates in groups:
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        batch = next(long if step >= steps - long_steps else short)
        with torch.autocast("cpu", torch.bfloat16):
            loss = step_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser, _ in groups:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        running = 0.98 * running + 0.02 * loss.item() if step else loss.item()
        if step % 50 == 0 or step == steps - 1:
            rate = (step + 1) * 4096 / (time.time() - started)
            print(f"step {step:5d}/{steps}  loss {running:.3f}  {rate:,.0f} tokens/s", flush=True)
    return time.time() - started


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A {parameters:,}-parameter {family} model that `examples/train_tiny_llama.py` trained on the source text of the
Python {python} standard library (98 % of the files; 2 % held out by a hash of their names). It ships with
latentize so that every command, test and number can be run offline on a real, trained model.

| | |
|---|---|
| layers, hidden, MLP | 6, 256, 704 |
| query heads, kv heads, head size | 8, {kv_heads}, 32 |
| cached values per token and layer | {cached} |
| vocabulary | {vocab}, byte-level BPE, tied embeddings |
| training tokens | {tokens:,} (the last {long_share:.0%} in sequences of 2,048, the rest of 512) |
| seconds, tokens/s (two CPU cores) | {seconds:,.0f}, {rate:,.0f} |
| held-out loss / perplexity at 512 | {loss512:.4f} / {ppl512:.3f} |
| held-out loss / perplexity at 2,048 | {loss2048:.4f} / {ppl2048:.3f} |

It knows Python and little else. It is a test of conversions, not an assistant.
The text is under the PSF licence; the weights under Apache-2.0.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--family", choices=CONFIGS, default="llama")
    parser.add_argument("--kv-heads", type=int, default=2, choices=[1, 2, 4, 8])
    parser.add_argument("--tokens", type=int, default=8_000_000)
    parser.add_argument("--long-share", type=float, default=0.15)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(args.vocab)
    stream, heldout = token_stream(tokenizer, "calibration"), token_stream(tokenizer, "heldout")
    print(f"{len(stream):,} tokens to train on, {len(heldout):,} held out", flush=True)
    model = build(args)
    seconds = train(model, stream, args)
    model.set_attn_implementation("sdpa")
    model = model.to(torch.bfloat16).eval()
    losses = {length: heldout_loss(model, heldout, length) for length in (512, LONG)}
    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    facts = {
        "name": args.out.name,
        "family": args.family,
        "kv_heads": args.kv_heads,
        "cached": 2 * args.kv_heads * 32,
        "vocab": args.vocab,
        "parameters": sum(p.numel() for p in model.parameters()),
        "python": sysconfig.get_python_version(),
        "tokens": args.tokens,
        "long_share": args.long_share,
        "seconds": seconds,
        "rate": args.tokens / seconds,
        "loss512": losses[512],
        "ppl512": math.exp(losses[512]),
        "loss2048": losses[LONG],
        "ppl2048": math.exp(losses[LONG]),
    }
    (args.out / "README.md").write_text(CARD.format(**facts))
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
