"""Where bits go: a basis for each layer's rows, and as many bits for each component as it is worth.

An error ``δ`` in a cached row costs ``½ δᵀ F δ`` nats to second order, ``F`` the Fisher information of the row:
``E[g gᵀ]`` over gradients ``g`` of the log-likelihood of text that is drawn from the model itself. In the eigenvectors
of ``F^½ C F^½``, ``C`` the second moment of the rows, both are diagonal: components are uncorrelated, and their errors
add up (Cover & Thomas, section 10.3). Errors of rounding are independent from token to token, or nearly so. Where they
are not, as in the first layer, whose rows follow from the token alone, a layer costs more than this says. What it does
cost is measured, and its root is a factor on all of its components.

n sampled tokens, r kv_lora_rank, P roped keys, F pairs, J = P F components of roped keys, m components, b widths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latentize.attention.codebooks import codebook
from latentize.attention.coding import RowCode
from latentize.attention.latent import LatentWeights
from latentize.attention.quantizer import (
    GROUP,
    MOST_BITS,
    WIDTHS,
    Segments,
    gain_values,
    quantizer,
    row_bytes,
)
from latentize.errors import OptionError

__all__ = [
    "COMPARED_TOKENS",
    "Components",
    "Plan",
    "RowSamples",
    "apply_plan",
    "components",
    "measured_factors",
    "plans",
]

# Scales that are tried, relative to what suits a Gaussian.
_SCALES_TRIED = (0.8, 1.0, 1.25, 1.6, 2.0)
# Tokens that widths are compared on, and what is added to the information's diagonal, relative to its mean.
COMPARED_TOKENS, _DAMPING = 1024, 1e-4
# Least root mean square of a component, relative to the largest: a mix in bfloat16 leaks as much from one to another.
_LEAST_DEVIATION = 2e-3
_BISECTIONS = 60


@dataclass
class RowSamples:
    """Rows of some tokens, and the gradients of the text's log-likelihood by them.

    Attributes:
        c_nr, by_c_nr: Latents.
        k_rope_nPR, by_k_rope_nPR: Roped keys after RoPE.
        positions_n: Where the tokens are.
    """

    c_nr: Tensor
    by_c_nr: Tensor
    k_rope_nPR: Tensor
    by_k_rope_nPR: Tensor
    positions_n: Tensor


@dataclass
class Half:
    """The components of a layer's latents, or of its roped keys, the most energetic first.

    Attributes:
        values_nm: Of the compared tokens, real values; a roped component has two, side by side.
        nats_bm: What each component costs in each width, per token.
        scales_bm: What it is divided by then, so that the codebook suits it.
        each: Real values of a component.
    """

    values_nm: Tensor
    nats_bm: Tensor
    scales_bm: Tensor
    each: int

    def widths(self, price: float, factor: float) -> Tensor:
        """Bits of each component, ``[m]``, where a bit of a token costs so much. They never rise from one component to
        the next."""
        bits_b1 = torch.arange(MOST_BITS + 1)[:, None] * self.each
        wanted_m = (factor * self.nats_bm + price * bits_b1).argmin(0)
        group, found_m = GROUP // self.each, torch.zeros_like(wanted_m)
        for bits in range(1, MOST_BITS + 1):
            count = int((wanted_m >= bits).sum())
            # Whole bytes, but for the last values.
            found_m[: count if count == len(found_m) else group * round(count / group)] += 1
        return found_m

    def cost(self, bits_m: Tensor) -> float:
        """Nats per token."""
        return float(self.nats_bm.gather(0, bits_m[None]).sum())


@dataclass
class Components:
    """A layer's rows in their own basis.

    Attributes:
        latent, rope: Halves.
        encode_rr: To the latent's components.
        mix_JP: To the roped components, complex.
        pair_J: Their pairs.
        mean_J: Their means before RoPE, complex.
        frequencies_F: Radians per position of the pairs.
    """

    latent: Half
    rope: Half
    encode_rr: Tensor
    mix_JP: Tensor
    pair_J: Tensor
    mean_J: Tensor
    frequencies_F: Tensor


@dataclass(frozen=True)
class Plan:
    """Bits of the components of one layer.

    Attributes:
        latent_m, rope_m: Of each component, in the order of :class:`Components`.
        nats: What they cost, per token.
    """

    latent_m: Tensor
    rope_m: Tensor
    nats: float

    @property
    def row_bytes(self) -> int:
        """Of a token that is not stored as it is."""
        return row_bytes(_segments(self.latent_m, 1), _segments(self.rope_m, 2))


def _root(moment: Tensor) -> Tensor:
    """The root of a positive matrix, or of each in a stack."""
    size = moment.shape[-1]
    mean = moment.diagonal(dim1=-2, dim2=-1).real.mean().clamp_min(1e-30)
    eye = torch.eye(size, dtype=moment.dtype, device=moment.device)
    value, vector = torch.linalg.eigh(moment + _DAMPING * mean * eye)
    value = value.clamp_min(1e-3 * _DAMPING * float(mean))
    return (vector * value.sqrt()[..., None, :]) @ vector.mH


def _basis(root: Tensor, moment: Tensor) -> Tensor:
    """Eigenvectors of ``F^½ C F^½``, or of each in a stack."""
    return torch.linalg.eigh(root @ moment @ root)[1]


def _mean(k_nPF: Tensor, turn_n1F: Tensor) -> Tensor:
    """Of keys before RoPE, ``[P, F]`` complex."""
    return (k_nPF * turn_n1F.conj()).mean(0)


def components(rows: RowSamples, frequencies_F: Tensor) -> Components:
    """The basis of a layer's rows, and what each component costs in each width.

    Args:
        rows: Of some tokens.
        frequencies_F: Radians per position of the roped keys' pairs.
    """
    c_nr, g_nr = rows.c_nr.double(), rows.by_c_nr.double()
    root = _root(0.5 * g_nr.T @ g_nr / len(g_nr))
    encode_rr = _basis(root, c_nr.T @ c_nr / len(c_nr)).mT @ root
    latent_nr = (c_nr[-COMPARED_TOKENS:] @ encode_rr.mT).float()
    order_r, latent = _half(latent_nr, 1)

    k_nPF, by_nPF = _complex(rows.k_rope_nPR), _complex(rows.by_k_rope_nPR)
    # Before RoPE keys have a mean; after it that is a function of the position.
    angle_nF = rows.positions_n[:, None].double() * frequencies_F.double()
    turn_n1F = torch.polar(torch.ones_like(angle_nF), angle_nF)[:, None]
    mean_PF = _mean(k_nPF, turn_n1F)
    k_nPF = k_nPF - mean_PF * turn_n1F
    # Of a squared product half is the real part's, on average over the angle: a quarter stands for the half of above.
    metric = 0.25 * torch.einsum("npf,nqf->fpq", by_nPF, by_nPF.conj()) / len(by_nPF)
    moment = torch.einsum("npf,nqf->fpq", k_nPF, k_nPF.conj()) / len(k_nPF)
    root_FPP = _root(metric)
    mix_FCP = _basis(root_FPP, moment).mH @ root_FPP
    z_nFC = torch.einsum("fcp,npf->nfc", mix_FCP, k_nPF[-COMPARED_TOKENS:])
    pairs, keys = z_nFC.shape[1:]
    order_J, rope = _half(torch.view_as_real(z_nFC.flatten(1)).flatten(1).float(), 2)
    pair_J = torch.arange(pairs).repeat_interleave(keys)[order_J]
    mean_J = torch.einsum("fcp,pf->fc", mix_FCP, mean_PF).flatten()[order_J]
    return Components(
        latent,
        rope,
        encode_rr[order_r],
        mix_FCP.flatten(0, 1)[order_J],
        pair_J.to(torch.int32),
        mean_J,
        frequencies_F.float(),
    )


def _complex(k_nPR: Tensor) -> Tensor:
    re, im = k_nPR.double().chunk(2, dim=-1)
    return torch.complex(re.contiguous(), im.contiguous())


def _half(values_nm: Tensor, each: int) -> tuple[Tensor, Half]:
    """The components in order, and that order."""
    parts_nme = values_nm.unflatten(1, (-1, each))
    order = parts_nme.square().mean((0, 2)).argsort(descending=True, stable=True)
    parts_nme = parts_nme[:, order]
    deviation_m1 = _deviations(parts_nme)[:, None]
    gain_n11 = _gains(parts_nme, deviation_m1)[:, None, None]
    even_nme = parts_nme / gain_n11
    usual_m1 = _deviations(even_nme)[:, None]
    nats, scales = [parts_nme.square().mean(0).sum(1)], [deviation_m1[:, 0]]
    for bits in range(1, MOST_BITS + 1):
        if bits not in WIDTHS:
            nats.append(torch.full_like(nats[0], math.inf))
            scales.append(deviation_m1[:, 0])
            continue
        found = torch.stack([_lost(even_nme / (factor * usual_m1), gain_n11, bits) for factor in _SCALES_TRIED])
        least = (found * (torch.tensor(_SCALES_TRIED)[:, None] * usual_m1[:, 0]).square()).min(0)
        nats.append(least.values)
        scales.append(torch.tensor(_SCALES_TRIED)[least.indices] * usual_m1[:, 0])
    return order, Half(parts_nme.flatten(1), torch.stack(nats), torch.stack(scales), each)


def _lost(even_nme: Tensor, gain_n11: Tensor, bits: int) -> Tensor:
    """Squared error of each component in so many bits, ``[m]``: values of other tokens stand for its neighbours."""
    book = codebook(bits, even_nme.device)
    count = len(even_nme) // book.values
    # From the tokens' axis, so that what shares an index is far apart.
    vectors = even_nme[: count * book.values].unflatten(0, (book.values, count)).movedim(0, -1)
    index = book.nearest(vectors.reshape(-1, book.values))
    error = (book.words_kv[index].view_as(vectors) - vectors).movedim(-1, 0).flatten(0, 1)
    return error.mul_(gain_n11[: len(error)]).square_().mean(0).sum(1)


def _deviations(parts_nme: Tensor) -> Tensor:
    """Root mean squares of components, ``[m]``; what hardly exists has a scale that rounding does not fill."""
    found_m = parts_nme.square().mean((0, 2)).sqrt()
    return found_m.clamp_min(_LEAST_DEVIATION * float(found_m.max()) + 1e-30)


def _gains(parts_nme: Tensor, deviation_m1: Tensor) -> Tensor:
    """Root mean squares of tokens, all components alike, ``[n]``."""
    return (parts_nme / deviation_m1).square().mean((1, 2)).sqrt().clamp_min(1e-6)


def plans(layers: Sequence[Components], factors: Sequence[tuple[float, float]], row_bytes: float) -> list[Plan]:
    """Bits of all layers' components: a bit costs the same everywhere.

    Args:
        layers: Their components.
        factors: On what the latents and the roped keys of each layer cost.
        row_bytes: Of a token in a layer, on average at most.

    Raises:
        OptionError: not even a gain a token would fit.
    """

    def at(price: float) -> list[Plan]:
        found = []
        for layer, (of_latent, of_rope) in zip(layers, factors, strict=True):
            latent_m, rope_m = layer.latent.widths(price, of_latent), layer.rope.widths(price, of_rope)
            nats = of_latent * layer.latent.cost(latent_m) + of_rope * layer.rope.cost(rope_m)
            found.append(Plan(latent_m, rope_m, nats))
        return found

    def size(made: list[Plan]) -> float:
        return sum(plan.row_bytes for plan in made) / len(made)

    if row_bytes < 3:
        raise OptionError(
            f"{row_bytes:.1f} bytes of a token and layer are too few for anything but its gains", where="--bytes",
            fix="keep more; tokens that are stored as they are count, too",
        )  # fmt: skip
    low, high = -60.0, 20.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if size(at(2.0**middle)) > row_bytes else (low, middle)
    return at(2.0**high)


def apply_plan(w: LatentWeights, layer: Components, plan: Plan, sinks: int, newest: int) -> LatentWeights:
    """The layer with the code that stores its rows: to components, in units of their spread.

    Args:
        w: The layer, float32.
        layer: Its components.
        plan: Their bits.
        sinks, newest: Tokens that are seen as they are.
    """
    latent, of_latent = _segments(plan.latent_m, 1), _scales(layer.latent, plan.latent_m)
    rope, of_rope = _segments(plan.rope_m, 2), _scales(layer.rope, plan.rope_m)
    # Rounded now: inverses are those of what is saved.
    latent_mix_rr = (layer.encode_rr / of_latent[:, None]).to(torch.bfloat16).float()
    mix_JP2 = torch.view_as_real(layer.mix_JP / of_rope[:, None]).to(torch.bfloat16).float()
    spreads = _spread(layer.latent, of_latent, latent), _spread(layer.rope, of_rope, rope)
    mean_J2 = torch.view_as_real(layer.mean_J / of_rope).to(torch.bfloat16).float()
    tensors = (latent_mix_rr, mix_JP2, layer.pair_J, mean_J2, layer.frequencies_F)
    code = RowCode(latent, rope, *tensors, spreads, sinks, newest)
    return replace(w, code=code)


def _segments(bits_m: Tensor, each: int) -> Segments:
    widths, counts = bits_m.unique_consecutive(return_counts=True)
    return tuple((bits, each * count) for bits, count in zip(widths.tolist(), counts.tolist(), strict=True))


def _scales(half: Half, bits_m: Tensor) -> Tensor:
    """Of each component, float64."""
    return half.scales_bm.gather(0, bits_m[None])[0].double()


def _spread(half: Half, scales_m: Tensor, segments: Segments) -> float:
    """The factor that makes gains what they were when widths were compared."""
    parts_nme = half.values_nm.unflatten(1, (-1, half.each))
    deviation_m1 = _deviations(parts_nme)[:, None]
    even_nm = (parts_nme / scales_m[:, None]).flatten(1)
    plain_n = gain_values(quantizer((segments,), (1.0,), even_nm.device).gain_codes(even_nm.float()))[:, 0]
    return round(math.exp(float((_gains(parts_nme, deviation_m1) / plain_n).log().mean())), 4)


def measured_factors(
    layers: Sequence[Components],
    trial: Sequence[Plan],
    measure: Callable[[int, str], float],
) -> list[tuple[float, float]]:
    """How much more each half costs than it should, as the root of it.

    Args:
        layers: Their components.
        trial: Coarse plans.
        measure: From a layer's number and ``"latent"`` or ``"rope"`` to the divergence, in nats per token, where only
            this half is rounded to its trial plan.
    """
    found = []
    for number, (layer, plan) in enumerate(zip(layers, trial, strict=True)):
        pairs = (("latent", layer.latent.cost(plan.latent_m)), ("rope", layer.rope.cost(plan.rope_m)))
        ratios = [max(measure(number, half), 1e-12) / max(cost, 1e-12) for half, cost in pairs]
        found.append((ratios[0] ** 0.5, ratios[1] ** 0.5))
    return found
