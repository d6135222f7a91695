"""What a tile program takes at a device's peaks: its bytes, multiply-adds and vector operations against the rates.

The amounts come from the plan itself: `TileBuilder` counts every tile as it is written, so a weight that a plan reads
twice is counted twice. The rates are published peaks, each with its source, and any of them can be replaced. Nothing
here was measured, for v4c has no such device. A second-level cache that serves repeated reads makes launches faster
than estimated; launch latency, synchronisation and work that does not overlap make them slower.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from v4c.errors import UnsupportedError

from .devices import Device
from .emit import BYTES
from .program import DeviceLimits, TileProgram, Work

CONTEXT = "context"
"""What costs depend on besides a launch: tokens of each sequence so far."""


@dataclass(frozen=True)
class Figure:
    """A rate per second, and where it was read."""

    value: float
    source: str


@dataclass(frozen=True)
class Rates:
    """Peaks of one device.

    Attributes:
        bandwidth: bytes from and to global memory.
        cube: multiply-adds of all cubes by element type.
        vector: float32 element operations of all vector units.
    """

    bandwidth: Figure
    cube: Mapping[str, Figure]
    vector: Figure


@dataclass(frozen=True)
class Estimate:
    """What one launch takes at the peaks.

    Attributes:
        name, op: of the program.
        bytes, cube, vector: amounts.
        programs: of the grid.
        seconds: the longest of the three, with as many cores at work as there are programs.
        bound: which one it was: ``memory``, ``cube`` or ``vector``.
    """

    name: str
    op: str
    bytes: float
    cube: float
    vector: float
    programs: int
    seconds: float
    bound: str


_MACS = 4096
_LANES = 64
_CONNECT = "Huawei Connect 2025, Ascend roadmap (E. Xu, 18 September 2025)"
_HPCA = "Liao et al., Ascend: a Scalable and Unified Architecture for Ubiquitous DNN Computing, HPCA 2021"
_FULL_CORES = {"c220": 24, "c310": 36}
"""Cube cores of the largest device of a family, which the published peaks are taken to be of."""
_HALF_PRECISION = {
    "c220": (200e12, f"half of the 910C's 800 TFLOPS, a package of two: {_CONNECT}"),
    "c310": (250e12, f"half of 1 PFLOPS in FP8: {_CONNECT}"),
}
"""Float16 multiply-adds of a device with all its cores."""
_BANDWIDTH = {
    "c220": (1.6e12, f"half of the 910C's 3.2 TB/s, a package of two: {_CONNECT}"),
    "c310": (1.6e12, f"950PR with HiBL 1.0 memory: {_CONNECT}"),
}
_RELATIVE = {"float16": 1.0, "bfloat16": 1.0, "float32": 0.25, "int8": 2.0, "float8_e4m3fn": 2.0, "float8_e5m2": 2.0}
"""Speed of the cube against float16; that of float32 is an assumption."""


def rates(device: Device) -> Rates:
    """The published peaks of `device`, scaled by its cores; replace any field with ``dataclasses.replace``."""
    limits, family = device.limits, device.architecture
    peak, source = _HALF_PRECISION[family]
    part = limits.cube_cores / _FULL_CORES[family]
    clock = peak / (_MACS * _FULL_CORES[family])
    cube = {
        dtype: Figure(peak * part * _RELATIVE[dtype], f"{source}; {limits.cube_cores} cores")
        for dtype in sorted(limits.dtypes)
    }
    lanes = f"{_LANES} lanes ({_HPCA}) at the clock of the cube's peak with {_MACS} multiply-adds per cycle"
    return Rates(Figure(*_BANDWIDTH[family]), cube, Figure(clock * _LANES * limits.vector_cores, lanes))


def product_dtype(program: TileProgram) -> str:
    """Element type that a program's cube multiplies: the narrowest float it reads."""
    floats = [a.dtype for a in program.arguments if a.dtype.startswith(("float", "bfloat"))]
    return min(floats, key=lambda dtype: BYTES[dtype], default="float32")


def estimate(
    program: TileProgram, scalars: Mapping[str, int], device: DeviceLimits, peaks: Rates, context: int = 0
) -> Estimate:
    """One launch of `program`.

    Args:
        program: of which the costs are taken.
        scalars: as it is launched with.
        device: whose cores are filled, or not, by the grid.
        peaks: its rates.
        context: tokens of each sequence so far, for programs that read caches.

    Raises:
        UnsupportedError: `peaks` has no rate for the element type that the program multiplies.
    """
    known = program.launch(scalars) | {CONTEXT: context}
    programs = math.prod(axis(scalars) for axis in program.grid)
    cube, vector = program.cube(known), program.vector(known)
    moved = program.reads(known) + program.writes(known)
    times = {"memory": moved / peaks.bandwidth.value}
    if program.work is not Work.VECTOR:
        dtype = product_dtype(program)
        if dtype not in peaks.cube:
            raise UnsupportedError(f"{program.name}: no rate for products of {dtype} on {device.name}")
        times["cube"] = cube / peaks.cube[dtype].value / _busy(programs, device.cube_cores)
    if vector:
        halves = 2 if program.work is Work.MIXED else 1
        times["vector"] = vector / peaks.vector.value / _busy(programs * halves, device.vector_cores)
    bound = max(times, key=lambda name: times[name])
    return Estimate(program.name, program.op, moved, cube, vector, programs, times[bound], bound)


def total(estimates: Iterable[Estimate]) -> Estimate:
    """Launches one after another; `bound` is what bounds most of the time."""
    every = list(estimates)
    shares: dict[str, float] = {}
    for one in every:
        shares[one.bound] = shares.get(one.bound, 0.0) + one.seconds
    return Estimate(
        "total", "", sum(e.bytes for e in every), sum(e.cube for e in every), sum(e.vector for e in every),
        sum(e.programs for e in every), sum(e.seconds for e in every),
        max(shares, key=lambda name: shares[name], default="memory"),
    )  # fmt: skip


def _busy(programs: int, cores: int) -> float:
    """Share of the cores' time that is used: a last round of programs may leave cores without work."""
    return programs / (math.ceil(programs / cores) * cores) if programs else 1.0
