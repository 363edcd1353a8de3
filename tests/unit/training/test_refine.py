"""Refinement goes downhill, is reproducible, and starts from what it is given."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from unittest.mock import patch

import pytest
import torch
from tests.common import FP32, relative_error
from tests.unit.layers import attention_spec, inputs, random_attention, stats_of

from latentize.attention.grouped import grouped_attention
from latentize.attention.latent import LatentWeights, latent_attention
from latentize.attention.spec import LatentSpec
from latentize.methods.closed_form import convert_layer
from latentize.methods.setting import Setting
from latentize.modeling.attention import LatentAttention
from latentize.training.descent import Adam, Heads, Muon, Schedule, descent
from latentize.training.refine import Refinement, descend, expand_heads, stacked_heads
from latentize.training.refine import refine as refine_relative
from latentize.training.relative import token_energy

expanded = partial(latent_attention, absorb=False)
HOW = Refinement(steps=30, tokens=96)
ONE_STEP = Schedule(steps=1, rate=0.1, warmup=1)


@pytest.fixture
def job():
    """A layer at a third of its cache, its inputs, and what its attention should add."""
    spec = attention_spec(2)
    w, x = random_attention(spec, biases=True), inputs(batch=12, length=24)
    start = convert_layer(w, spec, stats_of(w, x), Setting("transmla", 14, 8, freqfold=2))
    return start, x.float(), grouped_attention(x, w, spec).float()


def refine(w: LatentWeights, inputs, target: torch.Tensor, how: Refinement):
    """Every token relative to what its attention should add."""
    return refine_relative(w, inputs, target, token_energy(target, target), how)


def error(w, x, target, first: int = 0) -> float:
    wrong = (expanded(x, w.to(torch.float32)) - target).square().sum(-1)
    return float((wrong / token_energy(target, target))[:, first:].mean())


def test_the_error_shrinks(job) -> None:
    start, x, target = job
    before, after = error(start, x, target), error(refine(start, x.__getitem__, target, HOW).weights, x, target)
    assert after < 0.7 * before


def test_a_refinement_says_what_it_was_worth(job) -> None:
    start, x, target = job
    found = refine(start, x.__getitem__, target, replace(HOW, probe=24))
    held = slice(len(x) - 1, len(x))
    for weights, said in ((start, found.before), (found.weights, found.after)):
        assert said == pytest.approx(error(weights, x[held], target[held]), rel=1e-3)
    assert found.after < found.before


def projections(w: LatentWeights) -> dict[str, torch.Tensor]:
    return {n: t for n, t in vars(w).items() if isinstance(t, torch.Tensor) and n != "frequencies_PF"}


def test_no_steps_change_nothing(job) -> None:
    start, x, target = job
    same = refine(start, x.__getitem__, target, replace(HOW, steps=0)).weights
    for name, tensor in projections(start).items():
        assert torch.equal(getattr(same, name), tensor.float()), name
        assert not getattr(same, name).requires_grad


def test_what_is_exact_is_left_alone(job) -> None:
    start, x, _ = job
    same = refine(start, x.__getitem__, expanded(x, start.to(torch.float32)), HOW).weights
    for name, tensor in projections(start).items():
        assert torch.equal(getattr(same, name), tensor.float()), name


def test_a_refinement_that_makes_it_worse_gives_the_start_back(job) -> None:
    start, x, target = job
    start = start.to(torch.float32)
    given = {n: t.clone() for n, t in projections(start).items()}
    same = refine(start, x.__getitem__, target, replace(HOW, steps=5, rate=30.0)).weights
    for name, tensor in given.items():
        assert torch.equal(getattr(start, name), tensor), f"{name} was trained in place"
        assert torch.equal(getattr(same, name), tensor), name


def test_the_same_seed_gives_the_same_weights(job) -> None:
    start, x, target = job
    one, same, other = (refine(start, x.__getitem__, target, replace(HOW, steps=4, seed=s)).weights for s in (1, 1, 2))
    assert torch.equal(one.kv_a_rD, same.kv_a_rD)
    assert not torch.equal(one.kv_a_rD, other.kv_a_rD)


@pytest.mark.parametrize("massive", [1e2, 1e4])
def test_a_token_of_any_size_counts_alike(job, massive: float) -> None:
    """What a massive token's error is, is nothing beside its size; the others are repaired as if it were not there."""
    start, x, target = job
    residual = target.clone()
    residual[:, 0] *= massive
    energy = token_energy(residual, residual)
    found = refine_relative(start, x.__getitem__, target, energy, HOW)
    assert error(found.weights, x, target, first=1) < 0.8 * error(start, x, target, first=1)
    assert float(energy[:, 0].min()) > massive * float(energy[:, 1:].median())


