"""Run by the python of an environment with llama-cpp-python. Job and result are those of worker_transformers.py.

The cache is float32 and attention is not fused, so that nothing but the file's own types is rounded; unless the job
names another ``cache``.
"""

import ctypes
import json
import os
import sys
from importlib import import_module, metadata

import numpy as np

# As ggml numbers them.
CACHES = {"f32": 0, "f16": 1, "q4_0": 2, "q5_1": 7, "q8_0": 8}


class Engine:
    """llama.cpp through its C functions: the high-level class cannot switch off the repacking of weights."""

    def __init__(self, path, length, cache):
        self.api = import_module("llama_cpp")
        self.api.llama_log_set(_keep, ctypes.c_void_p(0))
        self.api.llama_backend_init()
        options = self.api.llama_model_default_params()
        options.n_gpu_layers = 0
        # On CPUs with AMX any deepseek2 file in f16 or q8_0 stops llama.cpp otherwise.
        options.use_extra_bufts = False
        self.model = self.api.llama_model_load_from_file(path.encode(), options)
        if not self.model:
            sys.exit(f"llama.cpp cannot load {path}: {''.join(_MESSAGES[-5:])}")
        options = self.api.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = length
        options.type_k = options.type_v = CACHES[cache]
        # Values in blocks are read by fused attention alone.
        options.flash_attn_type = int(cache != "f32")
        # Threads that wait for each other on a busy machine take many times as long.
        threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
        options.n_threads = options.n_threads_batch = threads
        self.context = self.api.llama_init_from_model(self.model, options)
        if not self.context:
            sys.exit(f"llama.cpp cannot make a context: {''.join(_MESSAGES[-5:])}")
        self.vocab = self.api.llama_model_get_vocab(self.model)
        self.size = self.api.llama_vocab_n_tokens(self.vocab)

    def clear(self):
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def logits(self, ids, start):
        """Of each of the tokens that are appended at position ``start``."""
        batch = self.api.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place] = token, start + place
            batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
        if self.api.llama_decode(self.context, batch):
            sys.exit("llama_decode failed")
        rows = [
            np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, i), (self.size,)).copy()
            for i in range(len(ids))
        ]
        self.api.llama_batch_free(batch)
        return np.stack(rows)

    def tokenize(self, text):
        encoded = text.encode()
        ids = (ctypes.c_int32 * (len(encoded) + 8))()
        count = self.api.llama_tokenize(self.vocab, encoded, len(encoded), ids, len(ids), False, False)
        return list(ids[:count])


_MESSAGES = []


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _keep(level, text, data):
    _MESSAGES.append(text.decode(errors="replace"))


def main(job):
    engine = Engine(job["model"], max(map(len, job["prompts"])) + job["new_tokens"] + 1, job["cache"])
    arrays = {}
    for number, ids in enumerate(job["prompts"]):
        engine.clear()
        rows = engine.logits(ids, 0)
        arrays[f"logits_{number}"], chosen, last = rows, [], rows[-1]
        for step in range(job["new_tokens"]):
            chosen.append(int(last.argmax()))
            last = engine.logits(chosen[-1:], len(ids) + step)[-1]
        arrays[f"greedy_{number}"] = np.array(chosen, dtype=np.int64)
    np.savez(job["out"], **arrays)
    versions = {"llama-cpp-python": metadata.version("llama-cpp-python")}
    settings = {"cache": job["cache"], "flash_attn": job["cache"] != "f32", "use_extra_bufts": False}
    tokens = [engine.tokenize(text) for text in job["texts"]]
    print(json.dumps({"versions": versions, "settings": settings, "tokens": tokens}))


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as stream:
        main(json.load(stream))
