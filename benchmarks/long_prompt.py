"""Peak memory of a long prompt: accelerated, and as transformers does it.

    python benchmarks/long_prompt.py [--tokens 32768]

A random deepseek_v3 model (2 layers, hidden 512, 16 heads of 128 + 64, latents of 512 + 64) takes a prompt and
generates 8 tokens, each way in a process of its own; prints the peak resident memory beyond that of the loaded model.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config

from latentize.runtime.accelerate import accelerate


def run(way: str, tokens: int) -> dict[str, float]:
    torch.manual_seed(0)
    config = DeepseekV3Config(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=16,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        q_lora_rank=None,
        first_k_dense_replace=2,
        vocab_size=4096,
        max_position_embeddings=tokens + 64,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    if way == "latentize":
        accelerate(model)
    ids = torch.randint(0, 4096, (1, tokens))
    options = {"prefill_chunk_size": 2048} if way != "transformers" else {}
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.time()
    out = model.generate(ids, max_new_tokens=8, do_sample=False, **options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "way": way,
        "tokens": tokens,
        "beyond_model_mib": (peak - loaded) / 1024,
        "seconds": time.time() - started,
        "last": out[0, -8:].tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--way", choices=["latentize", "transformers", "transformers, in parts"], help="one, here")
    args = parser.parse_args()
    if args.way:
        print(json.dumps(run(args.way, args.tokens)))
        return
    for way in ("latentize", "transformers, in parts", "transformers"):
        command = [sys.executable, __file__, "--tokens", str(args.tokens), "--way", way]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        why = done.stderr.strip().splitlines()[-1:] or [f"ended with status {done.returncode}"]
        print(done.stdout.strip() or f"{way}: {why[0]}", flush=True)


if __name__ == "__main__":
    main()