@pytest.mark.parametrize(("inherited", "share"), [(0.0, 1.0), (0.75, 0.5), (1.0, 0.1**0.5), (2.0, 0.1**0.5)])
@pytest.mark.parametrize("size", [1.0, 0.1])
def test_a_step_goes_by_what_the_layer_lost_itself(inherited: float, share: float, size: float) -> None:
    """Not by what was wrong before it, of which it can repair little; that it lost nothing itself is not believed."""
    x, matrix = torch.randn(8, 6, 4), torch.nn.Parameter(torch.randn(4, 4))
    start = matrix.detach().clone()
    target = x @ start + size * torch.randn(8, 6, 4)
    how = Refinement(steps=1, warmup=1, tokens=48, rate=0.1, probe=6)
    energy = 10 * target.square().sum(-1)
    before = float(((x @ start - target).square().sum(-1) / energy)[-1:].mean())
    options = {"inherited": inherited * before}
    descend([matrix], lambda rows: x[rows] @ matrix, target, energy, how, **options)
    moved = float((matrix.detach() - start).norm() / start.norm())
    assert moved == pytest.approx(0.1 * (before**0.5) * share, rel=0.3)


def test_the_larger_of_both_models_is_what_an_error_is_relative_to() -> None:
    """One that is massive in either model only must not be all of the loss."""
    source, made = torch.ones(1, 5, 4), torch.ones(1, 5, 4)
    source[0, 1], made[0, 2] = 100.0, 1000.0
    assert token_energy(source, made).tolist() == [[4.0, 4e4, 4e6, 4.0, 4.0]]
    assert float(token_energy(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)).min()) > 0


def test_frequencies_are_not_trained(job) -> None:
    start, x, target = job
    refined = refine(start, x.__getitem__, target, replace(HOW, steps=3)).weights
    assert torch.equal(refined.frequencies_PF, start.frequencies_PF)
    assert refined.spec == start.spec


def test_a_loss_that_is_not_finite_is_an_error(job) -> None:
    start, x, target = job
    with pytest.raises(FloatingPointError, match="step 0"):
        refine(start, x.__getitem__, target * torch.nan, HOW)


def test_heads_that_shared_projections_compute_the_same_apart(job) -> None:
    start, x, _ = job
    apart = expand_heads(start.to(torch.float32))
    assert apart.spec.up_heads == apart.spec.num_heads == 4
    assert apart.spec.cache_values == start.spec.cache_values
    assert relative_error(expanded(x, apart), expanded(x, start.to(torch.float32))) <= FP32


