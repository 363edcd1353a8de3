"""Stored values come back within half a step, alone or appended, and take the bytes that they should."""

from __future__ import annotations

import pytest
import torch

from latentize.attention.quantizer import coded, row_bytes
from latentize.errors import OptionError
from latentize.runtime.codecs import FORMATS, Coded, codec
from latentize.runtime.rotation import rotation

# Largest error of a value, relative to the largest value of its token.
HALF_STEP = {"bf16": 2**-8, "fp16": 2**-11, "fp32": 0.0, "fp8": 2**-4, "int8": 0.51 / 127, "int4": 0.51 / 7.5}
BYTES = {"bf16": 28, "fp16": 28, "fp32": 56, "fp8": 16, "int8": 16, "int4": 9}


def rows(scale: float = 1.0, size: int = 14) -> torch.Tensor:
    return scale * torch.randn(3, 40, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 3e3])
@pytest.mark.parametrize("size", [14, 13, 1, 64])
@pytest.mark.parametrize("name", FORMATS)
def test_values_come_back_within_half_a_step(name: str, size: int, scale: float) -> None:
    x, c = rows(scale, size), codec(name, size)
    back = c.decode(c.encode(x), torch.float32)
    assert back.shape == x.shape
    # The smallest number of fp16 is 2**-24.
    least = 2**-25 if name == "fp16" else 0.0
    assert ((back - x).abs().amax(-1) <= HALF_STEP[name] * x.abs().amax(-1) + least).all()


@pytest.mark.parametrize("name", FORMATS)
def test_a_token_is_stored_without_its_neighbours(name: str) -> None:
    x, c = rows(), codec(name, 14)
    together, alone = c.encode(x), [c.encode(x[:, i : i + 1]) for i in range(x.shape[1])]
    for number, tensor in enumerate(together):
        assert torch.equal(tensor, torch.cat([one[number] for one in alone], dim=1))


@pytest.mark.parametrize("name", FORMATS)
def test_bytes(name: str) -> None:
    assert sum(t[0, 0].numel() * t.element_size() for t in codec(name, 14).encode(rows())) == BYTES[name]


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_small(name: str) -> None:
    c = codec(name, 14)
    assert float(c.decode(c.encode(torch.zeros(1, 2, 14)), torch.float32).abs().max()) < 1e-20


def test_every_float8_is_restored_as_pytorch_does() -> None:
    byte = torch.arange(256, dtype=torch.uint8)
    finite = byte[~byte.view(torch.float8_e4m3fn).float().isnan()].view(1, 1, -1)
    restored = codec("fp8", 254).decode((finite, torch.ones(1, 1, 1, dtype=torch.bfloat16)), torch.float32)
    assert torch.equal(restored, finite.view(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("size", [1, 2, 14, 64, 112])
def test_rotations_are_orthogonal(size: int) -> None:
    q = rotation(size)
    assert torch.allclose(q @ q.mT, torch.eye(size, dtype=torch.float64), atol=1e-12)


def test_a_rotation_saves_what_an_outlier_costs() -> None:
    x, c = rows(size=64), codec("int4", 64)
    x[..., 5] *= 30
    turn = rotation(64).float()
    plain = c.decode(c.encode(x), torch.float32)
    turned = c.decode(c.encode(x @ turn), torch.float32) @ turn.mT
    assert (turned - x).square().mean() < 0.5 * (plain - x).square().mean()


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(OptionError, match="int3"):
        codec("int3", 4)


SEGMENTS = (((8, 8), (6, 16), (5, 8), (4, 8), (3, 24), (2, 8), (1, 8), (0, 8)), ((5, 8), (3, 5)), ((0, 6),))


@pytest.mark.parametrize("segments", SEGMENTS)
def test_codes_of_all_widths_come_back(segments: tuple) -> None:
    size = sum(count for _, count in segments)
    x, c = rows(size=size), Coded(segments, 1.1)
    (stored,) = c.encode(x)
    assert stored.dtype == torch.uint8
    assert stored.shape[-1] == row_bytes(segments, ()) - 1, "the other gain is that of the other half"
    assert torch.equal(c.decode((stored,), torch.float32), coded(x, segments, 1.1))
    alone = torch.cat([c.encode(x[:, i : i + 1])[0] for i in range(x.shape[1])], dim=1)
    assert torch.equal(alone, stored)
