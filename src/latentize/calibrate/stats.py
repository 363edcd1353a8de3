"""What conversion needs to know of a layer's inputs, gathered as they stream by.

All linear statistics of queries, keys and values follow from one matrix, ``E[x xᵀ]`` of the normalised hidden
state; only the mean *norms* that MHA2MLA ranks by need the tokens themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from latentize.attention.grouped import AttentionWeights

__all__ = ["CalibrationStats"]

_TENSORS = ("x_D", "xx_DD", "q_norm_HF", "k_norm_GF", "distances_HT")


@dataclass
class CalibrationStats:
    """Sums over the tokens of one layer, in float64. Adding two gives the statistics of both.

    Attributes:
        tokens: How many were seen.
        x_D: ``Σ x``.
        xx_DD: ``Σ x xᵀ``.
        q_norm_HF: ``Σ ‖q_f‖`` of every pair of every query head, before RoPE; where it was asked for.
        k_norm_GF: ``Σ ‖k_f‖``, likewise.
        distances_HT: Attention probability by distance, see :func:`attended_distances`; where it was asked for.
    """

    tokens: int
    x_D: Tensor
    xx_DD: Tensor
    q_norm_HF: Tensor | None = None
    k_norm_GF: Tensor | None = None
    distances_HT: Tensor | None = None

    @classmethod
    def of(cls, x_BTD: Tensor, w: AttentionWeights | None = None) -> CalibrationStats:
        """Statistics of one batch of inputs; with the layer's weights also the mean norms of its pairs."""
        x_nD = x_BTD.flatten(0, 1).float()
        # Products of one batch in the input's precision, sums over batches in float64.
        return cls(
            tokens=x_nD.shape[0],
            x_D=x_nD.double().sum(0),
            xx_DD=(x_nD.T @ x_nD).double(),
            q_norm_HF=None if w is None else _pair_norms(x_nD, w.q_HdD, w.q_bias_Hd),
            k_norm_GF=None if w is None else _pair_norms(x_nD, w.k_GdD, w.k_bias_Gd),
        )

    def __add__(self, other: CalibrationStats) -> CalibrationStats:
        mine, yours = self._present(), other._present()
        if mine.keys() != yours.keys():
            raise ValueError("statistics of different kinds cannot be added")
        return CalibrationStats(tokens=self.tokens + other.tokens, **{n: mine[n] + yours[n] for n in mine})

    def _present(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in _TENSORS if getattr(self, name) is not None}

    @property
    def second_moment_DD(self) -> Tensor:
        """``E[x xᵀ]``."""
        return self.xx_DD / self.tokens

    def moment_of(self, w_oD: Tensor, bias_o: Tensor | None = None) -> Tensor:
        """``E[y yᵀ]`` of ``y = w x + bias``, not centred; leading dimensions of ``w`` are a batch."""
        moment_oo = w_oD @ self.second_moment_DD @ w_oD.mT
        if bias_o is None:
            return moment_oo
        mean_o = w_oD @ (self.x_D / self.tokens)
        cross_oo = mean_o[..., :, None] * bias_o[..., None, :]
        return moment_oo + cross_oo + cross_oo.mT + bias_o[..., :, None] * bias_o[..., None, :]

    def save(self, path: Path) -> None:
        from safetensors.torch import save_file

        tensors = {name: t.contiguous() for name, t in self._present().items()}
        save_file({**tensors, "tokens": torch.tensor(self.tokens)}, str(path))

    @classmethod
    def load(cls, path: Path) -> CalibrationStats:
        from safetensors.torch import load_file

        tensors = load_file(str(path))
        return cls(tokens=int(tensors.pop("tokens")), **tensors)


def _pair_norms(x_nD: Tensor, w_hdD: Tensor, bias_hd: Tensor | None) -> Tensor:
    """``Σ_tokens ‖(y_f, y_{f + d/2})‖`` of every head and pair, ``[h, d / 2]``."""
    y_nhd = torch.nn.functional.linear(x_nD, w_hdD.flatten(0, 1)).unflatten(-1, w_hdD.shape[:2])
    if bias_hd is not None:
        y_nhd = y_nhd + bias_hd
    re_nhF, im_nhF = y_nhd.chunk(2, dim=-1)
    return torch.hypot(re_nhF, im_nhF).double().sum(0)
