"""Converts checkpoints that were damaged at random: each is refused with an error of latentize's, or it was no damage.

    OMP_NUM_THREADS=1 python -m tests.mutants [--count 2000] [--first 0]

A mutant is made of its number alone, so one that fails can be made again. What counts as a failure: another exception
than a LatentizeError; a conversion that succeeds with a value that is not finite, or whose output ``verify`` refuses; a
flipped bit that a checksum at hand would have told of; a manifest that does not name the bytes that were read;
anything left beside the model; more than 20 seconds; more than 3 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tests.common import SMALL, text_file
from tests.models import pico

from latentize import api
from latentize.checkpoint import Manifest
from latentize.checkpoint.manifest import sha256
from latentize.errors import LatentizeError
from latentize.evaluation.verify import verify

INDEX = "model.safetensors.index.json"
RECIPE: dict[str, Any] = {
    **SMALL, "tokens": 512, "evaluation_tokens": 256, "selection_tokens": 128, "method": "mha2mla", "selection": "high",
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "format": "native",
}  # fmt: skip
SECONDS, BYTES = 20.0, 3 << 30
JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 2**70, 10**9, 0.0, 0.5, -2.5, 1e-30, 1e300, float("nan"),
    float("inf"), "", "text", "default", "llama", "gelu", "../x", "\x00", [], {}, [1], ["a"], [None, [[]]], {"a": 1},
    {"rope_type": "yarn"}, {"rope_type": "linear"}, {"rope_type": "linear", "factor": 0}, {"rope_theta": "much"},
    {"rope_type": "llama3", "factor": "x"}, {"rope_type": 3}, "float16", "int8",
]  # fmt: skip


def _json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    entries = json.loads(path.read_text())
    changed = change(entries)
    path.write_text(json.dumps(entries if changed is None else changed))


def _text_damage(draw: random.Random, path: Path) -> None:
    """Bytes of a text are lost, changed or added."""
    raw = bytearray(path.read_bytes())
    kind = draw.randrange(5)
    if kind == 0:
        raw = raw[: draw.randrange(len(raw))]
    elif kind == 1:
        for _ in range(draw.randint(1, 4)):
            raw[draw.randrange(len(raw))] = draw.randrange(256)
    elif kind == 2:
        raw = bytearray(b"[" * 100_000)
    elif kind == 3:
        place = draw.randrange(len(raw))
        raw[place:place] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 8)))
    else:
        raw = bytearray(draw.choice([b"", b"{}", b"[]", b"null", b"3", b'"x"', b"\xff\xfe", b"{" * 9]))
    path.write_bytes(bytes(raw))


def config(draw: random.Random, folder: Path) -> None:
    path = folder / "config.json"
    if draw.random() < 0.15:
        return _text_damage(draw, path)

    def change(entries: dict[str, Any]) -> None:
        for _ in range(draw.randint(1, 2)):
            extra = [
                "attention_bias",
                "mlp_bias",
                "rope_scaling",
                "rope_theta",
                "sliding_window",
                "quantization_config",
            ]
            key = draw.choice([*entries, *extra, "layer_types", "auto_map", "pad_token_id", "torch_dtype"])
            if draw.random() < 0.2:
                entries.pop(key, None)
            else:
                entries[key] = draw.choice(JUNK)

    _json(path, change)


def index(draw: random.Random, folder: Path) -> None:
    path = folder / INDEX
    if not path.exists():
        path.write_text(json.dumps({"weight_map": {"model.norm.weight": draw.choice(["x", "model.safetensors"])}}))
        return
    if draw.random() < 0.2:
        return _text_damage(draw, path)

    def change(entries: dict[str, Any]) -> None:
        where = entries["weight_map"]
        name, files = draw.choice(sorted(where)), sorted(set(where.values()))
        kind = draw.randrange(5)
        if kind == 0:
            where.pop(name)
        elif kind == 1:
            where[name] = draw.choice([f for f in files if f != where[name]])
        elif kind == 2:
            where["model.extra"] = draw.choice(files)
        elif kind == 3:
            where[name] = draw.choice([*JUNK, "/etc/hostname", "../model/x", ".", "..", "config.json"])
        else:
            entries["weight_map"] = draw.choice(JUNK)

    _json(path, change)


def header(draw: random.Random, folder: Path) -> None:
    path = draw.choice(sorted(folder.glob("*.safetensors")))
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    data, text = raw[8 + length :], raw[8 : 8 + length]
    kind = draw.randrange(6)
    if kind == 0:
        length = draw.choice([0, 1, length - 1, length + 1, 2**31, 2**63 - 1, draw.randrange(2 * length)])
        path.write_bytes(length.to_bytes(8, "little") + text + data)
        return
    entries = json.loads(text)
    name = draw.choice([n for n in entries if n != "__metadata__"])
    if kind == 1:
        entries[name][draw.choice(["dtype", "shape", "data_offsets"])] = draw.choice([*JUNK, "F16", "F64", "I64"])
    elif kind == 2:
        del entries[name]
    elif kind == 3:
        entries[draw.choice(["x", name + "x", name.upper()])] = entries.pop(name)
    elif kind == 4:
        other = draw.choice([n for n in entries if n != "__metadata__"])
        for key in ("shape", "data_offsets"):
            entries[name][key] = entries[other][key]
        entries["twin" if name == other else "__metadata__"] = dict(entries[name])
    else:
        text = bytearray(text)
        text[draw.randrange(len(text))] = draw.randrange(256)
    text = bytes(text) if kind == 5 else json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def tensors(draw: random.Random, folder: Path) -> None:
    path = draw.choice(sorted(folder.glob("*.safetensors")))
    stored = load_file(str(path))
    name = draw.choice(sorted(stored))
    t = stored[name]
    kind = draw.randrange(8)
    if kind == 0:
        t.view(-1)[draw.randrange(t.numel())] = draw.choice([float("nan"), float("inf"), -float("inf")])
    elif kind == 1:
        t.mul_(draw.choice([0.0, 1e-38, 1e10, 1e20, 1e37]))
        t.clamp_(-3e38, 3e38)
    elif kind == 2:
        stored[name] = draw.choice([t[:-1], t.T, t[None], t.flatten()[:-1], t[..., :0], torch.zeros(())]).contiguous()
    elif kind == 3:
        del stored[name]
    elif kind == 4:
        stored[draw.choice(["model.layers.9.x", "extra", f"{name}.bias"])] = torch.zeros(3)
    elif kind == 5:
        stored[name] = t.to(draw.choice([torch.int8, torch.float8_e4m3fn, torch.int32, torch.bool, torch.complex64]))
    elif kind == 6:
        t.view(-1)[draw.randrange(t.numel())] = draw.choice([3e38, -3e38, 1e-45, -0.0])
    else:
        stored[name] = t.roll(1, 0)
    save_file(stored, str(path), metadata={"format": "pt"})


def bits(draw: random.Random, folder: Path) -> None:
    """A bit of the data flips; three times out of four the hub has left its checksum beside the file."""
    path = draw.choice(sorted(folder.glob("*.safetensors")))
    if draw.random() < 0.75:
        note = folder / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
        note.parent.mkdir(parents=True)
        note.write_text(f"{'0' * 40}\n{sha256(path)}\n1700000000.0\n")
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    raw[draw.randrange(start, len(raw))] ^= 1 << draw.randrange(8)
    path.write_bytes(raw)


def files(draw: random.Random, folder: Path) -> None:
    path = draw.choice(sorted(p for p in folder.iterdir() if p.is_file()))
    kind, raw = draw.randrange(6), path.read_bytes()
    path.unlink()
    if kind == 0:
        path.write_bytes(raw[: draw.randrange(len(raw))])
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to(draw.choice([path.name, "/dev/zero", "/etc/hostname", "nowhere", ".."]))
    elif kind == 3:
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif kind == 4:
        path.write_bytes(raw + bytes(draw.randint(1, 64)))


def tokenizer(draw: random.Random, folder: Path) -> None:
    _text_damage(draw, folder / draw.choice(["tokenizer.json", "tokenizer_config.json"]))


KINDS = [config, config, config, index, header, header, tensors, tensors, bits, files, tokenizer]


class Farm:
    """Makes and judges mutants.

    Args:
        folder: Where sources, text and mutants are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.text = folder, text_file(folder)
        tied = pico(folder, "llama", 2, name="tied", tie_word_embeddings=True)
        sharded = pico(folder, "qwen2", 2, name="sharded", shard="60KB", num_hidden_layers=1)
        self.sources = [tied, sharded, pico(folder, "mistral", 2, name="single", num_hidden_layers=1)]

    def outcome(self, number: int) -> tuple[str, str]:
        """How the mutant was made, and what became of it: ``converted``, the code of an error, or what went wrong."""
        draw, place = random.Random(number), self.folder / f"mutant-{number}"
        model, out = place / "model", place / "out"
        shutil.copytree(draw.choice(self.sources), model)
        mutate = draw.choice(KINDS)
        mutate(draw, model)
        started = time.monotonic()
        try:
            # Their own checks use the disk: what may be left is looked at before.
            result = self._converted(model, out)
        except LatentizeError as error:
            result = error.code if error.where else f"no place in {error}"
        except Exception:
            result = traceback.format_exc()
        left = sorted(p.name for p in place.iterdir())
        if left != (["model", "out"] if result == "converted" else ["model"]):
            result = f"{result}; left: {left}"
        elif result == "converted":
            result = self._checked(model, out)
        if time.monotonic() - started > SECONDS:
            result = f"{result}; it took {time.monotonic() - started:.0f} s"
        shutil.rmtree(place)
        return mutate.__name__, result

    def _converted(self, model: Path, out: Path) -> str:
        api.convert(model, out, data=(self.text,), **RECIPE)
        return "converted"

    def _checked(self, model: Path, out: Path) -> str:
        """``converted`` if the output is sound, and says what it was made from."""
        manifest = Manifest.load(out)
        if manifest.source["files"] != {p.name: sha256(p) for p in model.glob("*.safetensors")}:
            return "the manifest does not name the bytes that were read"
        if (model / ".cache").exists():
            return "a checksum was at hand, and was not compared"
        for path in model.glob("*.safetensors"):
            if any(t.is_floating_point() and not t.isfinite().all() for t in load_file(str(path)).values()):
                return "a value that is not finite was converted"
        try:
            problems = verify(out).problems
        except LatentizeError as error:
            problems = [str(error)]
        return f"the output is not sound: {problems}" if problems else "converted"


def failures(outcomes: dict[int, tuple[str, str]]) -> dict[int, tuple[str, str]]:
    return {n: o for n, o in outcomes.items() if o[1] != "converted" and not (o[1][:2] == "LZ" and len(o[1]) == 5)}


def judged(folder: Path, numbers: range) -> Iterator[tuple[int, tuple[str, str]]]:
    """Each mutant's number and outcome; memory is bounded meanwhile."""
    farm = Farm(folder)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + BYTES, before[1]))
    try:
        for number in numbers:
            yield number, farm.outcome(number)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    outcomes: dict[int, tuple[str, str]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for number, outcome in judged(Path(temporary), range(args.first, args.first + args.count)):
            outcomes[number] = outcome
            for n, (kind, what) in failures({number: outcome}).items():
                print(f"mutant {n}, {kind}: {what}", file=sys.stderr, flush=True)
    wrong = failures(outcomes)
    counts = Counter(f"{kind}: {'failed' if n in wrong else what}" for n, (kind, what) in outcomes.items())
    print(json.dumps({"mutants": len(outcomes), "failed": len(wrong), "outcomes": dict(sorted(counts.items()))}))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
