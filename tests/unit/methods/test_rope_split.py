"""Which components keep RoPE, and that nothing but the dropped rotations is lost."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from tests.common import FP64, relative_error
from tests.unit.layers import D, attention_spec, inputs, random_attention, stats_of
from torch import Tensor

from latentize.attention.grouped import AttentionWeights, grouped_attention
from latentize.attention.latent import latent_attention
from latentize.attention.rope import rope_angles, rotate_half
from latentize.attention.spec import AttentionSpec
from latentize.methods.closed_form import convert_layer
from latentize.methods.mha2mla import select_pairs, split_per_head
from latentize.methods.rope_split import RopeSplit
from latentize.methods.setting import Setting
from latentize.methods.statistics import CalibrationStats
from latentize.methods.transmla import rorope
from latentize.recipe import Selection

SELECTIONS = get_args(Selection)


def project(x_TD: Tensor, w_hdD: Tensor, bias_hd: Tensor | None) -> Tensor:
    y_hTd = torch.einsum("TD,hdD->hTd", x_TD, w_hdD)
    return y_hTd if bias_hd is None else y_hTd + bias_hd[:, None]


def split_logits(split: RopeSplit, x_TD: Tensor, *, rotate: bool) -> Tensor:
    """``[H, T, S]``, unscaled, with every query looking everywhere."""
    q_nope = project(x_TD, split.q_nope_HND, split.q_nope_bias_HN)
    q_rope = project(x_TD, split.q_rope_HRD, split.q_rope_bias_HR)
    k_rope = project(x_TD, split.k_rope_PRD, split.k_rope_bias_PR)
    heads = len(q_nope)
    k_nope = (x_TD @ split.k_nope_CD.T) @ split.read_UNC.mT
    if rotate:
        cos, sin = rope_angles(split.frequencies_PF, torch.arange(len(x_TD))[None])
        share = heads // len(k_rope)
        k_rope = rotate_half(k_rope[None], cos, sin)[0]
        q_rope = rotate_half(q_rope[None], cos.repeat_interleave(share, 1), sin.repeat_interleave(share, 1))[0]
    k_nope, k_rope = (k.repeat_interleave(heads // len(k), dim=0) for k in (k_nope, k_rope))
    return q_nope @ k_nope.mT + q_rope @ k_rope.mT


def source_logits(w: AttentionWeights, spec: AttentionSpec, x_TD: Tensor, *, rotate: bool) -> Tensor:
    q, k = project(x_TD, w.q_HdD, w.q_bias_Hd), project(x_TD, w.k_GdD, w.k_bias_Gd)
    if rotate:
        ladder = torch.tensor([spec.rope.frequencies], dtype=torch.float64)
        angles = rope_angles(ladder, torch.arange(len(x_TD))[None])
        q, k = rotate_half(q[None], *angles)[0], rotate_half(k[None], *angles)[0]
    return q @ k.repeat_interleave(spec.group_size, dim=0).mT


def centred(logits_HTS: Tensor) -> Tensor:
    """Without what is the same for all keys of a query, which softmax ignores."""
    return logits_HTS - logits_HTS.mean(-1, keepdim=True)


def test_two_norm_selection_against_a_loop_over_tokens() -> None:
    """Means over tokens of the norms before RoPE, their product summed over the group's queries."""
    spec = attention_spec(2)
    w, x = random_attention(spec, biases=True), inputs(batch=1, length=11)
    pairs = select_pairs("2-norm", spec, 6, stats_of(w, x))
    half = spec.head_dim // 2
    for g in range(2):
        scores = []
        for f in range(half):
            k_sum, q_sums = 0.0, [0.0] * spec.group_size
            for token in x[0]:
                k = w.k_GdD[g] @ token + w.k_bias_Gd[g]
                k_sum += float(torch.hypot(k[f], k[f + half]))
                for i in range(spec.group_size):
                    h = g * spec.group_size + i
                    q = w.q_HdD[h] @ token + w.q_bias_Hd[h]
                    q_sums[i] += float(torch.hypot(q[f], q[f + half]))
            scores.append(sum(q_sum / 11 * k_sum / 11 for q_sum in q_sums))
        best = sorted(sorted(range(half), key=lambda f: -scores[f])[:3])
        assert pairs[g].tolist() == best
    assert pairs[0].tolist() != pairs[1].tolist(), "the example tells the heads apart"


@pytest.mark.parametrize(
    ("selection", "rope_dim", "expected"),
    [
        ("high", 6, [0, 1, 2]),
        ("low", 6, [5, 6, 7]),
        ("uniform", 4, [0, 4]),
        ("uniform", 8, [0, 2, 4, 6]),
        ("uniform", 2, [0]),
        ("high", 16, list(range(8))),
        ("low", 16, list(range(8))),
        ("uniform", 16, list(range(8))),
    ],
)
def test_fixed_selections(selection: Selection, rope_dim: int, expected: list[int]) -> None:
    assert select_pairs(selection, attention_spec(2), rope_dim).tolist() == [expected, expected]


