"""Which part of the keys keeps its rotation.

RoPE stands between a low-rank key and its cache: a rotated key is not linear in a latent. So every conversion
first splits the keys into roped components, cached as they are, and un-roped ones, which may be compressed.

D hidden, H query heads, G kv heads, s = H / G, d head size, C un-roped components of all kv heads together,
N un-roped query size, P roped keys, R size of a roped key, F = R / 2 pairs, U = G readers.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["RopeSplit"]


@dataclass(frozen=True)
class RopeSplit:
    """Keys and queries, split. A logit is the same sum as before, but for rotations that were dropped:

    ``q_nope · (read · k_nope) + q_rope · k_rope``.

    Attributes:
        q_nope_HND, q_rope_HRD: Query projections.
        k_nope_CD: All un-roped key components, a matrix to be compressed.
        read_UNC: How kv head ``u`` reads its un-roped key from them.
        k_rope_PRD: Roped keys, "half" layout.
        frequencies_PF: Radians per position.
        kept_pairs: Frequencies of the source that the roped pairs come from, by number, fastest first.
        q_nope_bias_HN, q_rope_bias_HR, k_rope_bias_PR: Biases, or ``None``. A bias on un-roped keys adds the
            same to every logit of a query, and softmax ignores it.
        rope_cost_F: Mean squared error of a head's logits if all components of a frequency lost their rotation;
            where distances were measured.
    """

    q_nope_HND: Tensor
    q_rope_HRD: Tensor
    k_nope_CD: Tensor
    read_UNC: Tensor
    k_rope_PRD: Tensor
    frequencies_PF: Tensor
    kept_pairs: tuple[int, ...]
    q_nope_bias_HN: Tensor | None = None
    q_rope_bias_HR: Tensor | None = None
    k_rope_bias_PR: Tensor | None = None
    rope_cost_F: Tensor | None = None
