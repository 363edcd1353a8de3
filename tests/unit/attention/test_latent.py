"""The four forms of latent attention compute the same, gradients included."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.common import FP32, FP64, relative_error
from torch import Tensor

from latentize.attention.cache import GrowingCache
from latentize.attention.latent import LatentWeights, cache_rows, expanded_heads, latent_attention, queries
from latentize.attention.masks import causal_mask
from latentize.attention.spec import RopeSpec
from latentize.modeling.attention import LatentAttention
from latentize.modeling.expanded import attend_expanded
from latentize.modeling.tensors import state_dict

D = 24


def random_weights(
    heads: int = 4,
    up: int = 2,
    ropes: int = 2,
    rank: int = 6,
    rope: int = 4,
    nope: int = 5,
    v: int = 3,
    *,
    biases: bool = False,
    norms: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> LatentWeights:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) / shape[-1] ** 0.5

    return LatentWeights(
        q_nope_HND=2 * draw(heads, nope, D),
        q_rope_HRD=2 * draw(heads, rope, D),
        kv_a_rD=draw(rank, D),
        k_rope_PRD=2 * draw(ropes, rope, D),
        k_up_UNr=2 * draw(up, nope, rank),
        v_up_UVr=draw(up, v, rank),
        o_DHV=draw(D, heads, v),
        frequencies_PF=torch.rand(ropes, rope // 2, generator=generator, dtype=torch.float64) + 0.05,
        softmax_scale=0.6,
        q_nope_bias_HN=draw(heads, nope) if biases else None,
        q_rope_bias_HR=draw(heads, rope) if biases else None,
        k_rope_bias_PR=draw(ropes, rope) if biases else None,
        o_bias_D=draw(D) if biases else None,
        q_norm_R=1 + 0.3 * draw(rope) if norms else None,
        k_norm_R=1 + 0.3 * draw(rope) if norms else None,
    )


def by_hand(x_TD: Tensor, w: LatentWeights, window: int | None = None) -> Tensor:
    """One sequence, one head, one query at a time, straight from the paper's equations. Float64, no biases."""
    spec = w.spec
    c_Tr = x_TD @ w.kv_a_rD.T

    def turn(y_R: Tensor, t: int, ladder_F: Tensor) -> Tensor:
        half = spec.qk_rope_head_dim // 2
        z_F = torch.complex(y_R[:half], y_R[half:]) * torch.exp(1j * t * ladder_F)
        return torch.cat([z_F.real, z_F.imag])

    out_TD = torch.zeros_like(x_TD)
    for h in range(spec.num_heads):
        u, p = h * spec.up_heads // spec.num_heads, h * spec.rope_heads // spec.num_heads
        for t in range(len(x_TD)):
            start = 0 if window is None else max(0, t - window + 1)
            scores, values = [], []
            for s in range(start, t + 1):
                nope = (w.q_nope_HND[h] @ x_TD[t]) @ (w.k_up_UNr[u] @ c_Tr[s])
                q_R = turn(w.q_rope_HRD[h] @ x_TD[t], t, w.frequencies_PF[p])
                k_R = turn(w.k_rope_PRD[p] @ x_TD[s], s, w.frequencies_PF[p])
                scores.append(w.softmax_scale * (nope + q_R @ k_R))
                values.append(w.v_up_UVr[u] @ c_Tr[s])
            probability = torch.stack(scores).softmax(0)
            out_TD[t] += w.o_DHV[:, h] @ (probability @ torch.stack(values))
    return out_TD


@pytest.mark.parametrize("absorb", [False, True])
@pytest.mark.parametrize(("up", "ropes", "window"), [(4, 1, None), (2, 2, None), (1, 4, 3)])
def test_both_forms_against_the_papers_equations(up: int, ropes: int, window: int | None, absorb: bool) -> None:
    w = random_weights(up=up, ropes=ropes, dtype=torch.float64)
    x = torch.randn(7, D, dtype=torch.float64)
    got = latent_attention(x[None], w, absorb=absorb, window=window)[0]
    assert relative_error(got, by_hand(x, w, window)) <= FP64