def test_two_norm_at_full_rope_takes_all_in_order() -> None:
    spec = attention_spec(2)
    assert select_pairs("2-norm", spec, 16, stats_of(random_attention(spec))).tolist() == [list(range(8))] * 2


def test_two_norm_needs_statistics() -> None:
    with pytest.raises(ValueError, match="statistics"):
        select_pairs("2-norm", attention_spec(), 4)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_split_per_head_drops_the_rotation_of_the_others_and_nothing_else(selection: Selection, kv_heads: int) -> None:
    """Against a loop over heads and pairs: kept pairs rotate at their own frequency, the rest not at all."""
    spec = attention_spec(kv_heads)
    w, x = random_attention(spec), inputs(batch=1, length=6)[0]
    pairs = select_pairs(selection, spec, 4, stats_of(w))
    split = split_per_head(w, spec, pairs)
    got = split_logits(split, x, rotate=True)
    q, k = project(x, w.q_HdD, None), project(x, w.k_GdD, None)
    half = spec.head_dim // 2
    expected = torch.zeros_like(got)
    for h in range(spec.num_heads):
        g = h // spec.group_size
        for f in range(half):
            w_f = spec.rope.frequencies[f] if f in pairs[g] else 0.0
            for t in range(len(x)):
                q_f = torch.complex(q[h, t, f], q[h, t, f + half]) * torch.exp(torch.tensor(1j * w_f * t))
                for s in range(len(x)):
                    k_f = torch.complex(k[g, s, f], k[g, s, f + half]) * torch.exp(torch.tensor(1j * w_f * s))
                    expected[h, t, s] += (q_f * k_f.conj()).real
    assert relative_error(got, expected) <= 1e-6
    assert split.k_rope_PRD.shape == (kv_heads, 4, D)
    assert split.k_nope_CD.shape == (kv_heads * 12, D)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_full_rope_for_each_head_is_the_source(kv_heads: int, biases: bool) -> None:
    spec = attention_spec(kv_heads)
    w, x = random_attention(spec, biases=biases), inputs()
    setting = Setting("mha2mla", kv_heads * 16, 16, kv_heads, selection="2-norm", svd="joint")
    latent = convert_layer(w, spec, stats_of(w), setting)
    assert latent.spec.qk_nope_head_dim == 0
    expected = grouped_attention(x, w, spec)
    assert relative_error(latent_attention(x, latent, absorb=False), expected) <= FP64
    assert relative_error(latent_attention(x, latent, absorb=True), expected) <= FP64


ROROPE = [(1, 16, 1), (1, 16, 4), (2, 16, 1), (2, 8, 2), (2, 8, 8), (4, 4, 4), (4, 4, 8), (2, 2, 8)]


def make_rorope(
    kv_heads: int, rope_dim: int, freqfold: int, *, biases: bool = False
) -> tuple[AttentionSpec, AttentionWeights, CalibrationStats, RopeSplit]:
    spec = attention_spec(kv_heads)
    w = random_attention(spec, biases=biases)
    stats = stats_of(w)
    return spec, w, stats, rorope(w, spec, stats, rope_dim=rope_dim, freqfold=freqfold)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize(("kv_heads", "rope_dim", "freqfold"), ROROPE)
def test_rorope_keeps_every_unrotated_product(kv_heads: int, rope_dim: int, freqfold: int, biases: bool) -> None:
    """Both parts together are ``q · k``: the axes are orthogonal and ``read`` undoes them."""
    spec, w, _, split = make_rorope(kv_heads, rope_dim, freqfold, biases=biases)
    x = inputs(batch=1, length=7)[0]
    got, expected = split_logits(split, x, rotate=False), source_logits(w, spec, x, rotate=False)
    assert relative_error(centred(got), centred(expected)) <= FP64
    if not biases:
        assert relative_error(got, expected) <= FP64


@pytest.mark.parametrize("biases", [False, True])
def test_rorope_of_mqa_at_full_size_is_exact(biases: bool) -> None:
    """One kv head has one channel for each frequency: nothing is folded and nothing dropped."""
    spec, w, _, split = make_rorope(1, 16, 1, biases=biases)
    x = inputs(batch=1, length=9)[0]
    assert split.k_nope_CD.shape == (0, D)
    assert relative_error(split_logits(split, x, rotate=True), source_logits(w, spec, x, rotate=True)) <= FP64


def test_rorope_rotates_what_it_says() -> None:
    """A kv head that all others copy: the leading axis carries all of it, and only folding is lost."""
    spec = attention_spec(4)
    w = random_attention(spec)
    w = type(w)(**{**vars(w), "k_GdD": w.k_GdD[:1].repeat(4, 1, 1)})
    split = rorope(w, spec, stats_of(w), rope_dim=16, freqfold=1)
    x = inputs(batch=1, length=9)[0]
    assert relative_error(split_logits(split, x, rotate=True), source_logits(w, spec, x, rotate=True)) <= 1e-7


