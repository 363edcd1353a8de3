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
from typing import Any

import torch
from torch import Tensor, nn

from latentize.attention.grouped import capped
from latentize.checkpoint import Checkpoint, load_config
from latentize.errors import ConfigError
from latentize.families import ModelSpec
from latentize.families.model import CHUNKED, SLIDING
from latentize.machine import give_back_freed_memory, multiplies_bfloat16
from latentize.modeling.body import body_of
from latentize.modeling.canonical import attention_weights, module_tensors
from latentize.modeling.layer import MULTIPLIED, TOKENS_AT_ONCE, SourceLayer, Stream
from latentize.modeling.precision import Precision
from latentize.text.tokens import Passages, require_positions, require_rows

__all__ = ["VOCAB_AT_ONCE", "SourceModel", "is_large", "tokens_at_once"]

# From so many parameters on, layers multiply in bfloat16 where that is faster: in float32 it would take hours. On a CPU
# that only emulates bfloat16 it would take days: 0.7 instead of 63 · 10⁹ operations a second were measured.
_LARGE = 200_000_000
# Bytes of an activation of a layer's MLP.
_ACTIVATION_BYTES = 16 << 20
VOCAB_AT_ONCE = 16_384


def is_large(parameters: int) -> bool:
    """Whether a model is too big to be trained as a whole without being asked to; its layers multiply in bfloat16 where
    that is faster."""
    return parameters > _LARGE


def tokens_at_once(spec: ModelSpec, precision: Precision) -> int:
    """How many tokens go through a layer at once."""
    size = 2 if precision.everything else 4
    return min(TOKENS_AT_ONCE, max(1, _ACTIVATION_BYTES // (size * spec.intermediate_size)))


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
