"""One decoder layer of the source in memory, and text on its way through it.

The layer is transformers' own module: whatever a family does around its attention is done as transformers does it.

B batch, T tokens, D hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from latentize.attention.grouped import AttentionWeights
from latentize.attention.masks import causal_mask
from latentize.attention.spec import AttentionSpec
from latentize.modeling.precision import Precision, Use
from latentize.text.tokens import Placed

__all__ = ["MULTIPLIED", "TOKENS_AT_ONCE", "SourceLayer", "Stream"]

# Tokens that go through a layer at once.
TOKENS_AT_ONCE = 2048
# Tensors of a layer that it does nothing with but to multiply by them.
MULTIPLIED = tuple(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down", "gate_up"))


@dataclass(frozen=True)
class Stream(Placed):
    """Text on its way through the layers.

    Attributes:
        hidden_NTD: Its hidden states, float32.
        positions_NT: As in :class:`Placed`.
    """

    hidden_NTD: Tensor
    positions_NT: Tensor

    @property
    def reach(self) -> int:
        """Distances between its tokens, from none to the largest."""
        return int((self.positions_NT[:, -1] - self.positions_NT[:, 0]).max()) + 1

    def jumps(self) -> bool:
        """Whether a token is not where the one before it says."""
        return bool((self.positions_NT.diff(dim=1) != 1).any())

    def clone(self) -> Stream:
        """A copy that may go another way."""
        return Stream(self.hidden_NTD.clone(), self.positions_NT)


@dataclass
class SourceLayer:
    """One decoder layer in memory.

    Attributes:
        index: Its number.
        tensors: Of transformers' module, in the stored precision, by name without the layer's prefix.
        spec: Its attention; ``None`` where the layer stays as it is.
        weights: That attention, in float32.
        names: What plays which role in it.
        window: Tokens that its own attention sees, where that is a sliding window.
        chunk: Tokens of a chunk, where its own attention sees no others.
        additive: Whether its own attention wants a mask that is added.
        precision: What it multiplies in bfloat16.
        residual_scale: Factor on what the attention adds to the residual stream.
        at_once: Tokens that go through it at once; at least one sequence does.
    """

    index: int
    tensors: dict[str, Tensor]
    spec: AttentionSpec | None
    weights: AttentionWeights | None
    names: Callable[[str], str]
    _module: nn.Module
    _rotary: Callable[..., Any]
    window: int | None = None
    chunk: int | None = None
    additive: bool = False
    precision: Precision = field(default_factory=Precision)
    residual_scale: float = 1.0
    at_once: int = TOKENS_AT_ONCE

    def _call(self, module: nn.Module, hidden_BTD: Tensor, positions: Tensor, use: Use) -> Any:
        # Within somebody else's autocast it stays as that is.
        kind = hidden_BTD.device.type
        narrow = self.precision.narrow(use) or torch.is_autocast_enabled(kind)
        with torch.autocast(kind, torch.bfloat16, enabled=narrow):
            out = module(
                hidden_states=hidden_BTD,
                attention_mask=self._mask(hidden_BTD),
                position_ids=positions,
                position_embeddings=self._rotary(hidden_BTD, positions),
            )
        return out[0] if isinstance(out, tuple) else out

    def _mask(self, hidden_BTD: Tensor) -> Tensor | None:
        """None where attention is causal and knows it."""
        tokens = hidden_BTD.shape[1]
        if not self.additive and tokens <= min(self.window or tokens, self.chunk or tokens):
            return None
        narrow = {"window": self.window, "chunk": self.chunk}
        allowed_TT = causal_mask(tokens, tokens, **narrow, device=hidden_BTD.device)[None, None]
        if not self.additive:
            return allowed_TT
        lowest = torch.finfo(hidden_BTD.dtype).min
        return torch.zeros_like(allowed_TT, dtype=hidden_BTD.dtype).masked_fill(~allowed_TT, lowest)

    @property
    def attention(self) -> Any:
        """The module that is, or stands for, its attention."""
        return getattr(self._module, self.names("attention"))

    @attention.setter
    def attention(self, module: nn.Module) -> None:
        setattr(self._module, self.names("attention"), module)

    def normalise(self, hidden_BTD: Tensor) -> Tensor:
        """What the layer's attention sees of the residual stream."""
        return self._through("input_norm", hidden_BTD)

    def added(self, made_BTD: Tensor) -> Tensor:
        """What the attention's output adds to the residual stream."""
        through_BTD = self._through("post_norm", made_BTD)
        return through_BTD if self.residual_scale == 1.0 else self.residual_scale * through_BTD

    @property
    def added_factor(self) -> float | None:
        """What :meth:`added` multiplies by, or ``None`` where it is not linear."""
        return None if self.names("post_norm") else self.residual_scale

    def _through(self, role: str, x_BTD: Tensor) -> Tensor:
        # Some families have no norm there.
        name = self.names(role)
        return getattr(self._module, name)(x_BTD) if name else x_BTD

    def hold_as_stored(self) -> None:
        """What is multiplied in bfloat16 anyway need not be converted at every step."""
        if not self.precision.faster:
            return
        for name in MULTIPLIED:
            if name in self.tensors and self.tensors[name].dtype == torch.bfloat16:
                owner: Any = self._module.get_submodule(name.rpartition(".")[0])
                owner.weight = nn.Parameter(self.tensors[name].to(owner.weight.device), requires_grad=False)

    def forget(self) -> None:
        """Let go of what only a conversion needs: the tensors as stored, the source's attention as weights."""
        self.tensors, self.weights = {}, None

    def release(self) -> None:
        """Let go of all memory; whoever still holds the layer holds its description."""
        self.forget()
        self._module = nn.Module()

    def with_attention(self, attention: nn.Module | None) -> Callable[[Stream], Stream]:
        """The layer as a differentiable function, with another attention."""
        if attention is not None:
            self.attention = attention
        return lambda s: Stream(self._call(self._module, s.hidden_NTD, s.positions_NT, Use.MEASURED), s.positions_NT)

    @torch.no_grad()
    def stream(
        self, text: Stream, attention: nn.Module | None = None, use: Use = Use.MEASURED
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Advance hidden states through the layer, in place and part by part.

        Args:
            text: Hidden states that enter it; each part holds those that leave it once it was yielded.
            attention: Stands in for the layer's own attention.
            use: What it is for.

        Yields:
            Which sequences, the attention's normalised input, and the residual stream after the attention.
        """
        size, original = max(1, self.at_once // text.length), self.attention
        kept: list[Tensor] = []

        def keep(_: nn.Module, args: tuple, kwargs: dict, result: tuple[Tensor, Any]) -> None:
            kept[:] = [kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], result[0]]

        self.attention = attention or original
        hook = self.attention.register_forward_hook(keep, with_kwargs=True)
        try:
            for start in range(0, len(text), size):
                part = text[start : start + size]
                after = self._call(self._module, part.hidden_NTD, part.positions_NT, use)
                x_BTD, y_BTD = kept
                residual = part.hidden_NTD + self.added(y_BTD)
                part.hidden_NTD.copy_(after)
                yield slice(start, start + size), x_BTD, residual
        finally:
            self.attention = original
            hook.remove()

    def with_kv_heads(self, w: AttentionWeights, repeat: int) -> nn.Module:
        """The layer's attention with the weights of ``w``, each kv head serving ``repeat`` of its own."""
        attention: Any = copy.deepcopy(self.attention)
        attention.o_proj.weight = nn.Parameter(w.o_DHd.flatten(1), requires_grad=False)
        if hasattr(attention, "qkv_proj"):
            k, v = (t.repeat_interleave(repeat, dim=0).flatten(0, 1) for t in (w.k_GdD, w.v_GdD))
            fused = torch.cat([w.q_HdD.flatten(0, 1), k, v])
            attention.qkv_proj.weight = nn.Parameter(fused, requires_grad=False)
            return attention
        parts = {
            "q": (w.q_HdD, w.q_bias_Hd, 1), "k": (w.k_GdD, w.k_bias_Gd, repeat), "v": (w.v_GdD, w.v_bias_Gd, repeat)
        }  # fmt: skip
        for name, (heads, bias, times) in parts.items():
            projection = getattr(attention, f"{name}_proj")
            weight = heads.repeat_interleave(times, dim=0).flatten(0, 1)
            projection.weight = nn.Parameter(weight, requires_grad=False)
            if bias is not None:
                projection.bias = nn.Parameter(bias.repeat_interleave(times, dim=0).flatten(), requires_grad=False)
        assert isinstance(attention, nn.Module)
        return attention

    @torch.no_grad()
    def run(self, text: Stream, attention: nn.Module | None = None, use: Use = Use.MEASURED) -> None:
        """Advance hidden states through the layer, in place; arguments as for :meth:`stream`."""
        if self.spec is None and attention is None:
            size = max(1, self.at_once // text.length)
            for part in text.split(size):
                part.hidden_NTD.copy_(self._call(self._module, part.hidden_NTD, part.positions_NT, use))
            return
        for _ in self.stream(text, attention, use):
            pass
