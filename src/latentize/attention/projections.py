"""What a linear module multiplies with, whoever holds its weight; and up-projections that may be asked either way.

A projection may be wrapped or owned by something else: adapters, quantised weights, weights that wait on a disk or in
other processes. Only the module itself always knows what it does, so wherever it can be called it is. Absorption cannot
call: it multiplies with the transpose. There :func:`affine` is the one place that finds the matrix:

    a plain ``nn.Linear``       its weight
    a tensor that stands for it what it dequantises to, or gathers from all processes
    LoRA                        the base's matrix and the active updates
    anything else               what the module answers to the unit vectors, and to zero

B batch, S cached tokens, U up-projections, r kv_lora_rank, N qk_nope_head_dim, V v_head_dim.
"""

from __future__ import annotations

import sys
import weakref
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from latentize.errors import UnsupportedModelError

__all__ = ["Called", "Up", "UpProjections", "affine", "is_plain", "matrix", "up_projections"]

# Relative to the largest answer: int8 activations and bfloat16 stay below, a nonlinearity does not.
_LINEAR = 0.05
_known_linear: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def is_plain(projection: Any) -> bool:
    """Whether the weight is all that a call multiplies with, and lies there as a tensor."""
    return (
        _is_linear(projection)
        and not (projection._forward_hooks or projection._forward_pre_hooks)
        and type(projection.weight) in (nn.Parameter, Tensor)
    )


def _is_linear(projection: Any) -> bool:
    # What offloads weights puts another ``forward`` on the instance.
    return getattr(type(projection), "forward", None) is nn.Linear.forward and "forward" not in vars(projection)


def matrix(projection: Any, size: int, like: Tensor | None = None) -> Tensor:
    """What a linear module multiplies with, ``[out, in]``, with gradients; arguments as for :func:`affine`."""
    return affine(projection, size, like)[0]


