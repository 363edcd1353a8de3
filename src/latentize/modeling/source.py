"""The source model, run one layer at a time.

Layers are transformers' own modules: built without memory, filled from the checkpoint, run, and emptied again. So
whatever a family does around its attention is done as transformers does it.

B batch, T tokens, D hidden.
"""

from __future__ import annotations

import copy
import inspect
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from latentize.attention.grouped import AttentionWeights, capped
from latentize.attention.masks import causal_mask
from latentize.attention.spec import AttentionSpec
from latentize.checkpoint import Checkpoint, load_config
from latentize.errors import ConfigError
from latentize.families import ModelSpec
from latentize.families.model import CHUNKED, SLIDING
from latentize.machine import give_back_freed_memory, multiplies_bfloat16
from latentize.modeling.body import body_of
from latentize.modeling.canonical import attention_weights, module_tensors
from latentize.modeling.precision import Precision, Use
from latentize.text.tokens import Passages, Placed, require_positions, require_rows

__all__ = ["MULTIPLIED", "VOCAB_AT_ONCE", "SourceLayer", "SourceModel", "Stream", "is_large", "tokens_at_once"]

# From so many parameters on, layers multiply in bfloat16 where that is faster: in float32 it would take hours. On a CPU
# that only emulates bfloat16 it would take days: 0.7 instead of 63 · 10⁹ operations a second were measured.
_LARGE = 200_000_000
# Sequences that go through a layer at once: tokens, and bytes of an activation of its MLP.
_TOKENS_AT_ONCE, _ACTIVATION_BYTES = 2048, 16 << 20
# Tensors of a layer that it does nothing with but to multiply by them.
MULTIPLIED = tuple(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down", "gate_up"))
VOCAB_AT_ONCE = 16_384


def is_large(parameters: int) -> bool:
    """Whether a model is too big to be trained as a whole without being asked to; its layers multiply in bfloat16 where
    that is faster."""
    return parameters > _LARGE


def tokens_at_once(spec: ModelSpec, precision: Precision) -> int:
    """How many tokens go through a layer at once."""
    size = 2 if precision.everything else 4
    return min(_TOKENS_AT_ONCE, max(1, _ACTIVATION_BYTES // (size * spec.intermediate_size)))


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
    at_once: int = _TOKENS_AT_ONCE

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


class SourceModel:
    """A checkpoint as a sequence of layers.

    Args:
        checkpoint: The files.
        spec: Their family's table, applied.
        device: Where layers run.
        hurried: Whether seconds count more than the last digits of statistics.
        trust_remote_code: Whether code of the checkpoint may be run.

    Attributes:
        precision: What is multiplied in bfloat16.
        large: Whether the model is too big to be trained as a whole without being asked to.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        device: str = "cpu",
        *,
        hurried: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        from transformers import AutoModelForCausalLM

        from latentize.modeling.attending import attend_faster

        self.checkpoint, self.spec, self.device = checkpoint, spec, device
        self.large = is_large(sum(math.prod(checkpoint.shape(n)) for n in checkpoint.names()))
        self.precision = Precision(multiplies_bfloat16(torch.device(device).type), self.large, hurried)
        try:
            trust = {"trust_remote_code": trust_remote_code}
            config = load_config(checkpoint.path, **trust)
            # No fused attention bends logits.
            config._attn_implementation = "eager" if spec.additive_masks else "sdpa"
            with torch.device("meta"):
                self._skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **trust).eval()
            attend_faster(self._skeleton)
            self._body = body_of(self._skeleton)
            self._rotary = type(self._body.rotary_emb)(config).to(device) if hasattr(self._body, "rotary_emb") else None
        # Entries that the family's table does not read may be anything.
        except Exception as error:
            raise ConfigError(
                f"transformers cannot make the model: {(str(error) or repr(error)).splitlines()[0]}",
                where=str(checkpoint.config_path),
                fix="take config.json from where the model was published",
            ) from error

    def _float(self, name: str) -> Tensor:
        return self.checkpoint.load(name).to(self.device, torch.float32)

    def embed(self, text: Passages) -> Stream:
        """Hidden states ``[N, T, D]`` in float32 that enter the first layer.

        Raises:
            CheckpointError: a token has no row in the embedding.
            OptionError: a text is longer than positions were learnt.
        """
        name, tokens_NT = self.spec.module("embedding") + ".weight", text.tokens_NT
        require_rows(tokens_NT, self.checkpoint.shape(name)[0], self.checkpoint.path)
        used, which_NT = tokens_NT.cpu().unique(return_inverse=True)
        table = self.checkpoint.load_rows(name, used.tolist()).to(self.device, torch.float32)
        hidden_NTD, positions_NT = self.spec.embedding_scale * table[which_NT], text.positions_NT.to(self.device)
        if learnt := self.spec.module("positions"):
            require_positions(positions_NT, self.spec.max_positions, self.checkpoint.path)
            hidden_NTD += self._float(learnt + ".weight")[positions_NT]
        return Stream(hidden_NTD, positions_NT)

    def layers(self) -> Iterator[SourceLayer]:
        """The decoder layers in order; each lets go of its memory when the next is asked for."""
        for index in range(count := len(self.skeleton_layers())):
            self.checkpoint.ahead(self._names(index))
            layer = self.layer(index)
            self.checkpoint.ahead(self._names(index + 1) if index + 1 < count else ())
            yield layer
            layer.release()
            if self.large:
                give_back_freed_memory()

    def _names(self, index: int) -> list[str]:
        """What files have of a layer."""
        prefix = self.spec.layer_prefix(index)
        return [n for n in self.checkpoint.names() if n.startswith(prefix) and "rotary_emb" not in n]

    def layer(self, index: int) -> SourceLayer:
        """One decoder layer, read from the files."""
        spec, prefix = self.spec, self.spec.layer_prefix(index)
        stored = {name.removeprefix(prefix): self.checkpoint.load(name) for name in self._names(index)}
        stored = self.module_tensors(stored, index)
        module = copy.deepcopy(self.skeleton_layers()[index])
        wide = {name: self._running(name, t) for name, t in stored.items()}
        module.load_state_dict(wide, strict=True, assign=True)
        attention = spec.layer_attention(index)
        return SourceLayer(
            index,
            stored,
            attention,
            None if attention is None else attention_weights(wide, spec),
            spec.module,
            module.requires_grad_(False),
            self.angles(spec.kind(index)),
            spec.window if spec.kind(index) == SLIDING else None,
            spec.window if spec.kind(index) == CHUNKED else None,
            spec.additive_masks,
            self.precision,
            spec.residual_scale,
            tokens_at_once(spec, self.precision),
        )

    def module_tensors(self, stored: dict[str, Tensor], index: int) -> dict[str, Tensor]:
        """Tensors of a layer as transformers' module has them, of those that files have; all without its prefix."""
        return module_tensors(stored, self.spec, index)

    def skeleton_layers(self) -> list[nn.Module]:
        """transformers' layers, without memory."""
        return list(getattr(self._body, self.spec.module("layers")))

    def angles(self, kind: str) -> Callable[..., Any]:
        """Cosines and sines of a kind of layer."""
        rotary = self._rotary
        if rotary is None:
            return lambda hidden_BTD, positions: None
        if "layer_type" in inspect.signature(rotary.forward).parameters:
            return lambda hidden_BTD, positions: rotary(hidden_BTD, positions, kind)
        return rotary

    def _running(self, name: str, tensor: Tensor) -> Tensor:
        """A layer's tensor as it runs: float32, but for what is multiplied in bfloat16 in any case and is as small."""
        narrow = self.precision.everything and name.endswith(MULTIPLIED) and tensor.itemsize == 2
        return tensor.to(self.device) if narrow else tensor.to(self.device, torch.float32)

    def head(self) -> Callable[[Tensor], Tensor]:
        """A function from final hidden states ``[n, D]`` to logits ``[n, vocab]``, both float32."""
        names = self.spec.module
        norm = copy.deepcopy(getattr(self._body, names("norm").rpartition(".")[2]))
        parts = {part: f"{names('norm')}.{part}" for part in ("weight", "bias")}
        norm.load_state_dict(
            {n: self._float(full) for n, full in parts.items() if full in self.checkpoint}, assign=True
        )
        own = names("head") + ".weight"
        table = self.checkpoint.load(own if own in self.checkpoint else names("embedding") + ".weight").to(self.device)
        bias = names("head") + ".bias"
        bias_V = self._float(bias) if bias in self.checkpoint else None

        def logits(hidden_nD: Tensor) -> Tensor:
            normed_nD = self.spec.logit_scale * norm(hidden_nD)
            # The table is wide and stays as it is stored; only slices of it are ever float32, and none is that will be
            # multiplied in bfloat16.
            stored = torch.is_autocast_enabled(normed_nD.device.type)
            slices = (rows if stored else rows.float() for rows in table.split(VOCAB_AT_ONCE))
            parts = [torch.nn.functional.linear(normed_nD, rows) for rows in slices]
            made_nV = torch.cat(parts, dim=-1)
            return capped(made_nV if bias_V is None else made_nV + bias_V, self.spec.logit_softcap)

        return logits