@st.composite
def layers(draw: st.DrawFn) -> LatentWeights:
    heads = draw(st.sampled_from([1, 2, 4, 6]))
    shared = st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0])
    rope = 2 * draw(st.integers(1, 4))
    return random_weights(
        heads,
        up=draw(shared),
        ropes=draw(shared),
        rank=draw(st.integers(1, 9)),
        rope=rope,
        nope=draw(st.integers(0, 6)),
        v=draw(st.integers(1, 7)),
        biases=draw(st.booleans()),
        norms=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


@given(w=layers(), batch=st.integers(1, 3), past=st.integers(0, 6), new=st.integers(1, 6), seed=st.integers(0, 99))
def test_absorbed_equals_expanded_and_the_fused_prefill(
    w: LatentWeights, batch: int, past: int, new: int, seed: int
) -> None:
    """All shapes: heads that share projections or roped keys, no un-roped part, biases, norms, a cache before."""
    x = torch.randn(batch, past + new, D, generator=torch.Generator().manual_seed(seed))
    window = None if seed % 2 else 1 + seed % 5
    results = {}
    for absorb in (False, True):
        cache = GrowingCache()
        if past:
            latent_attention(x[:, :past], w, absorb=absorb, cache=cache, window=window)
        results[absorb] = latent_attention(x[:, past:], w, absorb=absorb, cache=cache, window=window)
        assert cache.values_per_token() == w.spec.cache_values
        assert cache.get_seq_length() == past + new
    assert relative_error(results[True], results[False]) <= FP32

    positions = torch.arange(past + new)[None]
    q, rows = queries(x, w, positions), cache_rows(x, w, positions)
    q_new = [t[:, :, past:] for t in q]
    allowed = causal_mask(new, past + new, window=window)
    naive = expanded_heads(*q_new, *rows, allowed, w)
    mask = None if window is None else allowed[None, None]
    assert relative_error(attend_expanded(*q_new, *rows, w, mask), naive) <= FP32
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    assert relative_error(attend_expanded(*q_new, *rows, w, additive[None, None]), naive) <= FP32


@pytest.mark.parametrize("absorb", [False, True])
@pytest.mark.parametrize("window", [None, 3])
def test_decode_equals_prefill(absorb: bool, window: int | None) -> None:
    w = random_weights(biases=True, norms=True)
    x = torch.randn(2, 9, D)
    cache = GrowingCache()
    steps = [latent_attention(x[:, t : t + 1], w, absorb=absorb, cache=cache, window=window) for t in range(9)]
    assert relative_error(torch.cat(steps, dim=1), latent_attention(x, w, absorb=absorb, window=window)) <= FP32


def test_positions_may_be_given() -> None:
    """A shift of all positions changes nothing; one of some of them does."""
    w, x = random_weights(dtype=torch.float64), torch.randn(2, 6, D, dtype=torch.float64)
    plain = latent_attention(x, w, absorb=True)
    assert relative_error(latent_attention(x, w, absorb=True, positions_BT=torch.arange(40, 46)[None]), plain) <= FP64
    per_row = torch.stack([torch.arange(6), torch.arange(0, 12, 2)])
    shifted = latent_attention(x, w, absorb=True, positions_BT=per_row)
    assert relative_error(shifted[:1], plain[:1]) <= FP64
    assert relative_error(shifted[1:], plain[1:]) > 1e-3
    assert relative_error(latent_attention(x, w, absorb=False, positions_BT=per_row), shifted) <= FP64


@pytest.mark.parametrize("norms", [False, True])
def test_gradients_of_both_forms_agree(norms: bool) -> None:
    w = random_weights(biases=True, norms=norms, dtype=torch.float64)
    names = [n for n, t in vars(w).items() if isinstance(t, Tensor) and n != "frequencies_PF"]
    x, direction = torch.randn(2, 7, D, dtype=torch.float64), torch.randn(2, 7, D, dtype=torch.float64)
    gradients = []
    for absorb in (False, True):
        leaves = {n: getattr(w, n).clone().requires_grad_() for n in names}
        x_leaf = x.clone().requires_grad_()
        (latent_attention(x_leaf, replace(w, **leaves), absorb=absorb) * direction).sum().backward()
        gradients.append({n: t.grad for n, t in {**leaves, "x": x_leaf}.items()})
    for name, expected in gradients[0].items():
        assert expected is not None and expected.abs().max() > 0, name
        assert relative_error(gradients[1][name], expected) <= FP64, name


def test_gradient_of_the_fused_prefill() -> None:
    w, x = random_weights(), torch.randn(1, 7, D)
    positions, grads = torch.arange(7)[None], []
    for form in (attend_expanded, lambda *a: expanded_heads(*a[:4], causal_mask(7, 7), a[4])):
        k_up = w.k_up_UNr.clone().requires_grad_()
        changed = replace(w, k_up_UNr=k_up)
        form(*queries(x, changed, positions), *cache_rows(x, changed, positions), changed).square().sum().backward()
        grads.append(k_up.grad)
    assert relative_error(grads[0], grads[1]) <= FP32


def test_to_keeps_frequencies_exact() -> None:
    w = random_weights().to(torch.bfloat16)
    assert w.q_nope_HND.dtype == torch.bfloat16
    assert w.frequencies_PF.dtype == torch.float64


@pytest.mark.parametrize("shape", [{}, {"nope": 0}, {"biases": True}, {"norms": True, "ropes": 4}])
def test_module_holds_the_weights_it_was_made_from(shape: dict) -> None:
    w = random_weights(**shape)
    module = LatentAttention.from_weights(w, layer_idx=3)
    back = module.weights()
    assert back.spec == w.spec == module.spec
    for name, tensor in vars(w).items():
        if isinstance(tensor, Tensor) and name != "frequencies_PF":
            assert torch.equal(getattr(back, name), tensor), name
        elif name != "frequencies_PF":
            assert getattr(back, name) == tensor, name
    assert torch.allclose(back.frequencies_PF.double(), w.frequencies_PF, rtol=1e-6)
    again = state_dict(back, module.frequency_table)
    assert again.keys() == module.state_dict().keys()
    for name, tensor in module.state_dict().items():
        assert torch.equal(again[name], tensor), name


def test_a_frequency_outside_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="table"):
        state_dict(random_weights(), (1.0, 0.5))


