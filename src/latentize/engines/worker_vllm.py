"""Run by the python of an environment with vLLM. Job and result are those of worker_transformers.py.

Log-probabilities take the place of logits; those of the last token of a prompt are not asked for, and are NaN.
"""

import json
import os
import sys
from importlib import import_module, metadata

import numpy as np

# One process, no binding of threads to cores that others use too.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


# What its attention on CPUs is compiled for, where latents are expanded: asked of the kernel, its own list lacks 48.
_HEAD_SIZES = (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def settings(job):
    with open(os.path.join(job["model"], "config.json"), encoding="utf-8") as stream:
        config = json.load(stream)
    chosen = {
        "skip_tokenizer_init": True,
        "dtype": job["dtype"],
        "enforce_eager": True,
        "enable_prefix_caching": False,
        # The CPU's rotary kernel is wrong for interleaved pairs; this takes the one in PyTorch.
        "compilation_config": {"custom_ops": ["none"]},
    }
    # The latent backend of CPUs is made for these sizes; for others latents are expanded.
    if (config["kv_lora_rank"], config["qk_rope_head_dim"]) == (512, 64):
        return {**chosen, "attention_backend": "CPU_MLA"}, False
    size = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    if size not in _HEAD_SIZES:
        sys.exit(f"on CPUs it takes latents of 512 + 64, or heads of {_HEAD_SIZES}; these are of {size}. GPUs take any")
    os.environ["VLLM_MLA_DISABLE"] = "1"
    return chosen, True


def main(job):
    options, expanded = settings(job)
    vllm = import_module("vllm")
    length = max(map(len, job["prompts"])) + job["new_tokens"]
    engine = vllm.LLM(job["model"], max_model_len=length, max_logprobs=-1, **options)
    sampling = vllm.SamplingParams(temperature=0, max_tokens=job["new_tokens"], ignore_eos=True, detokenize=False)
    asking = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1, detokenize=False)
    arrays, inputs = {}, [{"prompt_token_ids": ids} for ids in job["prompts"]]
    for number, done in enumerate(engine.generate(inputs, sampling, use_tqdm=False)):
        arrays[f"greedy_{number}"] = np.array(done.outputs[0].token_ids, dtype=np.int64)
    for number, given in enumerate(inputs):
        found = engine.generate([given], asking, use_tqdm=False)[0].prompt_logprobs[1:]
        size = max(max(row) for row in found) + 1
        rows = np.full((len(found) + 1, size), np.nan, dtype=np.float32)
        for place, row in enumerate(found):
            for token, entry in row.items():
                rows[place, token] = entry.logprob
        arrays[f"logits_{number}"] = rows
    np.savez(job["out"], **arrays)
    names = ("vllm", "vllm-cpu", "torch", "transformers")
    installed = {each.metadata["Name"] for each in metadata.distributions()}
    versions = {name: metadata.version(name) for name in names if name in installed}
    reported = {**options, "latents": "expanded (VLLM_MLA_DISABLE=1)" if expanded else "absorbed"}
    print(json.dumps({"versions": versions, "settings": reported, "tokens": None}))


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as stream:
        main(json.load(stream))
