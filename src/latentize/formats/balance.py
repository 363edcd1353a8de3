"""Scales and axes within the attention of a portable checkpoint, for whoever quantises it.

What makes the latent's norm linear leaves rows of ``kv_a_proj_with_mqa`` a million times smaller than those of the
roped key beside them, and no scale that they share serves both. Three powers of two move along the layer and change
nothing that it computes:

    roped keys ``2^k``, roped queries ``2^-k``       ``k`` brings roped keys to the latent's rows
    un-roped keys ``2^u``, un-roped queries ``2^-u``  ``u`` brings un-roped queries to the roped ones
    values ``2^v``, output projection ``2^-v``        ``v`` brings values to the un-roped keys

The price is paid in activations: roped keys and values are then as small as ``2^-20``, queries as large as ``2^20``,
which bfloat16 and float32 hold as well as any other number and float16 does not. Weights for float16 are not balanced,
and what is to run in that range is taken back to where it was.

Axes are as free as scales: the un-roped part of each head and its values may be rotated, latents changed by any matrix
that has an inverse, and the matrix that reads them changed back. It costs nothing when the model runs. In random axes
no weight stands out of its block (QuIP#, Tseng et al., arXiv 2402.04396, section 3; QuaRot, Ashkboos et al., arXiv
2404.00456). The latents' own are balanced first: with singular values shared out evenly between the matrix that makes
latents and those that read them, the product of the two matrices' norms, and so what rounding either adds, is least.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from latentize.attention.latent import LatentWeights
from latentize.errors import CheckpointError
from latentize.formats.portable import PORTABLE

__all__ = ["KEY", "Balance", "balances", "described", "rebalance", "spread", "unbalance", "unbalanced"]

# Of config.json: [k, u, v] of every layer. Engines do not know it and need not.
KEY = "mla_scale_exponents"
# Far from the ends of bfloat16's range, and beyond what any model needs.
_LARGEST = 80
# Singular values that are nothing beside the largest.
_NOTHING = 1e-10
_MATRICES = ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")


@dataclass(frozen=True)
class Balance:
    """Exponents of two.

    Attributes:
        k_rope: On roped keys; its inverse is on roped queries.
        k_up: On un-roped keys; its inverse is on un-roped queries.
        v_up: On values; its inverse is on the output projection.
    """

    k_rope: int = 0
    k_up: int = 0
    v_up: int = 0

    @classmethod
    def of(cls, parts: Mapping[str, tuple[Tensor, float]], *, roped: bool = True) -> Balance:
        """What brings parts that are stored together to one size: their largest weights, which set the steps of a scale
        that they share, and within a factor of four the root mean squares of their rows.

        Args:
            parts: Under their names in :class:`LatentWeights`: the tensor, and a factor that it is stored with.
            roped: Roped keys may change their size, too.
        """
        sizes = {name: _Size.of(tensor, factor) for name, (tensor, factor) in parts.items()}
        k_rope = _exponent(sizes["kv_a_rD"], sizes["k_rope_PRD"]) if roped else 0
        k_up = _exponent(sizes["q_nope_HND"], sizes["q_rope_HRD"], k_rope)
        return cls(k_rope, k_up, _exponent(sizes["k_up_UNr"], sizes["v_up_UVr"], k_up))

    def undone(self, w: LatentWeights) -> LatentWeights:
        """The layer, of which these are factors, without them."""
        return replace(
            w,
            q_nope_HND=w.q_nope_HND * 2.0**self.k_up,
            q_rope_HRD=w.q_rope_HRD * 2.0**self.k_rope,
            k_rope_PRD=w.k_rope_PRD * 2.0**-self.k_rope,
            k_up_UNr=w.k_up_UNr * 2.0**-self.k_up,
            v_up_UVr=w.v_up_UVr * 2.0**-self.v_up,
            o_DHV=w.o_DHV * 2.0**self.v_up,
        )


def spread(w: LatentWeights, seed: int, *, latent: bool = True) -> LatentWeights:
    """The same layer in random axes, but for what RoPE turns; those of latents balanced.

    Query heads that share a key have axes of their own afterwards, and rounding makes errors of its own in each: what
    they add up to is less than that of one error that they share.

    Args:
        w: Weights, in float64: changing their axes rounds nothing that matters.
        seed: Of the axes.
        latent: Those of latents change, too.
    """
    g, s = torch.Generator().manual_seed(seed), w.spec
    # Drawn in any case, so that the others are the same.
    latent_rr = _rotation(s.kv_lora_rank, g).to(w.kv_a_rD)
    change_rr = back_rr = torch.eye(s.kv_lora_rank).to(w.kv_a_rD)
    if latent:
        change_rr, back_rr = _balancing(w)
        change_rr, back_rr = latent_rr @ change_rr, back_rr @ latent_rr.T
    nope_HNN, value_HVV = (
        torch.stack([_rotation(size, g) for _ in range(s.num_heads)]).to(w.kv_a_rD)
        for size in (s.qk_nope_head_dim, s.v_head_dim)
    )
    share, bias_HN = s.num_heads // s.up_heads, w.q_nope_bias_HN
    return replace(
        w,
        q_nope_HND=nope_HNN @ w.q_nope_HND,
        q_nope_bias_HN=None if bias_HN is None else torch.einsum("hmn,hn->hm", nope_HNN, bias_HN),
        kv_a_rD=change_rr @ w.kv_a_rD,
        k_up_UNr=nope_HNN @ (w.k_up_UNr @ back_rr).repeat_interleave(share, dim=0),
        v_up_UVr=value_HVV @ (w.v_up_UVr @ back_rr).repeat_interleave(share, dim=0),
        o_DHV=torch.einsum("dhv,hwv->dhw", w.o_DHV, value_HVV),
    )


def _balancing(w: LatentWeights) -> tuple[Tensor, Tensor]:
    """A change of a latent's axes, and what undoes it in the matrices that read latents.

    Keys and values count alike, whatever their size. Latents that nothing reads, or that are always zero, become zero.
    """
    parts = (part.flatten(0, 1).double() for part in (w.k_up_UNr, w.v_up_UVr))
    up_nr = torch.cat([part / part.norm().clamp_min(torch.finfo(part.dtype).tiny) for part in parts])
    # U diag(s) Vᵀ of up · down, of which only what the two triangles have is needed.
    up_qr = torch.linalg.qr(up_nr, mode="r").R
    down_qr = torch.linalg.qr(w.kv_a_rD.double().T, mode="r").R
    u, s_q, vh = torch.linalg.svd(up_qr @ down_qr.T, full_matrices=False)
    there_q = s_q > _NOTHING * s_q.amax()
    root_q = torch.where(there_q, s_q, 1.0).rsqrt() * there_q
    change_qr, back_rq = root_q[:, None] * (u.T @ up_qr), down_qr.T @ vh.T * root_q
    missing = len(w.kv_a_rD) - len(s_q)
    change_rr, back_rr = (
        nn.functional.pad(t, p) for t, p in ((change_qr, (0, 0, 0, missing)), (back_rq, (0, missing)))
    )
    # Latents stay about as large as they were.
    size = float(w.kv_a_rD.norm() / (change_rr @ w.kv_a_rD.double()).norm())
    size = size if 0 < size < math.inf else 1.0
    return (size * change_rr).to(w.kv_a_rD), (back_rr / size).to(w.kv_a_rD)


def _rotation(size: int, g: torch.Generator) -> Tensor:
    """Orthonormal rows, evenly distributed (Mezzadri, arXiv math-ph/0609050), in float64."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=g, dtype=torch.float64))
    return q * r.diagonal().sign()


