"""One decode step of one layer: absorbed attention over latents, and what else could be done.

Sizes of Llama-3-8B and of DeepSeek's cache: 32 query heads, 8 kv heads of 128; 512 + 64 cached values. bfloat16 where
nothing is said. The cache is full; queries are given. Every contender is a CUDA graph, and checked on new inputs.

B sequences, S cached rows, H query heads, G kv heads, r kv_lora_rank, R qk_rope_head_dim, N, V head sizes.
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu.correctness import LIMITS
from gpu.machine import captured, milliseconds
from latentize.runtime.backends import Backend
from latentize.runtime.heads import Up, decode
from latentize.runtime.kernels.launch import absorbed_decode
from latentize.runtime.kernels.reference import absorbed_decode_reference
from latentize.runtime.static import StaticLatentLayer

__all__ = ["FORMATS", "Sizes", "contenders", "measure"]

FORMATS = ("bf16", "fp8", "int8", "int4")
_PAGE = 64


@dataclass(frozen=True)
class Sizes:
    """Of a layer."""

    heads: int = 32
    groups: int = 8
    head_dim: int = 128
    rank: int = 512
    rope: int = 64
    nope: int = 128
    value: int = 128

    @property
    def scale(self) -> float:
        return (self.nope + self.rope) ** -0.5


@dataclass
class Contender:
    """One way to attend.

    Attributes:
        name: For the table.
        run: One call, always on the same tensors.
        nbytes: Of the cache, that a call reads.
        renew: Puts new values into its inputs, in place.
        expected: What the call should give for sequence 0, in float64; ``None`` where a library is the reference.
    """

    name: str
    run: Callable[[], Tensor]
    nbytes: int
    renew: Callable[[], None]
    expected: Callable[[], Tensor] | None = None


def contenders(
    batch: int, rows: int, device: torch.device, dtype: torch.dtype, sizes: Sizes
) -> Iterator[Callable[[], Contender]]:
    """Made one after another, so that one cache is there at a time."""
    for name in FORMATS:
        for whole in (False, True):
            yield lambda name=name, whole=whole: latent(name, batch, rows, device, dtype, sizes, whole=whole)
    for backend in ("flash", "cudnn"):
        yield lambda backend=backend: grouped(backend, batch, rows, device, dtype, sizes)
    yield lambda: expanded(batch, rows, device, dtype, sizes)
    for library in (flashinfer, flash_mla):
        yield lambda library=library: library(batch, rows, device, dtype, sizes)


def _noise(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype)


def _renewing(*tensors: Tensor) -> Callable[[], None]:
    def renew() -> None:
        for t in tensors:
            t.normal_()

    return renew


def latent(
    name: str, batch: int, rows: int, device: torch.device, dtype: torch.dtype, sizes: Sizes, *, whole: bool
) -> Contender:
    """Ours; ``whole`` is with the products with ``W_UK`` and ``W_UV``, and for 8 bits and fewer the rotations."""
    s, rope = sizes, "bf16" if name == "bf16" else "int8"
    layer = StaticLatentLayer(name, rope, rows)
    layer.attends_rows = True
    # The last row is that of the token that asks.
    for count in (*(min(4096, rows - 1 - start) for start in range(0, rows - 1, 4096)), 1):
        cached, _ = layer.update(*(_noise(device, dtype, batch, 1, count, n) for n in (s.rank, s.rope)))
    parts, lengths = layer.parts(), layer.lengths_B()
    tensors = [t for half in (parts[0].latent, parts[0].rope) for t in half.tensors]
    q, q_rope, q_nope = (_noise(device, dtype, batch, s.heads, 1, n) for n in (s.rank, s.rope, s.nope))
    w_HNr, w_HVr = (_noise(device, dtype, s.heads, n, s.rank) / s.rank**0.5 for n in (s.nope, s.value))
    up, backend = Up(w_HNr, w_HVr, s.scale), Backend("triton")

    def run() -> Tensor:
        if whole:
            return decode(q_nope, q_rope, cached, up, None, backend)
        return absorbed_decode(q, q_rope, parts, lengths, s.scale)[0]

    def expected() -> Tensor:
        first = [type(p)(*(_first(h) for h in (p.latent, p.rope)), p.count) for p in parts]
        if not whole:
            return absorbed_decode_reference(q[:1], q_rope[:1], first, lengths[:1], s.scale)[0]
        turn = cached.rotation_rr
        turn = torch.eye(s.rank, device=device) if turn is None else turn
        inward = q_nope[:1].double() @ w_HNr.double() @ turn.double()
        summed = absorbed_decode_reference(inward, q_rope[:1], first, lengths[:1], s.scale)[0]
        return summed @ turn.double().mT @ w_HVr.double().mT

    label = f"latentize {name}+{rope}" + (", with W_UK and W_UV" if whole else "")
    return Contender(
        label, run, sum(t.numel() * t.element_size() for t in tensors), _renewing(q, q_rope, q_nope), expected
    )


def _first(half: Any) -> Any:
    return type(half)(tuple(t[:1] for t in half.tensors), half.format, half.size)


def grouped(backend: str, batch: int, rows: int, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Contender:
    """The source's attention: GQA-8 by PyTorch, the query heads of a group as queries, which is its fastest form."""
    s = sizes
    q = _noise(device, dtype, batch, s.groups, s.heads // s.groups, s.head_dim)
    k, v = (_noise(device, dtype, batch, s.groups, rows, s.head_dim) for _ in range(2))
    kind = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}[backend]

    def run() -> Tensor:
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(q, k, v)

    def expected() -> Tensor:
        score = q[:1].double() @ k[:1].double().mT * s.head_dim**-0.5
        return score.softmax(-1) @ v[:1].double()

    nbytes = 2 * k.numel() * k.element_size()
    return Contender(f"GQA-{s.groups}, SDPA {backend}", run, nbytes, _renewing(q), expected)


