"""Run by the python of an environment with transformers; must not need latentize.

Reads a job (JSON, its path is the only argument): ``model``, ``prompts`` (token ids), ``new_tokens``, ``texts``,
``dtype``, ``out``. Writes ``out`` (npz): for each prompt ``logits_<i>`` [T, vocabulary] and ``greedy_<i>``. Prints one
JSON line: ``versions``, ``settings``, and ``tokens``, the ids of each text.
"""

import json
import sys
from typing import Any

import numpy as np


class _Absent:
    """Keeps latentize out, which may be installed beside transformers."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "latentize":
            raise ModuleNotFoundError(name)


def _greedy(model, ids, count):
    import torch

    cache, step, chosen = None, torch.tensor([ids]), []
    for _ in range(count):
        out = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache, step = out.past_key_values, out.logits[:, -1:].argmax(-1)
        chosen.append(int(step))
    return chosen


def main(job):
    sys.meta_path.insert(0, _Absent())
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"dtype": getattr(torch, job["dtype"]), "local_files_only": True, "output_loading_info": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(job["model"], **options)
    model, info = loaded[0], loaded[1]
    if info["missing_keys"] or info["unexpected_keys"]:
        sys.exit(f"weights that do not fit: {info}")
    tokenizer, arrays = AutoTokenizer.from_pretrained(job["model"], local_files_only=True, trust_remote_code=False), {}
    with torch.no_grad():
        for number, ids in enumerate(job["prompts"]):
            arrays[f"logits_{number}"] = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().numpy()
            arrays[f"greedy_{number}"] = np.array(_greedy(model, ids, job["new_tokens"]), dtype=np.int64)
    np.savez(job["out"], **arrays)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    settings = {"dtype": job["dtype"]}
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in job["texts"]]
    print(json.dumps({"versions": versions, "settings": settings, "tokens": tokens}))


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as stream:
        main(json.load(stream))
