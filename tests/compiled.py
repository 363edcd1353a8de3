"""Compiles the Triton kernels to PTX for GPUs that are not there.

    python tests/compiled.py [--capability 80 90]

Prints one JSON object a variant: its name, and the size of the PTX.
"""

from __future__ import annotations

import argparse
import json

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from latentize.runtime.codecs import codec
from latentize.runtime.kernels import latent_decode, launch
from latentize.runtime.kernels.storage import Part, Stored

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FLOATS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
KINDS = {torch.uint8: "u8", torch.int8: "i8", torch.int32: "i32", **FLOATS}


def pointer(t: torch.Tensor) -> str:
    return f"*{KINDS[t.dtype]}"


def attend(latent: str, rope: str, dtype: torch.dtype, rank: int, roped: int, page: int, *flags: bool) -> ASTSource:
    """``attend_splits`` with the constants that ``launch`` would give it; flags: window, turned sinks, mask."""
    halves = [
        Stored(codec(f, n).encode(torch.randn(1, page or 4, n)), f, n) for f, n in ((latent, rank), (rope, roped))
    ]
    part = Part(*halves, count=4, table_BP=torch.zeros(1, 1, dtype=torch.int32) if page else None)
    cut = launch.tiles(32, rank, dtype)
    constexprs = launch.constants(part, cut, dtype, *flags)
    stored = {
        f"{n}{s}_ptr": pointer(t)
        for n, h in zip("ck", halves, strict=True)
        for s, t in (("", h.codes), ("_scale", h.scale))
    }
    own = f"*{FLOATS[dtype]}"
    pointers = {"q_ptr": own, "q_rope_ptr": own, "q_sink_ptr": own, **stored, "table_ptr": "*i32", "length_ptr": "*i32"}
    pointers |= {"mask_ptr": "*u8" if flags[2] else own, "out_ptr": "*fp32", "lse_ptr": "*fp32"}
    return source(latent_decode.attend_splits, pointers, constexprs)


def source(kernel: triton.JITFunction, pointers: dict[str, str], constexprs: dict) -> ASTSource:
    names = kernel.arg_names
    rest = {
        name: "fp32" if name == "scale" else "i32" for name in names if name not in pointers and name not in constexprs
    }
    kinds = {**pointers, **rest, **dict.fromkeys(constexprs, "constexpr")}
    return ASTSource(fn=kernel, signature={name: kinds[name] for name in names}, constexprs=constexprs)


def variants() -> dict[str, tuple[ASTSource, launch.Tiles]]:
    found = {}
    plain, everything = (False, False, False), (True, True, True)
    for kind in ("bf16", "fp16", "fp32", "fp8", "int8", "int4"):
        for name, dtype in DTYPES.items():
            if kind in DTYPES and kind != name:
                continue
            roped = "int8" if kind in ("fp8", "int8", "int4") else kind
            for sizes in ((512, 64, 0, *plain), (104, 24, 16, *everything)):
                cut = launch.tiles(32, sizes[0], dtype)
                found[f"{kind}+{roped} in {name}, {sizes}"] = attend(kind, roped, dtype, *sizes), cut
    for name in DTYPES:
        pointers = {"part_ptr": "*fp32", "part_lse_ptr": "*fp32", "out_ptr": f"*{name}", "lse_ptr": "*fp32"}
        constants = {"RANK": 512, "BLOCK_S": 16, "BLOCK_RANK": 64}
        found[f"merge in {name}"] = source(latent_decode.merge_splits, pointers, constants), launch.Tiles(16, 16, 4, 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--match", default="", help="only variants with this in their name")
    args = parser.parse_args()
    for name, (kernel, cut) in variants().items():
        if args.match not in name:
            continue
        for capability in args.capability:
            options = {"num_warps": cut.warps, "num_stages": cut.stages}
            made = triton.compile(kernel, target=GPUTarget("cuda", capability, 32), options=options)
            print(
                json.dumps(
                    {
                        "variant": name,
                        "capability": capability,
                        "ptx": len(made.asm["ptx"]),
                        "shared": made.metadata.shared,
                    }
                )
            )


if __name__ == "__main__":
    main()
