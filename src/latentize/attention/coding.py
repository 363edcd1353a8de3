"""Transform coding of cached rows: components in a basis of their own, each in as many bits as it is worth.

A latent of rank ``r`` in ``b`` bits a value is a special case, in which ``r`` components get ``b`` bits and all others
none (reverse water-filling: Cover & Thomas, Elements of Information Theory, section 10.3). Roped keys may only be mixed
where that commutes with RoPE: the pairs of several keys that turn at one frequency are a complex vector, and any
complex matrix commutes with its rotation. A latent may be mixed by any matrix. Attention reads components as they lie:
queries and sums go through the inverse instead.

Keys have a mean that is as large as what varies. It need not be stored: after RoPE it is the same for all tokens but
for the angle, and that follows from the position. Codes are of what is left.

Components come with the widest codes first, and in units of their own spread, so that all look alike: Gaussians of
variance one. Some neighbours of one width share an index into a codebook (:mod:`latentize.attention.codebooks`), and
all values of a token's half (latent or roped) share one gain of eight bits (:mod:`latentize.attention.quantizer`).

B batch, T tokens, H query heads, P roped keys, R size of a roped key, F = R / 2 pairs, J = P F components of the roped
keys, n = 2 J real values of them, r kv_lora_rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from latentize.attention.grouped import by_groups
from latentize.attention.masks import newest_mask
from latentize.attention.quantizer import Segments, coded, row_bytes
from latentize.errors import CheckpointError

__all__ = ["Rounding", "RowCode", "angles_at"]

# What a config calls the codebooks.
_CODEBOOKS = "gaussian"


def angles_at(positions: Tensor, frequencies_F: Tensor) -> Tensor:
    """Cosines and sines of each frequency at some positions, ``[..., 2 F]`` float32."""
    angle_F = positions[..., None].float() * frequencies_F
    return torch.cat([angle_F.cos(), angle_F.sin()], dim=-1)


class Rounding(ABC):
    """What becomes of rows in a cache.

    Attributes:
        sinks: Tokens at the start of a text that are stored as they are.
        newest: Of each token, how many of its newest rows it sees as they are, its own included.
    """

    sinks: int
    newest: int

    @abstractmethod
    def rounded(
        self, c_B1Tr: Tensor, k_rope_BPTR: Tensor, exact_BT: Tensor, positions_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Latents and roped keys as a cache gives them back.

        Args:
            c_B1Tr, k_rope_BPTR: Of some tokens.
            exact_BT: Which of them are stored as they are.
            positions_BT: Where they are.
        """

    def exact(self, positions_BT: Tensor, past: int) -> Tensor:
        """Which of the new tokens are stored as they are, ``[B, T]``: the first of each text, wherever it begins.

        Args:
            positions_BT: Of the new tokens. Padding before a text has positions that are no smaller than its first.
            past: Tokens before them.
        """
        if past:
            return positions_BT < self.sinks
        # The last of the smallest: padding may have the same.
        number_T = torch.arange(positions_BT.shape[1], device=positions_BT.device)
        first_B1 = positions_BT.shape[1] - 1 - positions_BT.flip(1).argmin(1, keepdim=True)
        return (number_T >= first_B1) & (number_T < first_B1 + self.sinks)

    def as_cached(self, c_B1Sr: Tensor, k_rope_BPSR: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor, int]:
        """What the last tokens see of all: rows as they are stored, then the newest as they are.

        Args:
            c_B1Sr, k_rope_BPSR: Of all tokens, as they are.
            positions_BT: Of the last tokens; those before them are where a text without gaps has them.

        Returns:
            Latents ``[B, 1, S' + E, r]``, roped keys ``[B, P, S' + E, R]``, and ``S'``, how many are stored. The exact
            ones are those of the last ``E`` tokens.
        """
        tokens, count = positions_BT.shape[1], c_B1Sr.shape[2]
        positions_BS, exact_BS = positions_BT, self.exact(positions_BT, 0)
        if count != tokens:
            positions_BS = positions_BT[:, -1:] + torch.arange(1 - count, 1, device=positions_BT.device)
            exact_BS = (positions_BS >= 0) & (positions_BS < self.sinks)
        stored, near = self._versions(tokens, count)
        c_hat, k_hat = self.rounded(
            c_B1Sr[:, :, :stored], k_rope_BPSR[:, :, :stored], exact_BS[:, :stored], positions_BS[:, :stored]
        )
        exact = (t[:, :, count - near :] for t in (c_B1Sr, k_rope_BPSR))
        c, k_rope = (torch.cat(versions, dim=2) for versions in zip((c_hat, k_hat), exact, strict=True))
        return c, k_rope, stored

    def who_sees(self, tokens: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The mask for :meth:`as_cached`, boolean ``[T, S' + E]``, and the rows' tokens, ``[S' + E]``: the last
        ``tokens`` of ``count`` look."""
        stored, near = self._versions(tokens, count)
        at_S = torch.arange(count, device=device)
        parts = (at_S[:stored], at_S[count - near :])
        return newest_mask(at_S[count - tokens :], *parts, self.newest), torch.cat(parts)

    def _versions(self, tokens: int, count: int) -> tuple[int, int]:
        """How many rows are seen as they are stored, and as they are."""
        near = min(count, tokens + self.newest - 1) if self.newest else 0
        return max(0, count - self.newest), near


@dataclass(frozen=True)
class RowCode(Rounding):
    """How one layer's rows are stored.

    Attributes:
        latent: Widths of the latent's components.
        rope: Widths of the roped components' values, a real and an imaginary part each.
        latent_mix_rr: From the latent to its components.
        mix_JP2: From the pairs of all roped keys that turn at a component's frequency to the component: the real and
            the imaginary parts of ``z_j = Σ_p mix[j, p] κ[p, pair_j]``.
        pair_J: Number of each component's pair.
        mean_J2: Of the roped components before RoPE, real and imaginary parts, in units of their spread.
        frequencies_F: Radians per position of the pairs; all keys turn alike.
        spreads: Factors on the gains of latent and roped components.
        sinks: Tokens at the start of a text that are stored as they are.
        newest: Of each token, how many of its newest rows it sees as they are, its own included.
    """

    latent: Segments
    rope: Segments
    latent_mix_rr: Tensor
    mix_JP2: Tensor
    pair_J: Tensor
    mean_J2: Tensor
    frequencies_F: Tensor
    spreads: tuple[float, float] = (1.0, 1.0)
    sinks: int = 4
    newest: int = 4

    @cached_property
    def _from_keys_PRn(self) -> Tensor:
        """From roped keys to components, float32."""
        return self._real(torch.view_as_complex(self.mix_JP2.double().contiguous())).movedim(0, -1)

    @cached_property
    def _to_keys_nPR(self) -> Tensor:
        """From components to roped keys, float32: the inverse, pair by pair."""
        mix_JP, keys = torch.view_as_complex(self.mix_JP2.double().contiguous()), self.mix_JP2.shape[1]
        of_pair_FP = self.pair_J.argsort(stable=True).view(-1, keys)
        unmix_JP = torch.empty_like(mix_JP)
        unmix_JP[of_pair_FP.flatten()] = torch.linalg.inv(mix_JP[of_pair_FP]).mT.flatten(0, 1)
        # Of a product with a complex number, what the real and the imaginary part become is the transpose of how it
        # comes from them.
        return self._real(unmix_JP.conj())

    def _real(self, factor_JP: Tensor) -> Tensor:
        """What the real and the imaginary part of each component ``Σ_p factor[j, p] κ[p, pair_j]`` have of the values
        of all keys, ``[n, P, R]`` float32."""
        (components, keys), pairs = factor_JP.shape, len(self.frequencies_F)
        made_J2P2F = torch.zeros(components, 2, keys, 2, pairs, dtype=torch.float64, device=factor_JP.device)
        number_J, pair_J = torch.arange(components, device=factor_JP.device), self.pair_J.long()
        for part, (re, im) in enumerate(((factor_JP.real, -factor_JP.imag), (factor_JP.imag, factor_JP.real))):
            made_J2P2F[number_J, part, :, 0, pair_J], made_J2P2F[number_J, part, :, 1, pair_J] = re, im
        return made_J2P2F.flatten(3).flatten(0, 1).float()

    @cached_property
    def _means_An(self) -> Tensor:
        """From :meth:`angles` to the mean of the components there, float32."""
        (count, _), pairs = self.mean_J2.shape, len(self.frequencies_F)
        number_J, pair_J = torch.arange(count, device=self.mean_J2.device), self.pair_J.long()
        re_J, im_J = self.mean_J2.float().unbind(-1)
        made_2FJ2 = torch.zeros(2, pairs, count, 2, dtype=torch.float32, device=self.mean_J2.device)
        made_2FJ2[0, pair_J, number_J] = torch.stack([re_J, im_J], dim=-1)
        made_2FJ2[1, pair_J, number_J] = torch.stack([-im_J, re_J], dim=-1)
        return made_2FJ2.flatten(2).flatten(0, 1)

    @cached_property
    def latent_unmix_rr(self) -> Tensor:
        """From components back to the latent, float32."""
        return torch.linalg.inv(self.latent_mix_rr.double()).float()

    @cached_property
    def frequencies(self) -> tuple[float, ...]:
        """Radians per position of the pairs."""
        return tuple(self.frequencies_F.tolist())

    @property
    def rope_values(self) -> int:
        """Real values of the roped components."""
        return 2 * len(self.pair_J)

    @property
    def row_bytes(self) -> int:
        """Bytes of a token that is not stored as it is, both gains included."""
        return row_bytes(self.latent, self.rope)

    def components(self, k_rope_BPTR: Tensor) -> Tensor:
        """Roped keys after RoPE as components, ``[B, T, n]`` float32."""
        return k_rope_BPTR.transpose(1, 2).flatten(2).float() @ self._from_keys_PRn.flatten(0, 1)

    def angles(self, positions: Tensor) -> Tensor:
        """Cosines and sines of each frequency at some positions, ``[..., 2 F]`` float32."""
        return angles_at(positions, self.frequencies_F)

    def means(self, angles: Tensor) -> Tensor:
        """What the mean of the roped components has become where :meth:`angles` are, ``[..., n]`` float32."""
        return angles.float() @ self._means_An

    def keys(self, z_BTn: Tensor) -> Tensor:
        """Roped keys ``[B, P, T, R]`` of components: the inverse of :meth:`components`."""
        keys = z_BTn.float() @ self._to_keys_nPR.flatten(1)
        return keys.unflatten(-1, self._to_keys_nPR.shape[1:]).transpose(1, 2)

    @cached_property
    def _from_queries_PRm(self) -> Tensor:
        """Of :meth:`queries`, float32."""
        to_PRn = self._to_keys_nPR.permute(1, 2, 0)
        return torch.cat([to_PRn, to_PRn @ self._means_An.mT], dim=-1)

    def queries(self, q_rope_BHTR: Tensor) -> Tensor:
        """Roped queries whose products with components and the :meth:`angles` of their means, side by side, are those
        of the queries with keys, ``[B, H, T, n + 2 F]``."""
        return by_groups(q_rope_BHTR.float(), self._from_queries_PRm).to(q_rope_BHTR.dtype)

    def rounded(
        self, c_B1Tr: Tensor, k_rope_BPTR: Tensor, exact_BT: Tensor, positions_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`Rounding.rounded`; gradients go through as if nothing were rounded (straight-through: Bengio et
        al., arXiv 1308.3432)."""
        with torch.no_grad(), torch.autocast(c_B1Tr.device.type, enabled=False):
            c_hat = coded(c_B1Tr.float() @ self.latent_mix_rr.mT, self.latent, self.spreads[0])
            c_hat = c_hat @ self.latent_unmix_rr.mT
            mean_BTn = self.means(self.angles(positions_BT))
            z_hat = coded(self.components(k_rope_BPTR) - mean_BTn, self.rope, self.spreads[1]) + mean_BTn
            k_hat = self.keys(z_hat)
            exact_B1T1 = exact_BT[:, None, :, None]
            c_lost = torch.where(exact_B1T1, 0.0, c_hat - c_B1Tr.float()).to(c_B1Tr.dtype)
            k_lost = torch.where(exact_B1T1, 0.0, k_hat - k_rope_BPTR.float()).to(k_rope_BPTR.dtype)
        return c_B1Tr + c_lost, k_rope_BPTR + k_lost

    def describe(self) -> dict[str, Any]:
        """What a config says of it; the rest is tensors."""
        return {
            "latent_bits": [list(segment) for segment in self.latent],
            "rope_bits": [list(segment) for segment in self.rope],
            "gain_spreads": list(self.spreads),
            "exact_tokens": self.sinks,
            "newest_tokens": self.newest,
            "codebooks": _CODEBOOKS,
        }

    @classmethod
    def described(
        cls,
        entry: dict[str, Any],
        latent_mix_rr: Tensor,
        mix_JP2: Tensor,
        pair_J: Tensor,
        mean_J2: Tensor,
        frequencies_F: Tensor,
    ) -> RowCode:
        """The inverse of :meth:`describe`.

        Raises:
            CheckpointError: rows are stored with codebooks that are not known here.
        """
        if entry.get("codebooks") != _CODEBOOKS:
            raise CheckpointError(
                f"its cached rows are stored with codebooks '{entry.get('codebooks')}', and '{_CODEBOOKS}' are known",
                where="config.json, row_code", fix="convert the source again, with this version", code="LZ118",
            )  # fmt: skip
        latent, rope = (_segments(entry[name]) for name in ("latent_bits", "rope_bits"))
        first, second = entry["gain_spreads"]
        tensors = (latent_mix_rr, mix_JP2, pair_J, mean_J2, frequencies_F)
        return cls(latent, rope, *tensors, (first, second), entry["exact_tokens"], entry["newest_tokens"])


def _segments(entries: Sequence[Sequence[int]]) -> Segments:
    return tuple((bits, count) for bits, count in entries)
