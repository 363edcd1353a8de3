"""Machines to plan for: what their makers say of them, or what the user says."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from latentize.errors import OptionError

__all__ = ["DEVICES", "Machine", "machine_of"]

GB, TFLOP = 10**9, 10**12


@dataclass(frozen=True)
class Machine:
    """What bounds decoding.

    Attributes:
        name: For the table.
        memory_bytes: ``None`` if it is not asked what fits.
        bytes_per_second: Bandwidth of that memory; ``None`` if it is not asked how fast.
        flops_per_second: 16-bit operations, dense; ``None`` leaves arithmetic out.
        origin: Where the numbers are from.
        reserve: Share of the memory that neither weights nor cache may have: activations, fragments, the runtime.
        weight_bits: Bits of a stored weight.
    """

    name: str
    memory_bytes: float | None = None
    bytes_per_second: float | None = None
    flops_per_second: float | None = None
    origin: str = ""
    reserve: float = 0.1
    weight_bits: float = 16


def _device(name: str, memory: float, bandwidth: float, tflops: float, origin: str) -> Machine:
    return Machine(name, memory * GB, bandwidth * GB, tflops * TFLOP, origin)


# GB and GB/s as vendors count them (powers of ten), dense 16-bit TFLOPS with sums in float32.
DEVICES = {
    "h200": _device("H200 SXM", 141, 4800, 989.4, "NVIDIA H200 datasheet"),
    "h100": _device("H100 SXM", 80, 3350, 989.4, "NVIDIA H100 datasheet"),
    "a100": _device("A100 SXM 80 GB", 80, 2039, 312, "NVIDIA A100 datasheet"),
    "l40s": _device("L40S", 48, 864, 362, "NVIDIA L40S datasheet"),
    "mi300x": _device("MI300X", 192, 5300, 1307.4, "AMD Instinct MI300X data sheet"),
    "rtx4090": _device("GeForce RTX 4090", 24, 1008, 165.2, "NVIDIA Ada architecture whitepaper"),
    "rtx3090": _device("GeForce RTX 3090", 24, 936, 71, "NVIDIA GA102 architecture whitepaper"),
}


def machine_of(
    device: str | Machine | None = None,
    *,
    memory: float | None = None,
    bandwidth: float | None = None,
    tflops: float | None = None,
    reserve: float = 0.1,
    weight_bits: float = 16,
) -> Machine | None:
    """A machine from options; numbers that are given win over those of the device.

    Args:
        device: A name in ``DEVICES``, or a machine.
        memory: GB (10⁹ bytes).
        bandwidth: GB/s.
        tflops: 10¹² operations a second.
        reserve, weight_bits: As in :class:`Machine`.

    Returns:
        ``None`` where nothing is said of a machine.

    Raises:
        OptionError: an unknown device, or a number that cannot be.
    """
    if isinstance(device, str):
        if device not in DEVICES:
            names = ", ".join([*DEVICES, "cpu"])
            raise OptionError(
                f"no such device: '{device}'", where="--device", fix=f"{names}; or --memory and --bandwidth"
            )
        device = DEVICES[device]
    if not 0 <= reserve < 1:
        raise OptionError(f"'{reserve}' is no share of the memory", where="--reserve", fix="give 10% or 0.1")
    given = {"memory": memory, "bandwidth": bandwidth, "tflops": tflops, "weight-bits": weight_bits}
    for name, value in given.items():
        if value is not None and not 0 < value < math.inf:
            raise OptionError(f"{value:g} is not possible", where=f"--{name}")
    if tflops is not None and device is None and bandwidth is None:
        raise OptionError("arithmetic alone says nothing of decoding", where="--tflops", fix="give --bandwidth, too")
    if device is None and memory is None and bandwidth is None:
        return None
    base = device or Machine("the machine")
    named = {
        "memory_bytes": memory and memory * GB,
        "bytes_per_second": bandwidth and bandwidth * GB,
        "flops_per_second": tflops and tflops * TFLOP,
    }
    own = {name: value for name, value in named.items() if value is not None}
    origin = ", ".join(filter(None, [base.origin, "options" if own else ""]))
    return replace(base, **own, origin=origin, reserve=reserve, weight_bits=weight_bits)
