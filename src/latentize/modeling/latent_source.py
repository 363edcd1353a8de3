"""A source that has latent attention as it comes, run one layer at a time.

Its layers are transformers' own, as those of :mod:`source` are. Checkpoints store the experts of a mixture one by one,
transformers runs them fused; they are fused when a layer is loaded, and written as they were stored.

B batch, T tokens, D hidden, H heads, r kv_lora_rank, N qk_nope_head_dim.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from latentize.checkpoint import Checkpoint
from latentize.errors import CheckpointError, UnsupportedModelError
from latentize.families import LatentModel
from latentize.families.model import FULL
from latentize.modeling.canonical import stacked
from latentize.modeling.layer import SourceLayer, Stream
from latentize.modeling.precision import Use
from latentize.modeling.source import SourceModel

__all__ = ["Attended", "LatentSource", "LatentSourceLayer", "check_latent", "fused_tensors"]

# Types whose layers do nothing around their attention that is not done here.
LOWERED = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_linear", "mistral4", "youtu")
ATTENTION = "self_attn."
_LAYER_PREFIX = "model.layers.{layer}."
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
# What Kimi Linear's files call otherwise than transformers' module: experts, and a layer's gate of what it forgets.
_KIMI = {
    r"^block_sparse_moe\.": "mlp.",
    r"(\.experts\.\d+)\.w1\.": r"\1.gate_proj.",
    r"(\.experts\.\d+)\.w3\.": r"\1.up_proj.",
    r"(\.experts\.\d+)\.w2\.": r"\1.down_proj.",
    r"^self_attn\.(f_a_proj|f_b_proj|dt_bias|A_log)": r"self_attn.forget_gate.\1",
}
_CONVOLUTIONS = tuple(f"self_attn.{name}_conv1d.weight" for name in "qkv")


def fused_tensors(stored: Mapping[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """Tensors of a layer as transformers' module has them: experts stacked, each one's gate above its up-projection."""
    fused = _as_kimi_runs(stored) if model_type == "kimi_linear" else dict(stored)
    experts = sorted({int(found[1]) for name in fused if (found := _EXPERT.fullmatch(name))})
    if experts:
        gate, up, down = (f"mlp.experts.{{expert}}.{part}_proj.weight" for part in ("gate", "up", "down"))
        fused["mlp.experts.gate_up_proj"] = stacked(fused, (gate, up), experts)
        fused["mlp.experts.down_proj"] = stacked(fused, (down,), experts)
    return fused


def _as_kimi_runs(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of the module, and convolutions of queries, keys and values as one."""
    found = {}
    for name, tensor in stored.items():
        for pattern, own in _KIMI.items():
            name = re.sub(pattern, own, name)
        found[name] = tensor
    if all(name in found for name in _CONVOLUTIONS):
        found["self_attn.conv1d.weight"] = torch.cat([found.pop(name) for name in _CONVOLUTIONS])
    return found


def layer_names(checkpoint: Checkpoint, index: int) -> list[str]:
    """Stored tensors of a layer, but the table of RoPE that some checkpoints have."""
    prefix = _LAYER_PREFIX.format(layer=index)
    return [name for name in checkpoint.names() if name.startswith(prefix) and "rotary_emb" not in name]


def check_latent(checkpoint: Checkpoint, model: LatentModel) -> None:
    """Hold the files against ``config.json``, as far as headers tell.

    Raises:
        UnsupportedModelError: the rank of such a model cannot be lowered.
        CheckpointError: files are missing, or contradict ``config.json``.
    """
    if model.model_type not in LOWERED:
        raise UnsupportedModelError(
            f"the model has latent attention already, and the rank of '{model.model_type}' cannot be lowered yet",
            code="LZ203",
            where="config.json, model_type",
            fix=f"it can be of: {', '.join(LOWERED)}",
        )
    if checkpoint.config.get("quantization_config"):
        raise UnsupportedModelError(
            f"'{model.model_type}' cannot be converted: the weights are quantised",
            code="LZ204",
            where="config.json, quantization_config",
            fix="use the unquantised checkpoint",
        )
    checkpoint.check_stored()
    # Further layers predict several tokens at once; transformers does not run them.
    if (stored := checkpoint.count(_LAYER_PREFIX)) < model.layers:
        raise CheckpointError(
            f"config.json says {model.layers} layers, the files have {stored}",
            code="LZ110",
            where=f"{checkpoint.config_path}, num_hidden_layers",
            fix="take all files from where the model was published",
        )
    for layer in range(model.layers):
        for name, shape in model.attention_shapes().items() if model.kind_of(layer) == FULL else ():
            full = f"{_LAYER_PREFIX.format(layer=layer)}{ATTENTION}{name}"
            if full not in checkpoint:
                raise _odd("a tensor is missing", "LZ111", checkpoint, full)
            if checkpoint.shape(full) != shape:
                said = f"the tensor is {list(checkpoint.shape(full))}, config.json implies {list(shape)}"
                raise _odd(said, "LZ109", checkpoint, full)


