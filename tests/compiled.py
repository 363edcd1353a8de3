"""Compiles the Triton kernels to PTX for GPUs that are not there.

    python tests/compiled.py [--capability 80 90] [--sizes 512+64 1024+256] [--queries 16 32] [--match int4]

Prints one JSON object a variant: its name, the size of the PTX, and the bytes of shared memory that a program takes.
Pointers and strides of 16 bytes are marked as such, as a launch would: then loads are asynchronous, through shared
memory. So are they compiled unaligned, which is what a cache of odd sizes gets.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from latentize.runtime.codecs import Coded, codec
from latentize.runtime.kernels import coded_decode, latent_decode, launch
from latentize.runtime.kernels.storage import Part, Stored, plain_part
from latentize.runtime.means import Means

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FLOATS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
AXES = ((0, "outer"), (1, "token"))
KINDS = {torch.uint8: "u8", torch.int8: "i8", torch.int32: "i32", **FLOATS}


def pointer(t: torch.Tensor) -> str:
    return f"*{KINDS[t.dtype]}"


def attend(
    latent: str, rope: str, dtype: torch.dtype, rank: int, roped: int, *flags: bool, queries: int = 32
) -> ASTSource:
    """``attend_splits`` with the constants that ``launch`` would give it; flags: window, turned sinks, mask and
    factors."""
    halves = [Stored(codec(f, n).encode(torch.randn(1, 16, n)), f, n) for f, n in ((latent, rank), (rope, roped))]
    part = Part(*halves, count=4, factors_BSK=torch.randn(1, 16, 4).to(dtype) if flags[2] else None)
    cut = launch.tiles(queries, rank, dtype)
    constexprs = launch.constants(part, cut, dtype, *flags)
    stored = {
        f"{n}{s}_ptr": pointer(t)
        for n, h in zip("ck", halves, strict=True)
        for s, t in (("", h.codes), ("_scale", h.scale))
    }
    own = f"*{FLOATS[dtype]}"
    pointers = {"q_ptr": own, "q_rope_ptr": own, "q_sink_ptr": own, **stored, "length_ptr": "*i32"}
    pointers["factor_ptr"] = own if flags[2] else pointer(halves[0].codes)
    pointers |= {"mask_ptr": "*u8" if flags[2] else own, "out_ptr": "*fp32", "lse_ptr": "*fp32"}
    made = source(latent_decode.attend_splits, pointers, constexprs)
    strides = {f"{n}_{axis}": h.codes.stride(at) for n, h in zip("ck", halves, strict=True) for at, axis in AXES}
    # As Triton's launcher marks arguments that are multiples of 16.
    multiples = [*pointers, *(name for name, stride in strides.items() if stride % 16 == 0)]
    made.attrs = {(list(made.signature).index(name),): [["tt.divisibility", 16]] for name in multiples}
    return made


def attend_coded(what: str, dtype: torch.dtype, rank: int, roped: int, masked: bool, queries: int) -> ASTSource:
    """``attend_coded_splits`` for rows in codes, some of them apart, and for those that are as they are."""
    numbers, means = torch.zeros(1, 8, dtype=torch.int64), Means(torch.zeros(32), torch.zeros(1, dtype=torch.int32))
    if what == "codes":
        codecs = Coded(((2, rank),), 1.0), Coded(((2, roped),), 1.0)
        sizes = (rank, roped)
        halves = [Stored(c.encode(torch.randn(1, 16, n)), "coded", n, c) for c, n in zip(codecs, sizes, strict=True)]
        part = Part(*halves, count=4, apart_BA=numbers)
    else:
        part = plain_part(torch.randn(1, 16, rank + roped).to(dtype), rank, 8, numbers_BE=numbers)
    cut = launch.coded_tiles(queries, rank, dtype)
    own = f"*{FLOATS[dtype]}"
    pointers = {"q_ptr": own, "q_rope_ptr": own, "c_ptr": pointer(part.latent.codes), "k_ptr": pointer(part.rope.codes)}
    pointers |= {"c_place_ptr": "*i32", "k_place_ptr": "*i32", "word_ptr": "*fp16", "frequency_ptr": "*fp32"}
    pointers |= {"start_ptr": "*i32", "number_ptr": "*i64", "apart_ptr": "*i64", "length_ptr": "*i32"}
    pointers |= {"mask_ptr": "*u8" if masked else own, "out_ptr": "*fp32", "lse_ptr": "*fp32"}
    made = source(coded_decode.attend_coded_splits, pointers, launch.coded_constants(part, cut, dtype, means, masked))
    made.attrs = {(list(made.signature).index(name),): [["tt.divisibility", 16]] for name in pointers}
    return made


def source(kernel: triton.JITFunction, pointers: dict[str, str], constexprs: dict) -> ASTSource:
    names = kernel.arg_names
    rest = {
        name: "fp32" if name == "scale" else "i32" for name in names if name not in pointers and name not in constexprs
    }
    kinds = {**pointers, **rest, **dict.fromkeys(constexprs, "constexpr")}
    return ASTSource(fn=kernel, signature={name: kinds[name] for name in names}, constexprs=constexprs)


def variants(sizes: list[tuple[int, int]], queries: list[int]) -> dict[str, tuple[ASTSource, launch.Tiles]]:
    """Every format in every precision: plain, and with window, turned sinks and mask; aligned, and not."""
    found = {}
    for kind in ("bf16", "fp16", "fp32", "fp8", "int8", "int4"):
        for name, dtype in DTYPES.items():
            if kind in DTYPES and kind != name:
                continue
            roped = "int8" if kind in ("fp8", "int8", "int4") else kind
            for (rank, rope), count in itertools.product(sizes, queries):
                cut = launch.tiles(count, rank, dtype)
                for what, flag in (("plain", False), ("everything", True)):
                    label = f"{kind}+{roped} in {name}, {rank}+{rope}, {count} queries, {what}"
                    made = attend(kind, roped, dtype, rank, rope, flag, flag, flag, queries=count)
                    found[f"{label}, aligned"] = made, cut
                    unaligned = copy.copy(made)
                    unaligned.attrs = {}
                    found[f"{label}, unaligned"] = unaligned, cut
    for (name, dtype), (rank, rope), count in itertools.product(DTYPES.items(), sizes, queries):
        cut = launch.coded_tiles(count, rank, dtype)
        for what, masked in itertools.product(("codes", "apart"), (False, True)):
            label = f"{what} in {name}, {rank}+{rope}, {count} queries, {'masked' if masked else 'plain'}"
            found[label] = attend_coded(what, dtype, rank, rope, masked, count), cut
    for name in DTYPES:
        pointers = {"part_ptr": "*fp32", "part_lse_ptr": "*fp32", "out_ptr": f"*{name}", "lse_ptr": "*fp32"}
        constants = {"RANK": 512, "BLOCK_S": 128, "BLOCK_RANK": 64}
        found[f"merge in {name}"] = source(latent_decode.merge_splits, pointers, constants), launch.Tiles(16, 16, 4, 1)
    return found


def size(text: str) -> tuple[int, int]:
    rank, _, rope = text.partition("+")
    return int(rank), int(rope)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--sizes", type=size, nargs="+", default=[(512, 64), (104, 24)])
    parser.add_argument("--queries", type=int, nargs="+", default=[32])
    parser.add_argument("--match", nargs="*", default=[], help="only variants with one of these in their name")
    args = parser.parse_args()
    for name, (kernel, cut) in variants(args.sizes, args.queries).items():
        if args.match and not any(part in name for part in args.match):
            continue
        for capability in args.capability:
            options = {"num_warps": cut.warps, "num_stages": cut.stages}
            made = triton.compile(kernel, target=GPUTarget("cuda", capability, 32), options=options)
            told = {"variant": name, "capability": capability, "ptx": len(made.asm["ptx"])}
            print(json.dumps(told | {"shared": made.metadata.shared}), flush=True)


if __name__ == "__main__":
    main()
