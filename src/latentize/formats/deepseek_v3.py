"""The portable format: a DeepSeek-V3 checkpoint that engines load with no code of ours.

Such a checkpoint leaves no freedom: one shared roped key, interleaved, on one plain frequency ladder; no biases;
logits scaled by ``qk_head_dim ** -0.5``; an RMSNorm with epsilon 1e-6 on the latent, and 1e-6 everywhere else for
engines that read only one. Four identities make a converted model fit, exactly or to rounding:

1.  Softmax scale. ``k_up`` and the roped queries carry the quotient of the two scales.
2.  Epsilon. A residual stream scaled by ``a = sqrt(1e-6 / eps)`` gives ``RMSNorm(a x; a² eps) = RMSNorm(x; eps)``:
    the embedding, ``o_proj`` and every ``down_proj`` are multiplied by ``a``; the output head is untied.
3.  Latent norm. For ``mean(y²) << eps``, ``RMSNorm(y) = y / sqrt(eps)`` to first order. The latent is made so small
    that even the largest token stays below ``delta · eps``, and the norm's weight restores the scale.
4.  Precision of that. The factor is split: ``2**-10`` goes into ``input_layernorm``, undone in ``q_proj`` and the roped
    key rows, the rest into the latent's rows, so that no stored weight comes near fp16's subnormals.

All factors that meet weights of the source are powers of two, except ``a``; the others meet new weights, which
are rounded once in any case.

Two more keep matrices fit to be quantised, see :mod:`balance`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from latentize.attention.latent import LatentWeights
from latentize.attention.rope import half_to_interleaved
from latentize.checkpoint import Checkpoint, OutputFolder
from latentize.families import ModelSpec
from latentize.formats.balance import KEY, Balance, described, spread
from latentize.formats.base import LatentWriter
from latentize.formats.layer import ConvertedLayer

__all__ = [
    "DELTA",
    "DELTA_FP16",
    "DeepseekWriter",
    "LatentNorm",
    "balance_of",
    "decode_attention",
    "encode_attention",
    "padded",
]

EPS = 1e-6
# Largest mean(y²) of a token's latent, in units of epsilon. In fp16 latents that small would be far below the normal
# range; larger ones bend the norm by no more than 2⁻¹⁰, about what fp16 rounds in any case.
DELTA, DELTA_FP16 = 2.0**-16, 2.0**-9
NORM_SHIFT = 2.0**-10
_ATTENTION = "self_attn."
# A bias that only chooses experts.
_CHOOSES = "mlp.gate.e_score_correction_bias"
_NONE = Balance()


@dataclass(frozen=True)
class LatentNorm:
    """Numbers that make RMSNorm on the latent linear.

    Attributes:
        latent: Power of two on the latent.
        weight: Power of two that is the norm's weight.
        up: What is left over, for the up-projection; near one.
    """

    latent: float
    weight: float
    up: float

    @classmethod
    def stored_as(cls, dtype: torch.dtype, largest_rms: float, mean_rms: float) -> LatentNorm:
        """For weights, and so activations, of a precision; arguments as for :meth:`of`."""
        return cls.of(largest_rms, mean_rms, delta=DELTA_FP16 if dtype == torch.float16 else DELTA)

    @classmethod
    def of(cls, largest_rms: float, mean_rms: float, *, delta: float = DELTA, eps: float = EPS) -> LatentNorm:
        """From the largest and the mean root mean square of a token's latent.

        One that is small enough as it is, or zero, stays as it is.
        """
        bound = math.sqrt(delta * eps)
        latent = 2.0 ** math.floor(math.log2(bound / max(largest_rms, bound)))
        restored = math.sqrt(eps) / latent
        weight = 2.0 ** round(math.log2(restored))
        # The norm shrinks a token by 1 / sqrt(1 + mean(y²) / eps); its mean over tokens is made good.
        gain = 1 / math.sqrt(1 + (mean_rms * latent) ** 2 / eps)
        return cls(latent, weight, restored / weight / gain)


@dataclass(frozen=True)
class _Factors:
    q: float
    q_rope: float
    kv_a: float
    k_rope: float
    k_up: float
    v_up: float
    o: float


def _factors(w: LatentWeights, norm: LatentNorm, stream_scale: float, balance: Balance = _NONE) -> _Factors:
    scale = w.softmax_scale * math.sqrt(w.spec.qk_head_dim)
    return _Factors(
        q=2.0**-balance.k_up / NORM_SHIFT,
        q_rope=2.0**-balance.k_rope * scale / NORM_SHIFT,
        kv_a=norm.latent / NORM_SHIFT,
        k_rope=2.0**balance.k_rope / NORM_SHIFT,
        k_up=2.0**balance.k_up * scale * norm.up,
        v_up=2.0**balance.v_up * norm.up,
        o=2.0**-balance.v_up * stream_scale,
    )


def balance_of(w: LatentWeights, norm: LatentNorm, dtype: torch.dtype, *, roped: bool = True) -> Balance:
    """What makes rows of each matrix of a layer alike in size; nothing where they will be float16. Without ``roped``
    the keys that are cached stay as large as they are."""
    if dtype == torch.float16:
        return _NONE
    f = _factors(w, norm, 1.0)
    sizes = {"q_nope_HND": f.q, "q_rope_HRD": f.q_rope, "kv_a_rD": f.kv_a, "k_rope_PRD": f.k_rope}
    sizes |= {"k_up_UNr": f.k_up, "v_up_UVr": f.v_up}
    return Balance.of({name: (getattr(w, name), factor) for name, factor in sizes.items()}, roped=roped)


def encode_attention(
    w: LatentWeights, norm: LatentNorm, stream_scale: float = 1.0, balance: Balance = _NONE
) -> dict[str, Tensor]:
    """Tensors of ``DeepseekV3Attention``, by name.

    Args:
        w: Weights with one roped key and no biases.
        norm: How its latent norm is made linear.
        stream_scale: Factor ``a`` on the residual stream.
        balance: Factors that make its matrices fit to be quantised.

    Returns:
        Tensors in the precision of ``w``. ``input_layernorm`` has to be multiplied by ``NORM_SHIFT`` beside them.
    """
    return dict(encoded(w, norm, stream_scale, balance))


def encoded(
    w: LatentWeights, norm: LatentNorm, stream_scale: float = 1.0, balance: Balance = _NONE
) -> Iterator[tuple[str, Tensor]]:
    """The same one by one: each is as large as the weights that it is made of, and in their precision."""
    f, spec = _factors(w, norm, stream_scale, balance), w.spec
    interleaved = half_to_interleaved(spec.qk_rope_head_dim)
    share = spec.num_heads // spec.up_heads
    q_HdD = w.q_nope_HND.new_empty(spec.num_heads, spec.qk_head_dim, spec.hidden_size)
    torch.mul(w.q_nope_HND, f.q, out=q_HdD[:, : spec.qk_nope_head_dim])
    torch.mul(w.q_rope_HRD[:, interleaved], f.q_rope, out=q_HdD[:, spec.qk_nope_head_dim :])
    yield "q_proj.weight", q_HdD.flatten(0, 1)
    del q_HdD
    kv_a = torch.cat([w.kv_a_rD * f.kv_a, w.k_rope_PRD[0, interleaved] * f.k_rope])
    yield "kv_a_proj_with_mqa.weight", kv_a
    yield "kv_a_layernorm.weight", torch.full((spec.kv_lora_rank,), norm.weight, dtype=w.kv_a_rD.dtype)
    k_up_HNr = w.k_up_UNr.repeat_interleave(share, dim=0) * f.k_up
    v_up_HVr = w.v_up_UVr.repeat_interleave(share, dim=0) * f.v_up
    kv_b_HdD = torch.cat([k_up_HNr, v_up_HVr], dim=1)
    del k_up_HNr, v_up_HVr
    yield "kv_b_proj.weight", kv_b_HdD.flatten(0, 1)
    del kv_b_HdD
    yield "o_proj.weight", w.o_DHV.flatten(1) * f.o


def decode_attention(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> LatentWeights:
    """The inverse of :func:`encode_attention`: the layer with its latent norm taken as linear, balanced as it is.

    Args:
        tensors: Tensors of ``DeepseekV3Attention``, by name.
        config: ``config.json``.
    """
    heads, rank, rope = config["num_attention_heads"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, v_dim = config["qk_nope_head_dim"], config["v_head_dim"]
    half = half_to_interleaved(rope).argsort()
    q_HdD = tensors["q_proj.weight"].unflatten(0, (heads, nope + rope))
    kv_a = tensors["kv_a_proj_with_mqa.weight"]
    kv_b_Hdr = tensors["kv_b_proj.weight"].unflatten(0, (heads, nope + v_dim))
    theta = config["rope_parameters"]["rope_theta"]
    ladder = [theta ** (-2 * j / rope) for j in range(rope // 2)]
    return LatentWeights(
        q_nope_HND=q_HdD[:, :nope],
        q_rope_HRD=q_HdD[:, nope:][:, half],
        kv_a_rD=tensors["kv_a_layernorm.weight"][:, None] / math.sqrt(EPS) * kv_a[:rank],
        k_rope_PRD=kv_a[rank:][half][None],
        k_up_UNr=kv_b_Hdr[:, :nope],
        v_up_UVr=kv_b_Hdr[:, nope:],
        o_DHV=tensors["o_proj.weight"].unflatten(1, (heads, v_dim)),
        frequencies_PF=torch.tensor([ladder], dtype=torch.float64),
        softmax_scale=(nope + rope) ** -0.5,
    )


def padded(w: LatentWeights, heads: int, nope: int, value: int) -> LatentWeights:
    """The same layer with so many heads, of un-roped keys and values of so many dimensions; the new ones are zero."""
    spec, pad = w.spec, torch.nn.functional.pad
    more, more_nope, more_value = heads - spec.num_heads, nope - spec.qk_nope_head_dim, value - spec.v_head_dim
    # Where heads share an up-projection, the new ones have one of their own.
    share = spec.num_heads // spec.up_heads if more else 1
    up = (t.repeat_interleave(share, dim=0) for t in (w.k_up_UNr, w.v_up_UVr))
    k_up_UNr, v_up_UVr = (pad(t, (0, 0, 0, n, 0, more)) for t, n in zip(up, (more_nope, more_value), strict=True))
    biases = (w.q_nope_bias_HN, w.q_rope_bias_HR)
    q_nope_bias_HN, q_rope_bias_HR = (
        None if bias is None else pad(bias, (0, n, 0, more)) for bias, n in zip(biases, (more_nope, 0), strict=True)
    )
    return replace(
        w,
        q_nope_HND=pad(w.q_nope_HND, (0, 0, 0, more_nope, 0, more)),
        q_rope_HRD=pad(w.q_rope_HRD, (0, 0, 0, 0, 0, more)),
        q_nope_bias_HN=q_nope_bias_HN,
        q_rope_bias_HR=q_rope_bias_HR,
        k_up_UNr=k_up_UNr,
        v_up_UVr=v_up_UVr,
        o_DHV=pad(w.o_DHV, (0, more_value, 0, more)),
    )


def _apart(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor as DeepSeek's checkpoints have it: gate and up-projection apart, experts one by one."""
    stem, _, last = name.removesuffix(".weight").rpartition(".")
    experts = stem.endswith("experts") and tensor.ndim == 3
    for number, own in enumerate(tensor) if experts else [("", tensor)]:
        where = f"{stem}.{number}" if experts else stem
        if last == "gate_up_proj":
            for part, rows in zip(("gate", "up"), own.chunk(2), strict=True):
                yield f"{where}.{part}_proj.weight", rows.clone()
        else:
            yield (f"{where}.{last}.weight" if experts else name), own.clone() if experts else own