def _odd(what: str, code: str, checkpoint: Checkpoint, name: str) -> CheckpointError:
    fix = "are all files of the model there, and only those?"
    return CheckpointError(what, code=code, where=f"{checkpoint.path}, tensor {name}", fix=fix)


@dataclass(frozen=True)
class Attended:
    """What one batch has made a layer's attention do.

    Attributes:
        x_BTD: Its normalised inputs.
        y_BTr: Latents before their norm.
        q_BTHN: The un-roped part of queries.
        residual_BTD: The residual stream after it.
        rows: Which sequences.
    """

    x_BTD: Tensor
    y_BTr: Tensor
    q_BTHN: Tensor
    residual_BTD: Tensor
    rows: slice


class LatentSourceLayer(SourceLayer):
    """A decoder layer with latent attention; ``weights`` is of no use."""

    def observe(self, text: Stream, use: Use = Use.STATISTICS) -> Iterator[Attended]:
        """Advance hidden states through the layer, and see what its attention does.

        Args:
            text: Hidden states that enter it, advanced in place.
            use: What it is for.
        """
        attention, seen = self.attention, {}
        rank, heads = attention.kv_lora_rank, (-1, attention.qk_head_dim)
        queries = attention.q_proj if attention.q_lora_rank is None else attention.q_b_proj

        def keep(name: str) -> Any:
            return lambda module, args, result: seen.__setitem__(name, result)

        hooks = [
            attention.kv_a_proj_with_mqa.register_forward_hook(keep("kv")),
            queries.register_forward_hook(keep("q")),
        ]
        try:
            for rows, x_BTD, residual_BTD in self.stream(text, use=use):
                q_BTHN = seen["q"].unflatten(-1, heads)[..., : attention.qk_nope_head_dim]
                yield Attended(x_BTD, seen["kv"][..., :rank], q_BTHN, residual_BTD, rows)
        finally:
            for hook in hooks:
                hook.remove()

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Any:
        """The layer's attention with other tensors, by name within it, and the rank that they have; in float32."""
        attention = copy.deepcopy(self.attention)
        rank = len(tensors["kv_a_layernorm.weight"])
        attention.kv_lora_rank = rank
        for name, tensor in tensors.items():
            module, kind = attention.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            setattr(module, kind, nn.Parameter(tensor.to(torch.float32), requires_grad=False))
        return attention

    def attend(self, attention: Any, tensors: Mapping[str, Tensor], x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        """What an attention adds to the residual stream with these tensors, which gradients reach."""
        options = {
            "hidden_states": x_BTD,
            "attention_mask": None,
            "position_ids": positions_BT,
            "position_embeddings": self._rotary(x_BTD, positions_BT),
        }
        return torch.func.functional_call(attention, dict(tensors), args=(), kwargs=options)[0]


class LatentSource(SourceModel):
    """A checkpoint with latent attention as a sequence of layers.

    Args:
        checkpoint: The files, checked.
        model: Their shape.
        device: Where layers run.

    Raises:
        CheckpointError: the layers in the files are not those that transformers makes of ``config.json``.
    """

    def __init__(self, checkpoint: Checkpoint, model: LatentModel, device: str = "cpu") -> None:
        super().__init__(checkpoint, cast(Any, model), device)
        self.latent = model
        for index, empty in enumerate(self._skeleton.model.layers):
            names = layer_names(checkpoint, index)
            prefix = _LAYER_PREFIX.format(layer=index)
            # Shapes alone: nothing is read.
            stored = {n.removeprefix(prefix): torch.empty(checkpoint.shape(n), device="meta") for n in names}
            try:
                found = {name: t.shape for name, t in fused_tensors(stored, model.model_type).items()}
            except (KeyError, RuntimeError) as error:
                raise _odd("experts are not alike", "LZ111", checkpoint, f"{prefix}mlp.experts") from error
            wanted = {name: tensor.shape for name, tensor in empty.state_dict().items()}
            if odd := sorted(set(found.items()) ^ set(wanted.items())):
                raise _odd(
                    "a tensor is missing, or is another than config.json implies", "LZ111", checkpoint, odd[0][0]
                )

    def module_tensors(self, stored: dict[str, Tensor], index: int) -> dict[str, Tensor]:
        return fused_tensors(stored, self.latent.model_type)

    def layer(self, index: int) -> LatentSourceLayer:
        """One decoder layer, read from the files."""
        prefix = _LAYER_PREFIX.format(layer=index)
        stored = {n.removeprefix(prefix): self.checkpoint.load(n) for n in layer_names(self.checkpoint, index)}
        module = copy.deepcopy(self._skeleton.model.layers[index])
        wide = {name: t.to(self.device, torch.float32) for name, t in self.module_tensors(stored, index).items()}
        module.load_state_dict(wide, strict=True, assign=True)
        return LatentSourceLayer(
            index=index,
            tensors=stored,
            spec=None,
            weights=None,
            names=self.latent.module,
            _module=module.requires_grad_(False),
            _rotary=self.angles(FULL),
            precision=self.precision,
        )

    if TYPE_CHECKING:

        def layers(self) -> Iterator[LatentSourceLayer]: ...