def expanded(batch: int, rows: int, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Contender:
    """transformers' MLA: all keys and values out of all latents, then SDPA."""
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    s = sizes
    config = DeepseekV3Config(
        hidden_size=64, num_attention_heads=s.heads, num_key_value_heads=s.heads, kv_lora_rank=s.rank,
        qk_rope_head_dim=s.rope, qk_nope_head_dim=s.nope, v_head_dim=s.value, q_lora_rank=None,
    )  # fmt: skip
    module = DeepseekV3Attention(config, 0).to(device, dtype).eval()
    q = _noise(device, dtype, batch, s.heads, 1, s.nope + s.rope)
    c, k_rope = (_noise(device, dtype, batch, 1, rows, n) for n in (s.rank, s.rope))

    def run() -> Tensor:
        k, v = module.expand_kv(c, k_rope)
        return F.scaled_dot_product_attention(q, k, v, scale=s.scale)

    def expected() -> Tensor:
        k, v = (t.double() for t in module.expand_kv(c[:1], k_rope[:1]))
        return (q[:1].double() @ k.mT * s.scale).softmax(-1) @ v

    nbytes = (c.numel() + k_rope.numel()) * c.element_size()
    return Contender("transformers MLA, expanded", run, nbytes, _renewing(q), expected)


def _need(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(f"{module} is not installed")


def flashinfer(batch: int, rows: int, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Contender:
    """FlashInfer's paged MLA."""
    _need("flashinfer")
    import flashinfer as library  # type: ignore[import-not-found]

    s, pages = sizes, rows // _PAGE
    q, q_rope = (_noise(device, dtype, batch, s.heads, n) for n in (s.rank, s.rope))
    c, k_rope = (_noise(device, dtype, batch * pages, _PAGE, n) for n in (s.rank, s.rope))
    wrapper = library.mla.BatchMLAPagedAttentionWrapper(torch.empty(128 << 20, dtype=torch.int8, device=device))
    at = torch.arange(batch + 1, dtype=torch.int32, device=device)
    order = torch.arange(batch * pages, dtype=torch.int32, device=device)
    lengths = torch.full((batch,), rows, dtype=torch.int32, device=device)
    sizes_of = (s.heads, s.rank, s.rope, _PAGE)
    wrapper.plan(at, at * pages, order, lengths, *sizes_of, False, s.scale, dtype, dtype)
    nbytes = (c.numel() + k_rope.numel()) * c.element_size()

    def run() -> Tensor:
        return wrapper.run(q, q_rope, c, k_rope, return_lse=False)

    def expected() -> Tensor:
        rows_of = [t[:pages].flatten(0, 1).double() for t in (c, k_rope)]
        score = (q[0].double() @ rows_of[0].mT + q_rope[0].double() @ rows_of[1].mT) * s.scale
        return (score.softmax(-1) @ rows_of[0])[None]

    return Contender("FlashInfer MLA bf16", run, nbytes, _renewing(q, q_rope), expected)


def flash_mla(batch: int, rows: int, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Contender:
    """DeepSeek's FlashMLA; its keys are the whole rows, in pages of 64."""
    _need("flash_mla")
    import flash_mla as library  # type: ignore[import-not-found]

    s, pages = sizes, rows // _PAGE
    q = _noise(device, dtype, batch, 1, s.heads, s.rank + s.rope)
    cache = _noise(device, dtype, batch * pages, _PAGE, 1, s.rank + s.rope)
    table = torch.arange(batch * pages, dtype=torch.int32, device=device).view(batch, pages)
    lengths = torch.full((batch,), rows, dtype=torch.int32, device=device)
    plan, splits = library.get_mla_metadata(lengths, s.heads, 1)

    def run() -> Tensor:
        return library.flash_mla_with_kvcache(
            q, cache, table, lengths, s.rank, plan, splits, softmax_scale=s.scale, causal=True
        )[0]

    def expected() -> Tensor:
        row = cache[:pages].flatten(0, 2).double()
        return ((q[0, 0].double() @ row.mT * s.scale).softmax(-1) @ row[:, : s.rank])[None, None]

    return Contender("FlashMLA bf16", run, cache.numel() * cache.element_size(), _renewing(q), expected)


@torch.no_grad()
def measure(
    make: Callable[[], Contender], batch: int, rows: int, dtype: torch.dtype, bandwidth: float | None
) -> dict[str, Any]:
    """One contender at one point; what cannot run says why. Without a bandwidth (no GPU) it is only checked."""
    point = {"batch": batch, "rows": rows}
    try:
        contender = make()
    except Exception as error:  # whatever a library may raise; it is told, and the rest goes on
        return point | {"name": _name(make), "trouble": f"{type(error).__name__}: {error}"[:300]}
    told = point | {"name": contender.name, "cache_bytes": contender.nbytes}
    try:
        run, out = (contender.run, None) if bandwidth is None else captured(contender.run)
        if bandwidth is not None:
            took = milliseconds(run)
            rate = contender.nbytes / (took / 1e3)
            told |= {"milliseconds": took, "bytes_per_second": rate, "share_of_copy": rate / bandwidth}
        contender.renew()
        # What the graph leaves in its output must come from the new inputs.
        if out is not None:
            out.fill_(float("nan"))
        made = run()
        made = made if out is None else out
        assert contender.expected is not None and made is not None
        expected = contender.expected()
        error = float((made[:1].double() - expected).abs().max() / expected.abs().max())
        return told | {"error": error, "right": error <= LIMITS[dtype]}
    except Exception as error:  # as above: out of memory, a backend that declines
        return told | {"trouble": f"{type(error).__name__}: {error}"[:300]}
    finally:
        contender = run = out = None
        gc.collect()
        torch.cuda.empty_cache()


def _name(make: Callable[[], Contender]) -> str:
    """Of a contender that could not even be made."""
    default = (getattr(make, "__defaults__", None) or ("transformers MLA, expanded",))[0]
    named = getattr(default, "__name__", str(default))
    return f"latentize {named}" if named in FORMATS else named
