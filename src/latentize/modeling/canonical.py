"""From a family's tensors to those that conversion knows: named projections, heads unpacked, RoPE in the "half" layout.

A head that rotates in part, or in the interleaved layout, is one whose dimensions lie in another order: pairs that do
not rotate have frequency zero. Logits do not depend on the order as long as queries and keys agree on it.

H query heads, G kv heads, d head size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from latentize.attention.grouped import AttentionWeights
from latentize.attention.spec import AttentionSpec
from latentize.families import ModelSpec, Table
from latentize.modeling.unread import without_unread

__all__ = ["attention_weights", "half_layout", "is_like_llama", "module_tensors", "stacked"]


def half_layout(head_dim: int, rotary_dim: int, *, interleaved: bool) -> Tensor:
    """Which dimension of a head comes where, ``[d]``: pair ``f`` at ``f`` and ``f + d / 2``, those that rotate first.

    Args:
        head_dim: Size of a head.
        rotary_dim: Its first dimensions rotate.
        interleaved: Whether a pair that rotates lies side by side; else it lies half of ``rotary_dim`` apart.
    """
    turning_2F = torch.arange(rotary_dim).view(-1, 2).T if interleaved else torch.arange(rotary_dim).view(2, -1)
    still_2F = torch.arange(rotary_dim, head_dim).view(2, -1)
    return torch.cat([turning_2F, still_2F], dim=1).flatten()


def _projections(tensors: Mapping[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """Weights and biases of the attention by role: ``q_proj.weight``, …; fused ones taken apart."""
    a = spec.attention
    found: dict[str, Tensor] = {}
    roles = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "qkv_proj", "query_key_value")
    for role in roles:
        for kind in ("weight", "bias"):
            name = f"{spec.module('attention')}.{spec.module(role)}.{kind}"
            if name in tensors:
                turned = kind == "weight" and spec.table.attention.get("transposed")
                found[f"{role}.{kind}"] = tensors[name].T if turned else tensors[name]
    for kind in ("weight", "bias"):
        if (fused := found.pop(f"qkv_proj.{kind}", None)) is not None:
            sizes = [n * a.head_dim for n in (a.num_heads, a.num_kv_heads, a.num_kv_heads)]
            found |= {f"{n}_proj.{kind}": part for n, part in zip("qkv", fused.split(sizes), strict=True)}
        if (fused := found.pop(f"query_key_value.{kind}", None)) is not None:
            # Head by head, each with its query, key and value.
            parts = fused.unflatten(0, (a.num_heads, 3, a.head_dim)).unbind(1)
            found |= {f"{n}_proj.{kind}": part.flatten(0, 1) for n, part in zip("qkv", parts, strict=True)}
    return found


def attention_weights(tensors: Mapping[str, Tensor], spec: ModelSpec) -> AttentionWeights:
    """The attention of a layer out of its tensors (names without the layer's prefix), but for what nothing reads."""
    a, found = spec.attention, _projections(tensors, spec)
    apart = a.head_dim if a.rope.rope_type == "proportional" else a.rope.rotary_dim
    order = half_layout(a.head_dim, apart, interleaved=bool(spec.table.attention.get("interleaved")))
    same = bool((order == torch.arange(a.head_dim)).all())

    def heads(name: str, *, turns: bool = True) -> Tensor | None:
        t = found.get(name)
        if t is None:
            return None
        split = t.unflatten(0, (-1, a.head_dim))
        return split if same or not turns else split[:, order.to(t.device)]

    def norm(name: str) -> Tensor | None:
        t = found.get(name)
        if t is None:
            return None
        t = t + spec.table.norm_offset
        ordered = t.unflatten(0, (-1, a.head_dim))[:, order.to(t.device)]
        return ordered if a.qk_norm_across else ordered[0]

    gate = None
    if a.gated:
        # Each head's query, then its gate.
        both = found["q_proj.weight"].unflatten(0, (a.num_heads, 2, a.head_dim))
        found["q_proj.weight"], gate = both[:, 0].flatten(0, 1), both[:, 1]
    if a.v_norm:
        found["v_proj.weight"] = found["k_proj.weight"]
    q, k, v = heads("q_proj.weight"), heads("k_proj.weight"), heads("v_proj.weight", turns=False)
    assert q is not None and k is not None and v is not None
    stored = AttentionWeights(
        q_HdD=q,
        k_GdD=k,
        v_GdD=v,
        o_DHd=found["o_proj.weight"].unflatten(1, (-1, a.head_dim)),
        q_bias_Hd=heads("q_proj.bias"),
        k_bias_Gd=heads("k_proj.bias"),
        v_bias_Gd=heads("v_proj.bias", turns=False),
        o_bias_D=found.get("o_proj.bias"),
        q_norm_d=norm("q_norm.weight"),
        k_norm_d=norm("k_norm.weight"),
        gate_HdD=gate,
        sink_H=tensors[f"{spec.module('attention')}.sinks"] if a.sinks else None,
        v_norm=a.v_norm,
    )
    return without_unread(_norms_before_rope(_with_factor(stored, a), a))


def _norms_before_rope(w: AttentionWeights, spec: AttentionSpec) -> AttentionWeights:
    """Norms after RoPE as norms before it, and what is left of their weights as a factor on queries after it.

    A head is as large before RoPE as after it, so that only weights know where they stand. A logit has those of queries
    and keys as a product. The larger of a pair's two is a factor on the pair, before or after.
    """
    if not spec.norm_after_rope:
        return w
    assert w.q_norm_d is not None and w.k_norm_d is not None
    weight_2F = (w.q_norm_d.double() * w.k_norm_d.double()).unflatten(0, (2, -1))
    size_F = weight_2F.abs().amax(0)
    turned_2F = torch.where(size_F > 0, weight_2F / size_F, 1.0)
    return replace(
        w,
        q_norm_d=size_F.repeat(2).float(),
        k_norm_d=torch.ones_like(w.k_norm_d, dtype=torch.float32),
        q_turned_d=turned_2F.flatten().float(),
    )


def _with_factor(w: AttentionWeights, spec: AttentionSpec) -> AttentionWeights:
    """RoPE's factor on queries and keys where it is on a part of each head: no factor on all logits stands for it."""
    factor = spec.rope.attention_factor
    if factor == 1 or spec.rotates_whole:
        return w
    by_2F = torch.ones(2, spec.head_dim // 2, dtype=torch.float64, device=w.q_HdD.device)
    by_2F[:, : spec.rope.rotary_dim // 2] = factor
    by_d = by_2F.flatten()

    def times(t_hd: Tensor | None) -> Tensor | None:
        return None if t_hd is None else (t_hd * by_d).float()

    q_HdD, k_GdD = ((t * by_d[:, None]).float() for t in (w.q_HdD, w.k_GdD))
    return replace(w, q_HdD=q_HdD, k_GdD=k_GdD, q_bias_Hd=times(w.q_bias_Hd), k_bias_Gd=times(w.k_bias_Gd))


def module_tensors(tensors: dict[str, Tensor], spec: ModelSpec, layer: int) -> dict[str, Tensor]:
    """A layer's tensors as transformers' module holds them: experts stacked, where files do not have them so.

    Args:
        tensors: As stored, names without the layer's prefix; what is stacked is taken out of it.
        spec: The model.
        layer: Number of the layer.
    """
    experts = spec.table.experts
    if experts is None or not experts.in_layer(layer, spec.config):
        return tensors
    for name, parts in experts.stacked.items():
        if name in tensors:
            continue
        if "{expert}" not in parts[0]:
            tensors[name] = tensors.pop(parts[0])
            continue
        tensors[name] = stacked(tensors, parts, range(spec.experts))
    return tensors


def stacked(tensors: dict[str, Tensor], parts: Sequence[str], experts: Iterable[int]) -> Tensor:
    """Tensors of experts as one: the parts of each joined along their rows.

    Args:
        tensors: By name; what is stacked is taken out of it.
        parts: Names, with ``{expert}``.
        experts: Numbers.

    Raises:
        KeyError: an expert lacks a part.
        RuntimeError: experts are not alike.
    """
    return torch.stack([torch.cat([tensors.pop(part.format(expert=n)) for part in parts]) for n in experts])


def is_like_llama(table: Table) -> bool:
    """Whether projections are where, and heads lie as, Llama has them: what pooling rewrites."""
    fused_heads = {"attention", "query_key_value", "q_norm", "k_norm"} & set(table.modules)
    return not fused_heads and not table.attention.get("qk_norm_across")
