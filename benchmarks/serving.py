"""Servers of several engines with several clients at once: a converted model beside its source.

    make engines
    python benchmarks/serving.py source=MODEL converted=OUT --text wiki.valid.txt [--seconds 120] [--clients 8]
    python benchmarks/serving.py --print

Each server is started with the command of docs/engines.md. Clients ask for one completion after the other, each with a
prompt of its own, streamed. Printed are tokens a second of all clients, the time to the first token, the memory of the
server's processes, and how many greedy answers of 64 tokens are those of transformers. llama_cpp.server answers one
request after the other; the others take several together. Writes ``benchmarks/results/serving.json`` and prints
Markdown.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shlex
import signal
import socket
import statistics
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_file
import numpy as np
import torch

import latentize
from latentize.engines.run import engine_python
from latentize.modeling.load import load_model
from latentize.text.documents import documents
from latentize.text.tokenizer import load_tokenizer
from latentize.text.tokens import pack

ROOT = Path(__file__).resolve().parents[1]
ENGINES = ("vllm", "llama.cpp", "transformers")
# Until a server listens.
SECONDS = 600
# What a prompt is cut to, and what is asked for.
PROMPT, ANSWER, COMPARED = 256, 64, 8
PAGE = os.sysconf("SC_PAGE_SIZE")


def recipe(engine: str) -> str:
    """The command of docs/engines.md that serves with an engine."""
    text = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    section = text[text.index("## Serve") :]
    found = re.search(rf"```sh\n# {re.escape(engine)}\n(.+?)```", section, re.S)
    if found is None:
        raise ValueError(f"no recipe for {engine}")
    return found[1].strip().replace("\\\n", " ")


@contextmanager
def serving(engine: str, model: Path, folder: Path) -> Iterator[tuple[str, int]]:
    """A server that listens: its address, and the number of its process group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = shlex.split(recipe(engine).replace("8000", port))
    variables = dict(word.split("=", 1) for word in words if re.fullmatch(r"[A-Z_0-9]+=\S+", word))
    command = [
        str(model) if word in ("out", "out.gguf") else word for word in words if word.split("=")[0] not in variables
    ]
    path = f"{engine_python(engine).parent}:{os.environ['PATH']}"
    environ = {**os.environ, **variables, "PATH": path, "HF_HUB_OFFLINE": "1"}
    log_file = folder / "server.log"
    with log_file.open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environ, cwd=folder, start_new_session=True)
        try:
            address, end = f"http://localhost:{port}/v1", time.time() + SECONDS
            while not listens(address):
                if server.poll() is not None or time.time() > end:
                    raise RuntimeError(f"{engine} does not listen: {log_file.read_text()[-3000:]}")
                time.sleep(1)
            yield address, server.pid
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)


def listens(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/models", timeout=5).read()
    except urllib.error.HTTPError:
        # It does; transformers cannot list the models of a hub cache that is not there.
        return True
    except OSError:
        return False
    return True


def ask(engine: str, address: str, model: str, prompt: str, tokens: int) -> Iterator[str]:
    """A greedy completion, piece by piece."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "seed": 0, "stream": True}
    if engine == "llama.cpp":
        # Its default punishes repetition, greedy or not; transformers refuses entries that it does not know.
        body["repeat_penalty"] = 1.0
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        for line in answer:
            event = line.decode().strip().removeprefix("data: ")
            if event.startswith("{"):
                yield from (choice["text"] for choice in json.loads(event)["choices"] if choice["text"])


def memory(group: int) -> int:
    """Bytes that the processes of a group hold."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(process.name)) == group:
                total += PAGE * int((process / "statm").read_text().split()[1])
        except (OSError, ProcessLookupError):
            continue
    return total


def load(engine: str, address: str, group: int, model: str, prompts: list[str], args: Any) -> dict[str, Any]:
    """All clients at once."""
    answers: list[tuple[float, float, str]] = []
    end, waiting = time.time() + args.seconds, iter(prompts)

    def client() -> None:
        while time.time() < end:
            began, first, text = time.time(), None, ""
            for piece in ask(engine, address, model, next(waiting), ANSWER):
                first = first or time.time() - began
                text += piece
            answers.append((first or time.time() - began, time.time() - began, text))

    clients, most = [threading.Thread(target=client) for _ in range(args.clients)], 0
    began = time.time()
    for thread in clients:
        thread.start()
    while any(thread.is_alive() for thread in clients):
        most = max(most, memory(group))
        time.sleep(1)
    seconds, tokenizer = time.time() - began, load_tokenizer(Path(args.models[0].partition("=")[2]))
    tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for _, _, text in answers)
    firsts = sorted(first for first, _, _ in answers)
    return {
        "answers": len(answers),
        "tokens_per_second": tokens / seconds,
        "first_token": statistics.median(firsts),
        "first_token_slowest_tenth": firsts[int(0.9 * len(firsts))],
        "memory": most,
    }


@torch.no_grad()
def expected(folder: Path, prompts: list[str], dtype: torch.dtype) -> list[str]:
    """What transformers answers."""
    model, tokenizer = load_model(folder, dtype=dtype), load_tokenizer(folder)
    found = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        made = model.generate(ids, max_new_tokens=ANSWER, do_sample=False)
        found.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    return found


def served(engine: str, name: str, folder: Path, texts: list[str], args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        model = folder
        if engine == "llama.cpp":
            model = Path(place) / "out.gguf"
            if (folder / "latentize.json").exists():
                latentize.export(folder, model, kind="f16")
            else:
                llama_file.write(folder, model, np.float16)
        with serving(engine, model, Path(place)) as (address, group):
            # The first answers are slower, whoever gives them.
            found = ["".join(ask(engine, address, str(model), text, ANSWER)) for text in texts[:COMPARED]]
            made = load(engine, address, group, str(model), texts[COMPARED:], args)
    # llama.cpp computes in float32 whatever weights are stored in, the others in the model's own precision.
    dtype = torch.float32 if engine == "llama.cpp" else torch.bfloat16
    same = [a.strip() == b.strip() for a, b in zip(found, expected(folder, texts[:COMPARED], dtype), strict=True)]
    return {"engine": engine, "model": name, "date": datetime.date.today().isoformat(), "same": sum(same), **made}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| engine | model | tokens a second | first token, s: median, slowest tenth | memory, GB | as transformers' |",
        "| -- | -- | -- | -- | -- | -- |",
    ]
    lines += [
        f"| {row['engine']} | {row['model']} | {row['tokens_per_second']:.1f} | {row['first_token']:.2f}, "
        f"{row['first_token_slowest_tenth']:.2f} | {row['memory'] / 1e9:.2f} | {row['same']} of {COMPARED} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--text", type=Path, help="what prompts are cut from")
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--print", action="store_true", help="only print what is there")
    args = parser.parse_args()
    out = ROOT / "benchmarks" / "results" / "serving.json"
    if not args.print:
        tokenizer = load_tokenizer(Path(args.models[0].partition("=")[2]))
        ids_NT = pack(tokenizer, documents((str(args.text),), "all"), tokens=1 << 18, sequence_length=PROMPT)
        texts = tokenizer.batch_decode(ids_NT, skip_special_tokens=True)
        rows = []
        for engine in args.engines:
            for name, _, folder in (model.partition("=") for model in args.models):
                rows.append(served(engine, name, Path(folder), texts, args))
                print(json.dumps(rows[-1]), flush=True)
        facts = {"clients": args.clients, "seconds": args.seconds, "prompt": PROMPT, "answer": ANSWER}
        out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    print(table(json.loads(out.read_text())["rows"]))


if __name__ == "__main__":
    main()
