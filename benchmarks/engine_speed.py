"""Speed of the bundled model and of a conversion: llama.cpp, transformers, transformers with ``accelerate``.

    python benchmarks/engine_speed.py OUT [--contexts 512,2048] [--rounds 3] [--threads 1]

Prompt and decode tokens a second. All are measured in turns, and the median over the rounds is kept: on a machine that
does something else as well, the quotients mean more than the numbers. Contexts beyond what the models were trained on
are computed all the same; only time is measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import llama_file
import torch

import latentize
from latentize.engines.run import engine_python
from latentize.modeling.load import load_model

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "models" / "tiny-llama-gqa"
STEPS = 16

# In the environment of llama.cpp: a line in, a line out.
LLAMA = """
import ctypes, json, sys, time
import llama_cpp as api
keep = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *a: None)
api.llama_log_set(keep, ctypes.c_void_p(0))
api.llama_backend_init()
path, longest, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
options = api.llama_model_default_params()
options.use_extra_bufts, options.n_gpu_layers = False, 0
model = api.llama_model_load_from_file(path.encode(), options)
options = api.llama_context_default_params()
options.n_ctx, options.n_batch, options.n_ubatch = longest, 512, 512
options.n_threads = options.n_threads_batch = threads
context = api.llama_init_from_model(model, options)
def feed(ids, start):
    batch = api.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, start + i, 1, 0
        batch.logits[i] = i == len(ids) - 1
    assert api.llama_decode(context, batch) == 0
    api.llama_batch_free(batch)
    api.llama_get_logits_ith(context, -1)
print("ready", flush=True)
for line in sys.stdin:
    ids, steps = json.loads(line)
    api.llama_memory_clear(api.llama_get_memory(context), True)
    start = time.perf_counter()
    for at in range(0, len(ids), 512):
        feed(ids[at:at + 512], at)
    middle = time.perf_counter()
    for step in range(steps):
        feed([1], len(ids) + step)
    print(json.dumps([middle - start, time.perf_counter() - middle]), flush=True)
"""


class Llama:
    """A GGUF file in llama.cpp, in another process."""

    def __init__(self, path: Path, longest: int, threads: int) -> None:
        command = [str(engine_python("llama.cpp")), "-I", "-c", LLAMA, str(path), str(longest), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def __call__(self, ids: list[int]) -> list[float]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([ids, STEPS]) + "\n")
        self.process.stdin.flush()
        return json.loads(self._line())


class Transformers:
    """A model in this process, in float32."""

    def __init__(self, folder: Path, accelerated: bool) -> None:
        self.model = load_model(folder)
        if accelerated:
            self.model = latentize.accelerate(self.model)

    @torch.no_grad()
    def __call__(self, ids: list[int]) -> list[float]:
        start, cache = time.perf_counter(), None
        for part in torch.tensor([ids]).split(512, dim=1):
            cache = self.model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
        middle = time.perf_counter()
        for _ in range(STEPS):
            self.model(input_ids=torch.tensor([[1]]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return [middle - start, time.perf_counter() - middle]


def measure(out: Path, contexts: list[int], rounds: int, threads: int) -> dict[str, Any]:
    longest, rows = max(contexts) + STEPS + 1, []
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "source.gguf", Path(folder) / "converted.gguf"]
        llama_file.write(SOURCE, files[0])
        latentize.export(out, files[1], kind="f32")
        runs: dict[str, Any] = {
            "source, llama.cpp": Llama(files[0], longest, threads),
            "converted, llama.cpp": Llama(files[1], longest, threads),
            "source, transformers": Transformers(SOURCE, accelerated=False),
            "converted, transformers": Transformers(out, accelerated=False),
            "converted, transformers + accelerate": Transformers(out, accelerated=True),
        }
        for context in contexts:
            ids = torch.randint(4096, (context,), generator=torch.Generator().manual_seed(0)).tolist()
            times: dict[str, list[list[float]]] = {name: [] for name in runs}
            warm_up = 1 if context == contexts[0] else 0
            for turn in range(rounds + warm_up):
                for name, run in runs.items():
                    found = run(ids)
                    if turn >= warm_up:
                        times[name].append(found)
            for name, found in times.items():
                prompt, decode = (median(t[i] for t in found) for i in (0, 1))
                row = {"context": context, "name": name}
                row |= {"prompt_tokens_per_second": context / prompt, "decode_tokens_per_second": STEPS / decode}
                rows.append(row)
                print(json.dumps(row), flush=True)
        for run in runs.values():
            if isinstance(run, Llama):
                run.process.terminate()
    today = datetime.date.today().isoformat()
    return {"date": today, "rounds": rounds, "threads": threads, "dtype": "float32", "steps": STEPS, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a portable conversion of the bundled model")
    parser.add_argument("--contexts", default="512,2048,8192,16384")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", type=Path, default=ROOT / "benchmarks" / "results" / "engine-speed.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    contexts = [int(part) for part in options.contexts.split(",")]
    result = measure(options.out, contexts, options.rounds, options.threads)
    options.save.write_text(json.dumps({"command": " ".join(sys.argv[1:]), **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