def test_the_rate_warms_up_and_decays() -> None:
    factors = [Schedule(steps=20, rate=1.0, warmup=5).factor(step) for step in range(20)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert 0 < factors[-1] < 0.1


@pytest.mark.parametrize(
    ("length", "tokens", "steps"), [(512, 1024, 200), (1024, 1024, 200), (2048, 2048, 100), (8192, 8192, 25)]
)
def test_long_sequences_take_the_same_text_in_fewer_steps(length: int, tokens: int, steps: int) -> None:
    made = Refinement(steps=200, tokens=1024, rate=0.03, seed=7).suited(length)
    assert (made.tokens, made.steps, made.seed) == (tokens, steps, 7)
    assert made.rate == pytest.approx(0.03 * (tokens / 1024) ** 0.5)


@pytest.mark.parametrize(("width", "kind"), [(128, Muon), (256, Muon), (1024, Adam), (2048, Adam), (4096, Adam)])
def test_what_costs_more_than_it_gains_is_not_orthogonalised(width: int, kind: type) -> None:
    """Orthogonalising whole matrices grows with the cube of the width, what a step multiplies with its square."""
    with torch.device("meta"):
        shapes = [torch.nn.Parameter(torch.empty(2 * width, width)), torch.nn.Parameter(torch.empty(width, width))]
    with patch.object(Muon, "_optimisers", list), patch.object(Adam, "_optimisers", list):
        assert type(descent(shapes, Refinement().suited(512))) is kind


@pytest.mark.parametrize("width", [128, 576, 1024, 2048, 4096])
def test_heads_are_orthogonalised_at_any_width(width: int) -> None:
    """Heads become more with the width, not larger."""
    spec = LatentSpec(
        hidden_size=width, num_heads=max(2, width // 128), kv_lora_rank=min(512, width // 4), qk_rope_head_dim=64,
        qk_nope_head_dim=128, v_head_dim=128, rope_heads=1, up_heads=max(2, width // 128), softmax_scale=1.0,
    )  # fmt: skip
    with torch.device("meta"):
        attention = LatentAttention(spec)
    parameters = list(attention.parameters())
    with patch.object(Muon, "_optimisers", list), patch.object(Adam, "_optimisers", list):
        assert type(descent(parameters, Refinement().suited(512), heads=stacked_heads(attention))) is Muon


@pytest.mark.parametrize("axis", [0, 1])
def test_every_head_takes_a_step_of_its_own(axis: int) -> None:
    """A head with hardly any gradient moves as far as the others, as if it were alone."""
    heads, shape = Heads(3, axis), [24, 10]
    shape[axis] *= 3
    start = torch.randn(shape)
    gradient = heads.join(heads.stack(torch.randn(shape)) * torch.tensor([1.0, 1e-3, 1e2])[:, None, None])
    parameter = torch.nn.Parameter(start.clone())
    Muon([parameter], ONE_STEP, heads=[heads]).step((parameter * gradient).sum())
    moved = heads.stack(parameter.detach() - start)
    size = heads.stack(start).norm() / 30**0.5
    for step, alone in zip(moved, heads.stack(gradient), strict=True):
        u, _, v = torch.linalg.svd(alone, full_matrices=False)
        assert relative_error(step, -0.1 * size * u @ v) < 0.3
    values = torch.linalg.svdvals(moved) / (0.1 * size)
    assert float(values.min()) > 0.5 and float(values.max()) < 1.5


@pytest.mark.parametrize("axis", [0, 1])
def test_a_stack_of_heads_joins_to_what_it_was(axis: int) -> None:
    matrix, heads = torch.arange(96.0).view(8, 12), Heads(4, axis)
    assert heads.stack(matrix).shape == ((4, 2, 12), (4, 8, 3))[axis]
    assert torch.equal(heads.stack(matrix)[1], matrix[2:4] if axis == 0 else matrix[:, 3:6])
    assert torch.equal(heads.join(heads.stack(matrix)), matrix)


@pytest.mark.parametrize("shape", [(6, 6), (24, 6), (6, 24), (7,)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_step_is_relative_to_the_tensor(shape: tuple[int, ...], scale: float) -> None:
    """The first step moves all entries alike, by ``rate`` times their root mean square."""
    tensor = torch.nn.Parameter(scale * torch.randn(shape))
    before = tensor.detach().clone()
    Adam([tensor], ONE_STEP).step((tensor * torch.randn(shape)).sum())
    moved = (tensor.detach() - before).abs() / (0.1 * before.square().mean().sqrt())
    assert moved.flatten().tolist() == pytest.approx([1.0] * moved.numel(), rel=1e-2)


@pytest.mark.parametrize("shape", [(6, 6), (24, 6), (6, 24)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_step_of_muon_is_relative_to_the_matrix(shape: tuple[int, int], scale: float) -> None:
    """All singular values of a step are ``rate`` times the root mean square one of the matrix."""
    matrix = torch.nn.Parameter(scale * torch.randn(shape))
    before = matrix.detach().clone()
    expected = 0.1 * torch.linalg.svdvals(before).square().mean().sqrt()
    descent = Muon([matrix], ONE_STEP)
    descent.step((matrix * torch.randn(shape)).sum())
    moved = torch.linalg.svdvals(matrix.detach() - before) / expected
    # Newton and Schulz' iteration, in bfloat16, brings singular values near one, no more.
    assert float(moved.min()) > 0.5 and float(moved.max()) < 1.5


@pytest.mark.parametrize("shape", [(48, 48), (96, 24), (24, 96)])
@pytest.mark.parametrize(("narrow", "tolerance"), [(True, 0.0), (False, 0.05)])
def test_a_step_of_muon_is_that_of_torch(shape: tuple[int, int], narrow: bool, tolerance: float) -> None:
    """Bit for bit in bfloat16, and by its rounding in float32, which is taken where bfloat16 is emulated."""
    schedule = Schedule(steps=8, tokens=48, rate=0.1, warmup=1)
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    reference = torch.optim.Muon([theirs], momentum=0.9, weight_decay=0.0)
    descent = Muon([ours], schedule)
    # torch enlarges the steps of tall matrices; here all have the size that is asked for.
    (size,) = (group["size"] for optimiser in descent.optimisers for group in optimiser.param_groups)
    size /= max(1.0, shape[0] / shape[1]) ** 0.5
    start = ours.detach().clone()
    with patch("latentize.training.descent.multiplies_bfloat16", return_value=narrow):
        for step in range(schedule.steps):
            gradient = torch.randn(shape)
            reference.param_groups[0]["lr"] = schedule.rate * schedule.factor(step) * size
            theirs.grad = gradient.clone()
            reference.step()
            descent.step((ours * gradient).sum())
    with torch.no_grad():
        assert float((ours - theirs).norm()) <= tolerance * float((theirs - start).norm())
    if not narrow:
        assert not torch.equal(ours, theirs), "both are bfloat16"


def test_a_gradient_may_be_given_from_outside() -> None:
    weight, x = torch.randn(4, 4), torch.randn(3, 4)
    one, two = (torch.nn.Parameter(weight.clone()) for _ in range(2))
    y = x @ one
    Adam([one], ONE_STEP).step(y.square().sum())
    z = x @ two
    Adam([two], ONE_STEP).step(z, 2 * z.detach())
    assert torch.equal(one, two)


def test_batches_visit_every_sequence_once_a_round() -> None:
    rows = list(Schedule(steps=7, tokens=48, rate=0.1).batches(count=6, length=24))
    first, second = torch.cat(rows[:3]).tolist(), torch.cat(rows[3:6]).tolist()
    assert len(rows) == 7
    assert sorted(first) == sorted(second) == list(range(6))
    assert first != second


@pytest.mark.parametrize(("length", "expected"), [(6, 3), (24, 2), (48, 1), (100, 1)])
def test_a_batch_is_as_many_tokens_whatever_the_length(length: int, expected: int) -> None:
    (rows,) = Schedule(steps=1, tokens=48, rate=0.1).batches(count=3, length=length)
    assert len(rows) == expected


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_the_output_projection_is_solved_for(job, factor: float) -> None:
    """With all else right and the projection spoilt, one solution mends what steps have not."""
    start, x, _ = job
    exact = start.to(torch.float32)
    spoilt = replace(exact, o_DHV=exact.o_DHV + 0.3 * exact.o_DHV.std() * torch.randn_like(exact.o_DHV))
    wanted = factor * expanded(x, exact)
    energy = token_energy(wanted, wanted)
    how = replace(HOW, steps=3, rate=1e-3, warmup=1)
    added = {"added": lambda made: factor * made}
    stepped = refine_relative(spoilt, x.__getitem__, wanted, energy, how, **added, factor=None)
    solved = refine_relative(spoilt, x.__getitem__, wanted, energy, how, **added, factor=factor)
    assert solved.before == stepped.before
    assert solved.after < 0.05 * stepped.after


@pytest.mark.parametrize(("steps", "sequences"), [(1, 2), (2, 4), (30, 11)])
def test_it_is_solved_for_on_as_much_text_as_the_steps_read(job, steps: int, sequences: int) -> None:
    """Two sequences at least, and none of those that tell whether it helped: the last of twelve."""
    start, x, target = job
    seen: set[int] = set()

    def read(rows: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            seen.update(rows.tolist())
        return x[rows]

    with patch("latentize.training.refine._SOLVED_TOKENS", 48):
        refine(start, read, target, replace(HOW, steps=steps, tokens=48, rate=1e-3, warmup=1))
    assert seen == {*range(sequences), 11}


@pytest.mark.parametrize("kind", [Adam, Muon])
def test_shares_of_a_step(kind: type[Adam | Muon]) -> None:
    """Half a step where half is asked for, none where nothing is."""
    start = torch.randn(3, 8, 8)
    moved = []
    for shares in (None, [1.0, 0.5, 0.0]):
        parameters = [torch.nn.Parameter(t.clone()) for t in start]
        loss = sum(((p * t).sum() for p, t in zip(parameters, start.mT, strict=True)), torch.zeros(()))
        kind(parameters, ONE_STEP, shares).step(loss)
        moved.append(torch.stack([p.detach() for p in parameters]) - start)
    assert relative_error(moved[1][:2], moved[0][:2] * torch.tensor([1.0, 0.5])[:, None, None]) <= FP32
    assert not moved[1][2].any() and moved[0][2].any()
