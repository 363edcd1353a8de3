"""The model that is healed.

Attention learns in its own coordinates, whatever the format: a portable checkpoint hides powers of two in its latent
norm and its projections, which no optimiser should see. They are taken out when the model is opened and put back,
measured anew, when it is written; so the latent norm of a healed portable model is as linear as a converted one's.

B batch, T tokens, n = B T of them, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from latentize.attention.latent import LatentWeights
from latentize.checkpoint import Checkpoint
from latentize.errors import OptionError
from latentize.families import families
from latentize.formats.balance import balances
from latentize.formats.deepseek_v3 import NORM_SHIFT, LatentNorm, decode_attention, encode_attention
from latentize.formats.portable import PORTABLE
from latentize.healing.recipe import Healing
from latentize.healing.targets import Targets, head_of, inputs
from latentize.modeling.attention import LatentAttention
from latentize.modeling.body import body_of, decoder_layers
from latentize.modeling.load import load_model, without_weights
from latentize.modeling.tensors import state_dict
from latentize.runtime.cache import cache_formats
from latentize.runtime.codecs import Plain, codec
from latentize.runtime.rotation import rotation
from latentize.text.tokens import Passages

__all__ = ["Losses", "Student"]

# Bounds the float32 logits that exist at once.
_LOGIT_BYTES = 1 << 27


@dataclass
class Losses:
    """Means over the tokens of a batch, nats.

    Attributes:
        total: What is descended.
        kl: Divergence from the teacher.
        ce: Cross-entropy with the true next token.
        hidden: Relative squared error of hidden states.
    """

    total: Tensor
    kl: Tensor
    ce: Tensor
    hidden: Tensor


class Student(nn.Module):
    """An output of latentize, loaded to be trained.

    Args:
        folder: The output.
        healing: What learns, and from which losses.
        device: Where; on ``meta`` it has shapes but no values, and reads no weights.

    Raises:
        CheckpointError: transformers cannot load it.
    """

    def __init__(self, folder: Path, healing: Healing, device: str = "cpu") -> None:
        super().__init__()
        self.healing = healing
        self.model = without_weights(folder) if device == "meta" else load_model(folder, device=device)
        self.portable = self.model.config.model_type in PORTABLE
        # The source architecture is one level deeper in the native format.
        self.prefix = "source." if hasattr(self.model, "source") else ""
        table = families().get(getattr(self.model, "source", self.model).config.model_type)
        # What has latent attention by itself has DeepSeek's names.
        self._layer_prefix = "model.layers.{layer}." if table is None else table.layer_prefix
        self._attention_name = "self_attn" if table is None else table.module("attention")
        if self.portable:
            _canonical(self.model)
        self._choose()
        if healing.cache is not None:
            self._simulate(healing.cache)

    @property
    def body(self) -> Any:
        """The decoder without its head."""
        return body_of(getattr(self.model, "source", self.model))

    @property
    def layers(self) -> list[Any]:
        return decoder_layers(self.model)

    def attentions(self) -> Iterator[tuple[str, Any]]:
        """The attention of every layer that has some, and what its tensors' names begin with in the files."""
        for index, layer in enumerate(self.layers):
            module = getattr(layer, self._attention_name, None)
            if module is not None:
                yield f"{self.prefix}{self._layer_prefix.format(layer=index)}{self._attention_name}.", module

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What learns, by name."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def _choose(self) -> None:
        everything = self.healing.train == "all"
        self.requires_grad_(everything)
        if self.healing.train == "lora":
            _adapt(self.body, [module for _, module in self.attentions()], self.healing)
            return
        for _, module in self.attentions():
            module.requires_grad_(True)

    def _simulate(self, formats: str) -> None:
        for _, module in self.attentions():
            spec = getattr(module, "spec", None)
            rounding = RoundedCache(**cache_formats(formats), key_scales=getattr(spec, "key_scales", 0))
            module.register_forward_pre_hook(
                lambda _, args, kwargs, mine=rounding: (args, {**kwargs, "past_key_values": mine}), with_kwargs=True
            )

    def forward(self, text: Passages, targets: Targets | None) -> Losses:
        """Losses of a batch; positions without a next token do not count.

        Args:
            text: Sequences.
            targets: The teacher's predictions of them, or ``None`` to learn from the text alone.
        """
        matches = self.healing.match_hidden > 0
        made = self.body(**inputs(text), use_cache=False, output_hidden_states=matches)
        final_nD, next_n = made.last_hidden_state[:, :-1].flatten(0, 1), text.tokens_NT[:, 1:].flatten()
        head, size = head_of(self.model), self._tokens_at_once()
        kl, ce = final_nD.new_zeros((), dtype=torch.float32), final_nD.new_zeros((), dtype=torch.float32)
        parts = [None] * -(-len(next_n) // size) if targets is None else targets.split(size)
        for part_nD, target, expected in zip(final_nD.split(size), parts, next_n.split(size), strict=True):
            # Logits are made again on the way back rather than kept.
            one_kl, one_ce = checkpoint(self._part, head, part_nD, target, expected, use_reentrant=False)
            kl, ce = kl + one_kl / len(next_n), ce + one_ce / len(next_n)
        hidden = kl.new_zeros(())
        if matches and targets is not None:
            pairs = list(zip(made.hidden_states[1:], targets.hidden_BTD, strict=True))
            hidden = torch.stack([_relative(mine, its) for mine, its in pairs]).mean()
        share = self.healing.ce
        total = (1 - share) * self.healing.temperature**2 * kl + share * ce + self.healing.match_hidden * hidden
        return Losses(total, kl.detach(), ce.detach(), hidden.detach())

    def _tokens_at_once(self) -> int:
        return max(1, _LOGIT_BYTES // (4 * self.model.config.vocab_size))

    def _part(
        self, head: Callable[[Tensor], Tensor], final_nD: Tensor, targets: Targets | None, next_n: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits_nV = head(final_nD)
        ce = F.cross_entropy(logits_nV.float(), next_n, reduction="sum")
        return (ce.detach() * 0 if targets is None else targets.divergence(logits_nV, self.healing.temperature)), ce

    @torch.no_grad()
    def stored(
        self, files: Checkpoint, tokens_NT: Tensor, dtype: torch.dtype = torch.bfloat16
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the healed checkpoint, in the names and the order of the one that was opened.

        Args:
            files: The checkpoint that was opened.
            tokens_NT: Text that shows how large latents get.
            dtype: What it will be rounded to.
        """
        learnt = self._attention(tokens_NT, dtype)
        if self.healing.train == "all":
            learnt = {**self._others(), **learnt}
        for name in files.names():
            yield name, learnt[name] if name in learnt else files.load(name)

    def _attention(self, tokens_NT: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        attentions = list(self.attentions())
        if not all(isinstance(module, LatentAttention) for _, module in attentions):
            return {prefix + name: p for prefix, module in attentions for name, p in module.state_dict().items()}
        sizes, found = self._latent_rms(tokens_NT) if self.portable else {}, {}
        # As the config says, which stays: healing changes no scale by much.
        kept = balances(self.model.config.to_dict()) if self.portable else []
        for prefix, module in attentions:
            w, index = module.weights(), module.layer_idx
            if self.portable:
                tensors = encode_attention(w, LatentNorm.stored_as(dtype, *sizes[index]), balance=kept[index])
            else:
                tensors = state_dict(_in_full(w, module), module.frequency_table)
            found |= {prefix + name: t for name, t in tensors.items()}
        return found

    def _others(self) -> dict[str, Tensor]:
        """Everything outside attention, under the names of the checkpoint."""
        found = dict(self.model.named_parameters())
        if not self.portable:
            return found
        shift = "input_layernorm.weight"
        return {name: p * NORM_SHIFT if name.endswith(shift) else p for name, p in found.items()}

    def _latent_rms(self, tokens_NT: Tensor) -> dict[int, tuple[float, float]]:
        """Largest and mean root mean square of a token's latent, layer by layer."""
        probe, device = _Probe(), next(self.parameters()).device
        hooks = [
            module.register_forward_pre_hook(
                lambda _, args, kwargs: (args, {**kwargs, "past_key_values": probe}), with_kwargs=True
            )
            for _, module in self.attentions()
        ]
        for tokens_BT in tokens_NT.split(4):
            self.body(input_ids=tokens_BT.to(device), use_cache=False)
        for hook in hooks:
            hook.remove()
        means = {index: total / count for index, (_, total, count) in probe.seen.items()}
        return {index: (most**0.5, means[index] ** 0.5) for index, (most, _, _) in probe.seen.items()}


def _relative(mine_BTD: Tensor, its_BTD: Tensor) -> Tensor:
    return (mine_BTD.float() - its_BTD.float()).square().mean() / its_BTD.float().var()


def _in_full(w: LatentWeights, attention: LatentAttention) -> LatentWeights:
    """Frequencies as the config has them, not rounded to float32."""
    table = torch.tensor(attention.frequency_table, dtype=torch.float64)
    return replace(w, frequencies_PF=table[attention.rope_pairs.long().cpu()])


@torch.no_grad()
def _canonical(model: Any) -> None:
    """Put attention in coordinates without hidden factors in the place of transformers'."""
    config = model.config.to_dict()
    for index, (layer, balance) in enumerate(zip(model.model.layers, balances(config), strict=True)):
        stored = layer.self_attn.state_dict()
        w = balance.undone(decode_attention(stored, config))
        inputs = {n: getattr(w, n) * NORM_SHIFT for n in ("q_nope_HND", "q_rope_HRD", "kv_a_rD", "k_rope_PRD")}
        layer.self_attn = LatentAttention.from_weights(replace(w, **inputs), index)
        layer.input_layernorm.weight.div_(NORM_SHIFT)


def _adapt(body: Any, attentions: Sequence[Any], healing: Healing) -> None:
    """Put LoRA adapters (Hu et al., arXiv 2106.09685) on every projection of every attention layer."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise OptionError(
            f"adapters need peft: {error}", where="--train lora", fix="pip install 'latentize[heal]'"
        ) from None
    inside = {part for module in attentions for part in module.modules() if isinstance(part, nn.Linear)}
    names = {name for name, module in body.named_modules() if module in inside}
    config = LoraConfig(r=healing.lora_rank, lora_alpha=healing.lora_alpha, target_modules=sorted(names))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(healing.seed)
        inject_adapter_in_model(config, body)


class RoundedCache:
    """Stands for a cache: gives back what a quantised one would, with the gradient of the identity.

    Args:
        latent, rope: Formats, as of :class:`latentize.LatentCache`.
        key_scales: Factors behind the roped key, which stay as they are.
    """

    def __init__(self, latent: str | None = None, rope: str | None = None, key_scales: int = 0) -> None:
        self.formats, self.key_scales = (latent, rope), key_scales

    def update(self, c_B1Tr: Tensor, k_BPTR: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        latent, rope = self.formats
        k_BPTR, factors_BPTK = k_BPTR.tensor_split([k_BPTR.shape[-1] - self.key_scales], dim=-1)
        keys_BTPR = k_BPTR.transpose(1, 2)
        keys_BPTR = _rounded(keys_BTPR.flatten(2), rope).unflatten(2, keys_BTPR.shape[2:]).transpose(1, 2)
        keys_BPTR = torch.cat([keys_BPTR, factors_BPTK], dim=-1)
        if latent is None or isinstance(codec(latent, c_B1Tr.shape[-1]), Plain):
            return _rounded(c_B1Tr, latent), keys_BPTR
        turn_rr = rotation(c_B1Tr.shape[-1]).to(c_B1Tr)
        return _rounded(c_B1Tr @ turn_rr, latent) @ turn_rr.mT, keys_BPTR


def _rounded(x_n: Tensor, name: str | None) -> Tensor:
    """The last axis is a token's."""
    if name is None:
        return x_n
    with torch.no_grad():
        kept = codec(name, x_n.shape[-1])
        error_n = kept.decode(kept.encode(x_n), x_n.dtype) - x_n
    return x_n + error_n


class _Probe:
    """Stands for a cache and looks at how large latents are."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[float, float, int]] = {}

    def update(self, c_B1Tr: Tensor, k_BPTR: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        squares = c_B1Tr.float().square().mean(-1)
        most, total, count = self.seen.get(layer_idx, (0.0, 0.0, 0))
        self.seen[layer_idx] = (
            max(most, float(squares.max())),
            total + float(squares.sum()),
            count + squares.numel(),
        )
        return c_B1Tr, k_BPTR