class _Size(NamedTuple):
    rms: float
    largest: float

    @classmethod
    def of(cls, t: Tensor, factor: float) -> _Size:
        low, high = t.aminmax() if t.numel() else (0.0, 0.0)
        rms = float(torch.linalg.vector_norm(t)) / math.sqrt(max(1, t.numel()))
        return cls(rms * factor, max(abs(float(low)), abs(float(high))) * factor)


def _exponent(wanted: _Size, size: _Size, shift: int = 0) -> int:
    """``e`` so that ``size · 2^e`` is about ``wanted · 2^shift``."""
    if not (0 < wanted.rms < math.inf and 0 < size.rms < math.inf):
        # A part that is nothing is of any size.
        return shift
    typical, largest = (round(math.log2(a / b)) for a, b in zip(wanted, size, strict=True))
    # Largest weights that stand far out of their part must not make the rest of it vanish.
    found = shift + max(typical - 1, min(typical + 1, largest))
    return max(-_LARGEST, min(_LARGEST, found))


def balances(config: Mapping[str, Any]) -> list[Balance]:
    """Of every layer, as ``config.json`` has them; none at all where it says nothing.

    Raises:
        CheckpointError: it does not say three whole numbers for each layer.
    """
    layers, found = config["num_hidden_layers"], config.get(KEY)
    if found is None:
        return [Balance()] * layers
    if not isinstance(found, Sequence) or len(found) != layers or not all(_is_balance(entry) for entry in found):
        raise CheckpointError(
            f"{KEY} is not three whole numbers from -{_LARGEST} to {_LARGEST} for each of {layers} layers",
            code="LZ118",
            where=f"config.json, {KEY}",
            fix="convert or download again",
        )
    return [Balance(*entry) for entry in found]