@pytest.mark.parametrize("shape", [{}, {"nope": 0, "norms": True}, {"biases": True, "up": 4, "ropes": 1}])
def test_module_equals_the_reference_in_prefill_and_decode(shape: dict) -> None:
    w = random_weights(**shape)
    module, x = LatentAttention.from_weights(w), torch.randn(2, 8, D)
    expected = latent_attention(x, w, absorb=False)
    assert relative_error(module(x)[0], expected) <= FP32
    cache = GrowingCache()
    parts = [module(x[:, :4], torch.arange(4)[None], past_key_values=cache)[0]]
    parts.append(module(x[:, 4:6], torch.arange(4, 6)[None], past_key_values=cache)[0])
    parts += [module(x[:, t : t + 1], torch.tensor([[t]]), past_key_values=cache)[0] for t in (6, 7)]
    assert relative_error(torch.cat(parts, dim=1), expected) <= FP32
    assert cache.values_per_token() == w.spec.cache_values


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_module_heeds_masks_in_prefill_and_decode(kind: str) -> None:
    """Left padding, as ``generate`` of transformers gives it to a batch."""
    w = random_weights()
    module, x = LatentAttention.from_weights(w), torch.randn(1, 7, D)
    expected = latent_attention(x[:, 2:], w, absorb=False)
    allowed = causal_mask(7, 7) & (torch.arange(7) >= 2)
    allowed |= torch.eye(7, dtype=torch.bool)
    mask = allowed[None, None]
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    positions = torch.tensor([[0, 0, 0, 1, 2, 3, 4]])
    assert relative_error(module(x, positions, mask)[0][:, 2:], expected) <= FP32
    cache = GrowingCache()
    module(x[:, :6], positions[:, :6], mask[..., :6, :6], past_key_values=cache)
    last = module(x[:, 6:], positions[:, 6:], mask[..., 6:, :], past_key_values=cache)[0]
    assert relative_error(last, expected[:, -1:]) <= FP32


def test_frequencies_survive_bf16(tmp_path: Path) -> None:
    """Rounded to bf16 a frequency is off by up to 0.4 %: half a turn after a thousand tokens."""
    table = RopeSpec(10_000.0, 16).frequencies
    w = replace(random_weights(rope=4), frequencies_PF=torch.tensor([table[1:3], table[5:7]], dtype=torch.float64))
    module = LatentAttention.from_weights(w, frequency_table=table).to(torch.bfloat16)
    path = tmp_path / "layer.safetensors"
    save_file(module.state_dict(), str(path))
    loaded = LatentAttention(w.spec, frequency_table=table).to(torch.bfloat16)
    loaded.load_state_dict(load_file(str(path)))
    assert loaded.weights().frequencies_PF.dtype == torch.float32
    assert torch.allclose(loaded.frequencies().double(), w.frequencies_PF, rtol=1e-6)
    assert not torch.allclose(w.frequencies_PF.bfloat16().double(), w.frequencies_PF, rtol=1e-6), "bf16 would round"
