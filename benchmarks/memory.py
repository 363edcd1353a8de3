"""Peak memory of converting a one-billion-parameter checkpoint.

    python benchmarks/memory.py [--folder DIR]

Writes a synthetic Llama-shaped checkpoint (16 layers, hidden 2,048, as Llama-3.2-1B), converts it in a process
of its own, and prints what that process reports. The weights are random: this measures memory and time only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from latentize.demo import bundled_model
from latentize.families import model_spec

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128_256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "dtype": "bfloat16",
}
SHARDS = 3
# Half of the cache. One setting, so that no candidates have to be compared: memory is the same, minutes are saved.
RECIPE = """
method: calibrated
fast: true
kv_lora_rank: 448
qk_rope_head_dim: 64
evaluation_tokens: 4096
"""


def write_checkpoint(folder: Path) -> int:
    """Random weights in three shards; returns the number of parameters."""
    folder.mkdir(parents=True)
    shapes = model_spec(CONFIG).tensor_shapes()
    generator = torch.Generator().manual_seed(0)
    names, weight_map, total = list(shapes), {}, 0
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        tensors = {}
        for name in names[shard * len(names) // SHARDS : (shard + 1) * len(names) // SHARDS]:
            shape = shapes[name]
            random = torch.randn(shape, generator=generator) * 0.02
            tensors[name] = (random if len(shape) > 1 else 1 + random).to(torch.bfloat16)
            weight_map[name], total = file, total + tensors[name].numel()
        save_file(tensors, str(folder / file), metadata={"format": "pt"})
    index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((bundled_model() / name).read_bytes())
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keep the files here instead of in a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "model").exists():
            print(f"{write_checkpoint(folder / 'model'):,} parameters written")
        (folder / "recipe.yaml").write_text(RECIPE)
        command = [sys.executable, "-m", "latentize.cli", "convert", str(folder / "model"), str(folder / "out")]
        command += ["--recipe", str(folder / "recipe.yaml"), "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        report = json.loads(done.stdout.splitlines()[-1])
        print(f"peak RSS {report['peak_rss_bytes'] / 1e9:.2f} GB, {report['seconds']:.0f} s, {report['format']}")


if __name__ == "__main__":
    main()