class DeepseekWriter(LatentWriter):
    """Writes a ``DeepseekV3ForCausalLM``, dense unless the source has DeepSeek's experts."""

    name = "deepseek_v3"

    def __init__(self, folder: OutputFolder, checkpoint: Checkpoint, spec: ModelSpec, dtype: torch.dtype) -> None:
        super().__init__(folder, checkpoint, spec, dtype)
        self._balances: dict[int, Balance] = {}

    @property
    def stream_scale(self) -> float:
        return math.sqrt(EPS / self.spec.norm_eps)

    @property
    def block_scale(self) -> float:
        """Factor on what attention and MLP add to the residual stream, the source's own included."""
        return self.stream_scale * self.spec.residual_scale

    def oriented(self, w: LatentWeights, index: int) -> LatentWeights:
        w = spread(w, seed=index, latent=not self.suited)
        return w if self.padded is None else padded(w, *self.padded)

    def saved(self, made: ConvertedLayer) -> LatentWeights:
        w = made.latent
        assert w is not None
        # Without its balance, whose powers of two round nothing.
        f = _factors(w, LatentNorm.stored_as(self.dtype, *made.latent_rms), self.block_scale)

        def rounded(t: Tensor, factor: float) -> Tensor:
            return ((t * factor).to(self.dtype).double() / factor).float()

        return replace(
            w,
            q_nope_HND=rounded(w.q_nope_HND, f.q),
            q_rope_HRD=rounded(w.q_rope_HRD, f.q_rope),
            kv_a_rD=rounded(w.kv_a_rD, f.kv_a),
            k_rope_PRD=rounded(w.k_rope_PRD, f.k_rope),
            k_up_UNr=rounded(w.k_up_UNr, f.k_up),
            v_up_UVr=rounded(w.v_up_UVr, f.v_up),
            o_DHV=rounded(w.o_DHV, f.o),
        )

    def layer(self, made: ConvertedLayer) -> None:
        assert made.latent is not None
        self._latent = latent = made.latent.spec
        # What has gathered goes before the first tensor, the queries, is made, if that will not go into the same file.
        self.folder.make_room(latent.num_heads * latent.qk_head_dim * latent.hidden_size * self.dtype.itemsize)
        prefix = f"model.layers.{made.index}."
        norm = LatentNorm.stored_as(self.dtype, *made.latent_rms)
        balance = balance_of(made.latent, norm, self.dtype, roped=not self.suited)
        self._balances[made.index] = balance
        for name, tensor in encoded(made.latent, norm, self.block_scale, balance):
            self._add(prefix + _ATTENTION + name, tensor)
        for name, tensor in made.stored.items():
            if name.startswith(_ATTENTION):
                continue
            if name == _CHOOSES:
                # As it is: it decides between experts that are nearly as good.
                self.folder.add(prefix + name, tensor.cpu())
                continue
            for part, rows in _apart(name, tensor):
                adds = part.startswith("mlp.") and part.endswith("down_proj.weight")
                factor = NORM_SHIFT if part == "input_layernorm.weight" else self.block_scale if adds else 1.0
                self._add(prefix + part, rows, factor)

    def top(self) -> None:
        embedding = "model.embed_tokens.weight"
        head = embedding if self.spec.tied else "lm_head.weight"
        # Read one after the other, even if they are one: each is larger than all layers that wait to be written.
        self._add("lm_head.weight", self.checkpoint.load(head), self.spec.logit_scale, own=True)
        scale = self.stream_scale * self.spec.embedding_scale
        self._add(embedding, self.checkpoint.load(embedding), scale, own=True)
        self._add("model.norm.weight", self.checkpoint.load("model.norm.weight"))

    def config(self) -> dict[str, Any]:
        source, a, latent = self.spec.stated, self.spec.attention, self._latent
        theta = self.rope_theta
        kept = ("bos_token_id", "eos_token_id", "pad_token_id", "hidden_act", "initializer_range")
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "dtype": self._dtype_name(),
            **{key: source[key] for key in kept if key in source},
            "vocab_size": self.spec.vocab_size,
            "hidden_size": a.hidden_size,
            "intermediate_size": self.spec.intermediate_size,
            "num_hidden_layers": self.spec.layers,
            "num_attention_heads": latent.num_heads,
            "num_key_value_heads": latent.num_heads,
            "q_lora_rank": None,
            "kv_lora_rank": latent.kv_lora_rank,
            "qk_rope_head_dim": latent.qk_rope_head_dim,
            "qk_nope_head_dim": latent.qk_nope_head_dim,
            "v_head_dim": latent.v_head_dim,
            "max_position_embeddings": self.spec.max_positions,
            "rope_theta": theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
            "rope_interleave": True,
            "rms_norm_eps": EPS,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": False,
            "moe_layer_freq": 1,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "num_nextn_predict_layers": 0,
            **self._experts(),
            "use_cache": True,
            **self._exponents(),
        }

    def _experts(self) -> dict[str, Any]:
        """Entries of a mixture of experts, the source's. Where no layer is one, engines still read them and want whole
        numbers."""
        none = {
            "first_k_dense_replace": self.spec.layers,
            "moe_intermediate_size": self.spec.intermediate_size,
            "n_routed_experts": 1,
            "n_shared_experts": 1,
            "num_experts_per_tok": 1,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
        }
        return none if self.spec.table.experts is None else {name: self.spec.config[name] for name in none}

    def _exponents(self) -> dict[str, Any]:
        found = [self._balances[layer] for layer in range(self.spec.layers)]
        return {} if set(found) == {_NONE} else {KEY: described(found)}
