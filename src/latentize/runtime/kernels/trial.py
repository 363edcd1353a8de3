"""Each variant of the kernels is tried once on a device, against its twin, before it is trusted there.

A compiler that cannot build a variant, a chip without the shared memory for it, or wrong sums cost a warning and the
kernel, not the answer. Sums of what was quantised are compared with those of what is restored from it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentize.attention.quantizer import GROUP, WIDTHS, Segments
from latentize.runtime.codecs import Coded, codec
from latentize.runtime.kernels.launch import absorbed_decode, coded_decode
from latentize.runtime.kernels.reference import absorbed_decode_reference, coded_decode_reference
from latentize.runtime.kernels.storage import Part, Stored, plain_part
from latentize.runtime.means import Means

__all__ = ["Variant", "passes", "works"]

_ROWS = 80
# Of a query's sum, relative to its largest value.
_LIMITS = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for.

    Attributes:
        device, dtype: Of the queries.
        latent, rope: Formats of the rows.
        rank, rope_dim: Their sizes.
        queries: Heads times new tokens.
        new: New tokens.
        window, turned, masked: What is asked for.
        pairs: Frequencies that the means of keys are turned by, for rows in codes; else 0.
        apart: Rows that are in no code among those that are.
        factors: On the logits of a row.
    """

    device: torch.device
    dtype: torch.dtype
    latent: str
    rope: str
    rank: int
    rope_dim: int
    queries: int
    new: int
    window: bool = False
    turned: bool = False
    masked: bool = False
    pairs: int = 0
    apart: int = 0
    factors: int = 0


_tried: dict[Variant, bool] = {}


def works(
    q_BHTr: Tensor,
    q_rope_BHTR: Tensor,
    parts: Sequence[Part],
    *,
    window: int | None = None,
    q_sink_BHTR: Tensor | None = None,
    mask_BTS: Tensor | None = None,
    means: Means | None = None,
    **_: object,
) -> bool:
    """Whether the kernels do such calls right: those of ``launch.absorbed_decode``, or with ``means`` those of
    ``launch.coded_decode``."""
    options: dict[str, Any] = {"masked": mask_BTS is not None}
    if means is None:
        factors_BSK = parts[0].factors_BSK
        options |= {"window": window is not None, "turned": q_sink_BHTR is not None}
        options |= {"factors": 0 if factors_BSK is None else factors_BSK.shape[2]}
    else:
        apart_BA = parts[0].apart_BA
        options |= {"pairs": len(means.frequencies_F), "apart": 0 if apart_BA is None else apart_BA.shape[1]}
    heads, new = q_BHTr.shape[1:3]
    # Rows in codes come with others, which are tried with them.
    for part in parts if means is None else parts[:1]:
        formats, sizes = (part.latent.format, part.rope.format), (part.latent.size, part.rope.size, heads * new, new)
        variant = Variant(q_BHTr.device, q_BHTr.dtype, *formats, *sizes, **options)
        if variant not in _tried:
            if q_BHTr.is_cuda and torch.cuda.is_current_stream_capturing():
                # Nothing can be compared here; whoever captures has warmed up, or gets the twin.
                return False
            _tried[variant] = _passes_or_warns(variant)
        if not _tried[variant]:
            return False
    return True


def _passes_or_warns(variant: Variant) -> bool:
    try:
        worst, limit = passes(variant)
        trouble = None if worst <= limit else f"an error of {worst:.1e}"
    except Exception as error:  # whatever a compiler or a driver may raise
        trouble = f"{type(error).__name__}: {error}"
    if trouble is not None:
        warnings.warn(f"latentize decodes without its Triton kernel: {variant}: {trouble}", stacklevel=2)
    return trouble is None


@torch.no_grad()
def passes(variant: Variant) -> tuple[float, float]:
    """The largest error of a small call of that variant, and the largest that is let pass."""
    v, heads = variant, variant.queries // variant.new
    generator = torch.Generator(v.device).manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=v.device)

    q, q_rope, q_sink = (noise(1, heads, v.new, n).to(v.dtype) for n in (v.rank, v.rope_dim, v.rope_dim))
    lengths = torch.full((1,), _ROWS - 1, dtype=torch.int32, device=v.device)
    options: dict[str, Any] = {"mask_BTS": noise(1, v.new, _ROWS) < 1 if v.masked else None}
    scale = (v.rank + v.rope_dim) ** -0.5
    if v.pairs:
        q_rope = torch.cat([q_rope, noise(1, heads, v.new, 2 * v.pairs).to(v.dtype)], dim=-1)
        frequencies_F = 0.1 * torch.rand(v.pairs, generator=generator, device=v.device)
        options["means"] = Means(frequencies_F, torch.zeros(1, dtype=torch.int32, device=v.device))
        parts = _coded_parts(v, noise)
        made, _ = coded_decode(q, q_rope, parts, lengths, scale, **options)
        expected, _ = coded_decode_reference(q, q_rope, parts, lengths, scale, **options)
    else:
        options |= {"window": 40, "sinks": 4} if v.window else {}
        options["q_sink_BHTR"] = q_sink if v.turned else None
        named = ((v.latent, v.rank), (v.rope, v.rope_dim))
        latent, rope = (Stored(codec(name, size).encode(noise(1, _ROWS, size)), name, size) for name, size in named)
        factors_BSK = 1 + noise(1, _ROWS, v.factors).abs() if v.factors else None
        parts = [Part(latent, rope, _ROWS, factors_BSK=factors_BSK)]
        made, _ = absorbed_decode(q, q_rope, parts, lengths, scale, **options)
        expected, _ = absorbed_decode_reference(q, q_rope, parts, lengths, scale, **options)
    if not bool(made.isfinite().all()):
        return float("inf"), _LIMITS[v.dtype]
    error = (made.double() - expected).abs().amax(-1) / expected.abs().amax(-1)
    return float(error.max()), _LIMITS[v.dtype]


def _coded_parts(variant: Variant, noise: Callable[..., Tensor]) -> list[Part]:
    """Rows in codes of all widths, some of them apart, and newer ones as they are."""
    v, coded = variant, _ROWS - 8

    def plain(rows: int, **where: Any) -> Part:
        return plain_part(noise(1, rows, v.rank + v.rope_dim).to(v.dtype), v.rank, rows, **where)

    codecs = (Coded(_every_width(size), 1.0) for size in (v.rank, v.rope_dim))
    sizes = (v.rank, v.rope_dim)
    latent, rope = (Stored(c.encode(noise(1, coded, n)), "coded", n, c) for c, n in zip(codecs, sizes, strict=True))
    recent = plain(_ROWS - coded, first=coded)
    if not v.apart:
        return [Part(latent, rope, coded), recent]
    numbers_1A = 3 * torch.arange(v.apart, dtype=torch.int32, device=v.device)[None]
    return [Part(latent, rope, coded, apart_BA=numbers_1A), plain(v.apart, numbers_BE=numbers_1A), recent]


def _every_width(size: int) -> Segments:
    """Each width for a group of values, as far as they go; the rest has one bit."""
    found, left = [], size
    for bits in sorted(set(WIDTHS) - {0, 1}, reverse=True):
        count = min(GROUP, left)
        found.append((bits, count))
        left -= count
    return (*(entry for entry in found if entry[1]), (1, left), (0, 0))