def affine(projection: Any, size: int, like: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Matrix ``[out, in]`` and bias ``[out]``, or ``None``, of what a linear module does now, with gradients.

    Args:
        projection: The module.
        size: How many features it takes.
        like: Has the precision and the device of what it is called with; by default those of its own parameters.

    Raises:
        UnsupportedModelError: LZ213, it cannot be called by itself, or is not linear.
    """
    if is_plain(projection):
        return projection.weight, projection.bias
    if _is_linear(projection) and not (projection._forward_hooks or projection._forward_pre_hooks):
        whole = _whole(projection.weight)
        if whole is not None:
            return whole, projection.bias
    if _is_lora(projection):
        return _with_updates(projection, size, like)
    return _asked(projection, size, like)


def _whole(weight: Any) -> Tensor | None:
    """A plain tensor of what a subclass of tensors stands for, if that says."""
    for name in ("full_tensor", "dequantize"):
        method = getattr(type(weight), name, None)
        if method is not None and method is not getattr(Tensor, name, None):
            return getattr(weight, name)()
    return None


def _is_lora(projection: Any) -> bool:
    """Whether it is a layer of peft whose updates are all plain sums, and the same for every sequence."""
    lora = sys.modules.get("peft.tuners.lora.layer")
    if lora is None or not isinstance(projection, lora.Linear) or "forward" in vars(projection):
        return False
    hooked = projection._forward_hooks or projection._forward_pre_hooks
    other = any(projection.lora_variant.get(a) or projection.lora_bias.get(a) for a in projection.active_adapters)
    return not hooked and not other


def _with_updates(projection: Any, size: int, like: Tensor | None) -> tuple[Tensor, Tensor | None]:
    weight, bias = affine(projection.get_base_layer(), size, like)
    if not projection.merged and not projection.disable_adapters:
        for adapter in projection.active_adapters:
            if adapter in projection.lora_A:
                weight = weight + projection.get_delta_weight(adapter).to(weight.dtype)
    return weight, bias


def _asked(projection: Any, size: int, like: Tensor | None) -> tuple[Tensor, Tensor | None]:
    like = _own(projection) if like is None else like
    unit = torch.eye(size + 1, size, dtype=like.dtype, device=like.device)
    answer = _answer(projection, unit)
    zero = answer[size]
    weight = (answer[:size] - zero).mT
    if projection not in _known_linear and not torch.compiler.is_compiling() and not weight.is_meta:
        with torch.no_grad():
            many = torch.cos(torch.arange(4 * size, device=like.device).unflatten(0, (4, size)) ** 1.5).to(like.dtype)
            expected = many.float() @ weight.float().mT + zero.float()
            error = (_answer(projection, many).float() - expected).abs().max()
            if not bool(error <= _LINEAR * expected.abs().max()):
                raise _unreadable(projection, "it is not linear, or differs from call to call")
        _known_linear.add(projection)
    return weight, zero


def _answer(projection: Any, rows: Tensor) -> Tensor:
    """``[n, out]``; asked as one sequence, so that what is told of another batch notices."""
    try:
        made = projection(rows[None])
    except Exception as error:
        raise _unreadable(projection, f"{type(error).__name__}: {error}") from error
    if not isinstance(made, Tensor) or made.shape[:2] != (1, len(rows)) or made.device != rows.device:
        raise _unreadable(projection, f"it answers {getattr(made, 'shape', type(made).__name__)}")
    return made[0]


def _own(projection: Any) -> Tensor:
    """Something of the precision and the device that it computes in."""
    hook = getattr(projection, "_hf_hook", None)
    devices = [getattr(one, "execution_device", None) for one in (*getattr(hook, "hooks", ()), hook)]
    found = next((t for t in (*projection.parameters(), *projection.buffers()) if t.is_floating_point()), None)
    dtype = torch.get_default_dtype() if found is None else found.dtype
    known = [device for device in devices if device is not None]
    # Offloaded weights lie nowhere.
    device = known[0] if known else "cpu" if found is None or found.is_meta else found.device
    return torch.empty((), dtype=dtype, device=device)


def _unreadable(projection: Any, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the matrix of a projection cannot be read: {why}",
        code="LZ213",
        where=f"{type(projection).__module__}.{type(projection).__name__}",
    )


class UpProjections(Protocol):
    """``W_UK`` and ``W_UV`` of a layer, and what else attention over latents asks for; see :class:`Up`."""

    @property
    def k_up_UNr(self) -> Tensor: ...
    @property
    def v_up_UVr(self) -> Tensor: ...
    @property
    def v_up_bias_UV(self) -> Tensor | None: ...
    @property
    def softmax_scale(self) -> float: ...
    @property
    def softcap(self) -> float: ...
    @property
    def key_scales(self) -> int: ...
    @property
    def sink_H(self) -> Tensor | None: ...
    @property
    def scales_values(self) -> bool: ...
    @property
    def requires_grad(self) -> bool: ...
    def up(self, c_B1Sr: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Up:
    """Up-projections that lie there as tensors.

    Attributes:
        k_up_UNr, v_up_UVr: ``W_UK`` and ``W_UV``.
        softmax_scale: Factor on the logits.
        softcap: What they are bent below; 0 is not at all.
        key_scales: How many factors of keys are cached behind the roped key.
        sink_H: Logits that take a share of attention, or ``None``.
        v_up_bias_UV: Added to values; one of keys drops out of the softmax.
        scales_values: Whether values are multiplied by those factors, too.
    """

    k_up_UNr: Tensor
    v_up_UVr: Tensor
    softmax_scale: float
    softcap: float = 0.0
    v_up_bias_UV: Tensor | None = None
    key_scales: int = 0
    sink_H: Tensor | None = None
    scales_values: bool = False

    @property
    def requires_grad(self) -> bool:
        return self.k_up_UNr.requires_grad or self.v_up_UVr.requires_grad

    def up(self, c_B1Sr: Tensor) -> tuple[Tensor, Tensor]:
        """Un-roped keys ``[B, U, S, N]`` and values ``[B, U, S, V]`` of latents."""
        v_BUSV = c_B1Sr @ self.v_up_UVr.mT
        return c_B1Sr @ self.k_up_UNr.mT, v_BUSV if self.v_up_bias_UV is None else v_BUSV + self.v_up_bias_UV[:, None]


@dataclass
class Called:
    """Up-projections of a module that is called: its matrix is looked for where tokens are decoded absorbed.

    Attributes:
        projection: From latents to ``U (N + V)`` features.
        sizes: ``r``, ``N`` and ``V``.
        softmax_scale, softcap, key_scales, sink_H, scales_values: As of :class:`Up`.
        like: Has the precision and the device of latents.
    """

    projection: Any
    sizes: tuple[int, int, int]
    softmax_scale: float
    softcap: float
    like: Tensor
    key_scales: int = 0
    sink_H: Tensor | None = None
    scales_values: bool = False
    _up: Up | None = field(default=None, init=False)

    @property
    def _found(self) -> Up:
        if self._up is None:
            weight, bias = affine(self.projection, self.sizes[0], self.like)
            more = (self.softmax_scale, self.softcap, self.key_scales, self.sink_H, self.scales_values)
            self._up = _split(weight, bias, self.sizes, *more)
        return self._up

    @property
    def k_up_UNr(self) -> Tensor:
        return self._found.k_up_UNr

    @property
    def v_up_UVr(self) -> Tensor:
        return self._found.v_up_UVr

    @property
    def v_up_bias_UV(self) -> Tensor | None:
        return self._found.v_up_bias_UV

    @property
    def requires_grad(self) -> bool:
        return any(p.requires_grad for p in self.projection.parameters())

    def up(self, c_B1Sr: Tensor) -> tuple[Tensor, Tensor]:
        """As of :class:`Up`."""
        _, nope, value = self.sizes
        made_BUSd = self.projection(c_B1Sr[:, 0]).unflatten(-1, (-1, nope + value)).transpose(1, 2)
        k_nope_BUSN, v_BUSV = made_BUSd.split([nope, value], dim=-1)
        return k_nope_BUSN, v_BUSV


def _split(
    weight: Tensor,
    bias: Tensor | None,
    sizes: tuple[int, int, int],
    softmax_scale: float,
    softcap: float,
    key_scales: int,
    sink_H: Tensor | None,
    scales_values: bool,
) -> Up:
    _, nope, value = sizes
    k_up_UNr, v_up_UVr = weight.unflatten(0, (-1, nope + value)).split([nope, value], dim=1)
    bias_UV = None if bias is None else bias.unflatten(0, (-1, nope + value))[:, nope:]
    return Up(k_up_UNr, v_up_UVr, softmax_scale, softcap, bias_UV, key_scales, sink_H, scales_values)


def up_projections(
    projection: Any,
    sizes: tuple[int, int, int],
    softmax_scale: float,
    softcap: float,
    like: Tensor,
    key_scales: int = 0,
    sink_H: Tensor | None = None,
    scales_values: bool = False,
) -> UpProjections:
    """Of a layer; arguments as of :class:`Called`."""
    more = (key_scales, sink_H, scales_values)
    if is_plain(projection):
        return _split(projection.weight, projection.bias, sizes, softmax_scale, softcap, *more)
    return Called(projection, sizes, softmax_scale, softcap, like, *more)
