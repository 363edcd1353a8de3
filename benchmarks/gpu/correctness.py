"""The kernels against their twin in float64, on whatever runs them.

Inputs are new in every case; rows beyond a sequence's length are NaN (or the largest codes), and outputs are filled
with NaN before they are written.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from latentize.runtime.codecs import FORMATS, codec
from latentize.runtime.kernels.launch import absorbed_decode
from latentize.runtime.kernels.reference import absorbed_decode_reference
from latentize.runtime.kernels.storage import Part, Stored
from latentize.runtime.kernels.trial import Variant, passes

__all__ = ["LIMITS", "Case", "cases", "check", "codes", "poisoned", "stored"]

# Of a query's sum, relative to its largest value.
LIMITS = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Case:
    """What is attended.

    Attributes:
        latent, rope: Formats.
        dtype: Of queries and products.
        batch, heads, new, rows, rank, rope_dim: Sizes.
        window: Or ``None``; with four sinks, turned.
        masked: A random mask, too.
    """

    latent: str
    rope: str
    dtype: torch.dtype
    batch: int
    heads: int
    new: int
    rows: int
    rank: int
    rope_dim: int
    window: int | None = None
    masked: bool = False


def cases(device: torch.device) -> list[Case]:
    """On a GPU the sizes of models, in all types; elsewhere small ones, in the types that an interpreter gets right."""
    if device.type == "cuda":
        shapes = [
            (2, 32, 1, 4097, 512, 64),
            (3, 16, 4, 1000, 512, 64),
            (2, 128, 1, 2048, 512, 64),
            (1, 8, 2, 777, 104, 24),
        ]
        dtypes = [torch.bfloat16, torch.float16, torch.float32]
    else:
        shapes, dtypes = [(2, 3, 2, 70, 40, 6)], [torch.float32, torch.float16]
    found = []
    for latent, dtype, shape in itertools.product(FORMATS, dtypes, shapes):
        rope = "int8" if latent in ("fp8", "int8", "int4") else latent
        plain = Case(latent, rope, dtype, *shape)
        every = replace(plain, window=shape[3] // 3, masked=True)
        if device.type == "cuda":
            found += [plain, every]
        else:
            found.append(plain if dtype == torch.float32 else every)
    return found


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """What is allocated meanwhile is NaN until it is written."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def stored(x_BSn: Tensor, name: str, room: int = 0) -> Stored:
    """Encoded rows, with room behind them that must not be read."""
    tensors = []
    for t in codec(name, x_BSn.shape[-1]).encode(x_BSn):
        worst = float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).max
        tensors.append(torch.cat([t, torch.full_like(t[:, :1], worst).expand(-1, room, -1)], dim=1))
    return Stored(tuple(tensors), name, x_BSn.shape[-1])


def check(case: Case, seed: int, device: torch.device) -> dict[str, Any]:
    """The case, its largest error, and whether that is let pass."""
    g = torch.Generator(device).manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    c = case
    q, q_rope, q_sink = (noise(c.batch, c.heads, c.new, n).to(c.dtype) for n in (c.rank, c.rope_dim, c.rope_dim))
    halves = [stored(noise(c.batch, c.rows, n), f, 16) for f, n in ((c.latent, c.rank), (c.rope, c.rope_dim))]
    lengths = torch.randint(c.new, c.rows + 1, (c.batch,), generator=g, device=device).to(torch.int32)
    options = {
        "window": c.window,
        "sinks": 0 if c.window is None else 4,
        "q_sink_BHTR": None if c.window is None else q_sink,
    }
    options |= {"mask_BTS": noise(c.batch, c.new, c.rows) < 0.5 if c.masked else None}
    call = (q, q_rope, [Part(halves[0], halves[1], c.rows)], lengths, (c.rank + c.rope_dim) ** -0.5)
    with poisoned():
        made, made_lse = absorbed_decode(*call, **options)
    expected, lse = absorbed_decode_reference(*call, **options)
    sees = lse != -torch.inf
    finite = bool(made.isfinite().all()) and torch.equal(made_lse != -torch.inf, sees)
    error = (made.double() - expected).abs().amax(-1) / expected.abs().amax(-1)
    worst = float(error[sees].max()) if finite else float("inf")
    told = {name: str(value) if name == "dtype" else value for name, value in asdict(case).items()}
    return told | {"seed": seed, "error": worst, "limit": LIMITS[c.dtype], "right": worst <= LIMITS[c.dtype]}


def codes(device: torch.device) -> list[dict[str, Any]]:
    """Rows in codes of all widths, with exact ones among them and after them."""
    on_gpu = device.type == "cuda"
    dtypes = [torch.bfloat16, torch.float16, torch.float32] if on_gpu else [torch.float32, torch.float16]
    # Rank, roped components, pairs, heads: SmolLM2 135M, Llama 3.2 1B, Llama 3 8B.
    shapes = [(192, 192, 32, 9), (512, 512, 32, 32), (1024, 1024, 64, 32)] if on_gpu else [(40, 24, 6, 3)]
    found = []
    for dtype, (rank, rope, pairs, heads), masked in itertools.product(dtypes, shapes, (False, True)):
        if dtype == torch.float32 and rank > 512:
            continue
        variant = Variant(device, dtype, "coded", "coded", rank, rope, heads, 1, masked=masked, pairs=pairs, apart=8)
        error, limit = passes(variant)
        told = {name: str(value) for name, value in vars(variant).items() if name in ("dtype", "rank", "pairs")}
        found.append({"latent": "coded", **told, "error": error, "limit": limit, "right": error <= limit})
    return found