def _is_balance(entry: object) -> bool:
    return isinstance(entry, Sequence) and len(entry) == 3 and all(type(e) is int and abs(e) <= _LARGEST for e in entry)


def described(found: Sequence[Balance]) -> list[list[int]]:
    """As :func:`balances` reads them."""
    return [list(astuple(balance)) for balance in found]


def unbalanced(name: str, stored: Tensor, balance: Balance, config: Mapping[str, Any]) -> Tensor:
    """A tensor of ``DeepseekV3Attention`` without the factors; exact in bfloat16 and float32.

    Args:
        name: Of the tensor within the attention. One that has no factors is given back.
        stored: As it is in the file.
        balance: Of its layer.
        config: ``config.json``.
    """
    if balance == Balance():
        return stored
    heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
    k, u, v = 2.0**balance.k_rope, 2.0**balance.k_up, 2.0**balance.v_up
    if name == "q_proj.weight":
        return _by_rows(stored.unflatten(0, (heads, -1)), nope, u, k).flatten(0, 1)
    if name == "kv_a_proj_with_mqa.weight":
        return _by_rows(stored[None], config["kv_lora_rank"], 1.0, 1 / k)[0]
    if name == "kv_b_proj.weight":
        return _by_rows(stored.unflatten(0, (heads, -1)), nope, 1 / u, 1 / v).flatten(0, 1)
    return stored * v if name == "o_proj.weight" else stored


def _by_rows(t_Hdn: Tensor, at: int, first: float, second: float) -> Tensor:
    return torch.cat([t_Hdn[:, :at] * first, t_Hdn[:, at:] * second], dim=1)


@torch.no_grad()
def unbalance(model: Any) -> bool:
    """Take the factors out of a loaded portable model, in place: for caches and kernels of a narrower range.

    Returns:
        Whether there were any. Where somebody has replaced its matrices (quantised, adapted, sharded), they stay.
    """
    return _scale(model, 1)


@torch.no_grad()
def rebalance(model: Any) -> None:
    """Put back what :func:`unbalance` has taken out; to the bit, since they are powers of two."""
    _scale(model, -1)


def _scale(model: Any, sign: int) -> bool:
    config = model.config.to_dict() if hasattr(model, "config") else {}
    if config.get(KEY) is None or config.get("model_type") not in PORTABLE:
        return False
    found = [
        (name, module, Balance(*(sign * e for e in astuple(balance))))
        for layer, balance in zip(model.base_model.layers, balances(config), strict=True)
        for name, module in layer.self_attn.named_children()
        if name in _MATRICES
    ]
    dtypes = (torch.bfloat16, torch.float32)
    if not all(
        type(m) is nn.Linear and type(m.weight) is nn.Parameter and m.weight.dtype in dtypes for _, m, _ in found
    ):
        return False
    for name, module, balance in found:
        module.weight.copy_(unbalanced(f"{name}.weight", module.weight, balance, config))
    return True