@pytest.mark.parametrize(("kv_heads", "rope_dim", "freqfold"), ROROPE)
def test_rorope_frequencies_are_every_other_of_the_source(kv_heads: int, rope_dim: int, freqfold: int) -> None:
    spec, _, _, split = make_rorope(kv_heads, rope_dim, freqfold)
    collapse = spec.head_dim // rope_dim
    assert split.frequencies_PF.tolist() == [list(spec.rope.frequencies[::collapse])]
    assert split.k_rope_PRD.shape == (1, rope_dim, D)
    assert split.q_rope_HRD.shape == (4, rope_dim, D)
    assert split.k_nope_CD.shape == (kv_heads * 16 - rope_dim, D)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize(("kv_heads", "rope_dim", "freqfold"), ROROPE)
def test_rorope_blocks_against_a_loop(kv_heads: int, rope_dim: int, freqfold: int, biases: bool) -> None:
    """Block by block over the tokens: which channels belong together, which axes lead, where they land."""
    spec, w, _, split = make_rorope(kv_heads, rope_dim, freqfold, biases=biases)
    half, collapse = spec.head_dim // 2, spec.head_dim // rope_dim
    keep, x = freqfold // collapse, inputs().flatten(0, 1)
    keys = project(x, w.k_GdD, w.k_bias_Gd)
    for block in range(half // freqfold):
        channels = [(g, block * freqfold + i) for g in range(kv_heads) for i in range(freqfold)]
        moment = torch.zeros(len(channels), len(channels), dtype=torch.float64)
        for part in range(2):
            y_nc = torch.stack([keys[g, :, part * half + f] for g, f in channels], dim=1)
            for y_c in y_nc:
                moment += torch.outer(y_c, y_c) / len(x)
        values, vectors = torch.linalg.eigh(moment)
        for component in range(keep):
            axis = vectors[:, -1 - component]
            rung = block * keep + component
            for part in range(2):
                row = part * (rope_dim // 2) + rung
                k_row = sum(a * w.k_GdD[g, part * half + f] for a, (g, f) in zip(axis, channels, strict=True))
                for h in range(spec.num_heads):
                    own = [(a, f) for a, (g, f) in zip(axis, channels, strict=True) if g == h // spec.group_size]
                    q_row = sum(a * w.q_HdD[h, part * half + f] for a, f in own)
                    got = torch.outer(split.q_rope_HRD[h, row], split.k_rope_PRD[0, row])
                    assert relative_error(got, torch.outer(q_row, k_row)) <= 1e-6, "an axis has no sign"
            # Frequency and place of the rung are those of its channels' block.
            assert (
                float(split.frequencies_PF[0, rung]) == spec.rope.frequencies[block * freqfold + component * collapse]
            )
            energy = sum(
                float(
                    project(x, split.k_rope_PRD, split.k_rope_bias_PR)[0, :, part * (rope_dim // 2) + rung]
                    .square()
                    .mean()
                )
                for part in range(2)
            )
            assert energy == pytest.approx(float(values[-1 - component]), rel=1e-8), "the largest energies lead"


def test_read_is_how_a_head_reads_its_key() -> None:
    """What a head reads, plus its share of the roped components, is its key."""
    spec, w, _, split = make_rorope(2, 8, 4)
    assert split.read_UNC.shape == (2, 16, 2 * 16 - 8)
    # q_rope is linear in q: with the identity for q it gives the share of each channel in the shared key.
    eye = torch.eye(16, D, dtype=torch.float64).expand(4, 16, D)
    probe = rorope(type(w)(**{**vars(w), "q_HdD": eye}), spec, stats_of(w), rope_dim=8, freqfold=4)
    for g in range(2):
        share_Rd = probe.q_rope_HRD[2 * g, :, :16]
        whole = split.read_UNC[g] @ split.k_nope_CD + share_Rd.T @ split.k_rope_PRD[0]
        assert relative_error(whole, w.k_GdD[g]) <= FP64


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_biases_of_split_per_head_lose_a_constant_only(selection: Selection, biases: bool) -> None:
    spec = attention_spec(2)
    w, x = random_attention(spec, biases=biases), inputs(batch=1, length=7)[0]
    split = split_per_head(w, spec, select_pairs(selection, spec, 8, stats_of(w)))
    got, expected = split_logits(split, x, rotate=False), source_logits(w, spec, x, rotate=False)
    assert relative_error(centred(got), centred(expected)) <= FP64
    assert (split.q_rope_bias_HR is not None) == biases


@pytest.mark.parametrize(("rope_dim", "freqfold"), [(6, 2), (8, 1), (8, 3), (16, 3), (4, 2)])
def test_sizes_that_do_not_divide_are_refused(rope_dim: int, freqfold: int) -> None:
    spec = attention_spec(2)
    w = random_attention(spec)
    with pytest.raises(ValueError, match="do not fit"):
        rorope(w, spec, stats_of(w), rope_dim=rope_dim, freqfold=freqfold)
