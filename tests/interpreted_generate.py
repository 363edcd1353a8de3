"""Whole generations with the Triton kernels, in Triton's interpreter, against the same with their twin in PyTorch.

    python -m tests.interpreted_generate [--cases int4 window] [--trials]

A process of its own: whether Triton interprets is settled when it is imported. Prints one JSON object a case: whether
all tokens are the same, the largest difference of logits relative to the largest logit, who decoded how often, and how
often rows of the kernels' cache were restored, which its prompt has to. ``--trials``: what ``auto`` would try on a GPU.
float32 throughout; rows in formats below it are stored the same for both.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from tests.common import SMALL, relative_error
from tests.mla import prompt, stock
from tests.models import pico
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import latentize
from latentize.runtime.accelerate import backend_of
from latentize.runtime.cache import LatentCache
from latentize.runtime.codecs import FORMATS
from latentize.runtime.kernels.trial import Variant, passes
from latentize.runtime.layer import LatentLayer

# name: arguments of the cache, arguments of ``generate``
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "own type": ({}, {}),
    "bf16": ({"latent": "bf16", "rope": "bf16"}, {}),
    "fp8": ({"latent": "fp8", "rope": "fp8"}, {}),
    "int8": ({"latent": "int8", "rope": "int8"}, {}),
    "int4": ({"latent": "int4", "rope": "int8"}, {}),
    "int4, residual": ({"latent": "int4", "rope": "int8", "residual": 5}, {}),
    "window": ({"window": 12}, {}),
    "int8, window": ({"latent": "int8", "rope": "int8", "window": 12}, {}),
    "int4, window, residual": ({"latent": "int4", "rope": "bf16", "window": 12, "residual": 3}, {}),
    "padded": ({}, {"padded": (0, 4, 22)}),
    "int8, padded": ({"latent": "int8", "rope": "int8"}, {"padded": (0, 4, 22)}),
    "window, padded": ({"window": 12}, {"padded": (0, 4, 15)}),
    "int8, looked up": ({"latent": "int8", "rope": "int8"}, {"prompt_lookup_num_tokens": 3}),
    "int4, beams": ({"latent": "int4", "rope": "int8"}, {"num_beams": 2}),
    "static": ({"max_length": 40}, {}),
    "static, int8": ({"max_length": 40, "latent": "int8", "rope": "int8"}, {}),
    "static, int4": ({"max_length": 40, "latent": "int4", "rope": "int8"}, {}),
    "static, int4, padded": ({"max_length": 40, "latent": "int4", "rope": "int8"}, {"padded": (0, 4, 22)}),
    "codes": ({}, {}),
    "codes, residual": ({"residual": 7}, {}),
    "codes, padded": ({}, {"padded": (0, 4, 22)}),
    "static, codes": ({"max_length": 40}, {}),
    "static, codes, padded": ({"max_length": 40}, {"padded": (0, 4, 22)}),
    "DynamicCache": (DynamicCache, {}),
    "DynamicCache, padded": (DynamicCache, {"padded": (0, 4, 22)}),
    "StaticCache": (StaticCache, {}),
    "StaticCache, padded": (StaticCache, {"padded": (0, 4, 22)}),
}


def cache(model: Any, made: Any) -> Any:
    if isinstance(made, dict):
        return LatentCache(model.config, **made)
    return made(model.config, max_cache_len=40) if made is StaticCache else made()


def generated(model: Any, made: Any, padded: tuple[int, ...] = (), **options: Any) -> Any:
    ids = prompt(len(padded) or 1)
    seen = torch.ones_like(ids)
    for row, count in enumerate(padded):
        ids[row, :count], seen[row, :count] = 0, 0
    options |= {"output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0, "do_sample": False}
    return model.generate(ids, attention_mask=seen, max_new_tokens=6, past_key_values=cache(model, made), **options)


def native(folder: Path, family: str, method: str) -> Any:
    """A converted model; MHA2MLA's has a roped key for each of two kv heads, Qwen3's norms of its keys."""
    source, out = pico(folder, family, name=family), folder / f"{family}-out"
    latentize.convert(source, out, format="native", method=method, keep=0.5, **SMALL)
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


def coded(folder: Path) -> Any:
    """A model whose checkpoint says how its rows are stored."""
    latentize.convert(pico(folder, "qwen2"), folder / "coded", format="native", bytes=0.4, **SMALL)
    return AutoModelForCausalLM.from_pretrained(folder / "coded", dtype=torch.float32).eval()


@contextlib.contextmanager
def restoring() -> Iterator[list[int]]:
    """Counts how often quantised rows are restored."""
    counted, real = [], LatentLayer._restore

    def noted(self: LatentLayer, start: int, stop: int, *rest: Any) -> torch.Tensor:
        counted.append(stop - start)
        return real(self, start, stop, *rest)

    LatentLayer._restore = noted
    try:
        yield counted
    finally:
        LatentLayer._restore = real


def trials() -> None:
    """Every format: plain in float32, with everything in float16."""
    for number, latent in enumerate(FORMATS):
        plain = Variant(torch.device("cpu"), torch.float32, latent, FORMATS[number - 1], 40, 6, 8, 2)
        every = {"window": True, "turned": True, "masked": True, "factors": 4}
        for variant in (plain, dataclasses.replace(plain, dtype=torch.float16, **every)):
            error, limit = passes(variant)
            print(json.dumps({"trial": str(variant), "error": error, "limit": limit}), flush=True)
    codes = Variant(torch.device("cpu"), torch.float32, "coded", "coded", 40, 132, 8, 1, pairs=6, apart=8)
    for variant in (codes, dataclasses.replace(codes, dtype=torch.float16, apart=0, masked=True)):
        error, limit = passes(variant)
        print(json.dumps({"trial": str(variant), "error": error, "limit": limit}), flush=True)


def compared(model: Any, case: str) -> dict[str, Any]:
    made, options = CASES[case]
    fast, plain = (latentize.accelerate(copy.deepcopy(model), backend=name) for name in ("triton", "torch"))
    want = generated(plain, made, **options)
    with restoring() as restored:
        got = generated(fast, made, **options)
    same = torch.equal(got.sequences, want.sequences)
    # Beams of nearly equal scores may change places on the way.
    logits = 0.0 if "num_beams" in options else relative_error(torch.stack(got.logits), torch.stack(want.logits))
    return {"case": case, "same": same, "error": logits, "used": dict(backend_of(fast).used), "restored": len(restored)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--trials", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.trials:
        trials()
    models = {"deepseek_v3": stock("deepseek_v3"), "deepseek_v2": stock("deepseek_v2")}
    with tempfile.TemporaryDirectory() as folder:
        models["norms"] = native(Path(folder), "qwen3", "calibrated")
        models["native"] = native(Path(folder), "qwen2", "mha2mla")
        models["coded"] = coded(Path(folder))
    for number, case in enumerate(CASES):
        # Every case with one kind of model; what depends on the kind of rotation with all.
        stored = [kind for kind in models if (kind == "coded") == ("codes" in case)]
        kinds = stored if case in ("own type", "int8, window") else [stored[-1 if number % 2 else 0]]
        for kind in kinds:
            if case.startswith("StaticCache"):
                kind = "deepseek_v3"  # It wants as many roped keys as latents.
            if case in args.cases:
                print(json.dumps({"model": kind, **compared(models[kind], case)}), flush=True)


if __name__ == "__main__":
    main()
