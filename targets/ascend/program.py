"""What a generator hands to the gates, to the launch plan and to the simulator: one tile program and how to call it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Work(Enum):
    """Which cores a tile program needs."""

    VECTOR = "vector"
    CUBE = "cube"
    MIXED = "mixed"


class Role(Enum):
    """What a tile program does with a buffer in global memory."""

    READ = "read"
    WRITE = "write"
    UPDATE = "update"
    """Read and written in place, as caches are."""


@dataclass(frozen=True)
class Argument:
    """A buffer in global memory, in the order of the program's arguments.

    Attributes:
        name: unique within the program.
        shape: extents; a string names an extent that is known at launch and comes as an integer argument, a polynomial
            one that is computed from those, rounded up.
        dtype: NumPy or ml_dtypes name, such as ``float16``, ``bfloat16``, ``float8_e4m3fn``, ``int32``.
        role: read, written, or both.
    """

    name: str
    shape: tuple[int | str | Polynomial, ...]
    dtype: str
    role: Role

    def extents(self, scalars: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of one launch."""
        return tuple(
            e if isinstance(e, int) else scalars[e] if isinstance(e, str) else math.ceil(e(scalars)) for e in self.shape
        )


@dataclass(frozen=True)
class DeviceLimits:
    """What tile sizes are chosen from; bytes and counts of one device.

    Attributes:
        name: as bishengir spells it, such as ``Ascend910B1``.
        unified_buffer, l1, l0a, l0b, l0c: bytes per core.
        cube_cores, vector_cores: of the device.
        dtypes: element types that the cube multiplies.
    """

    name: str
    unified_buffer: int
    l1: int
    l0a: int
    l0b: int
    l0c: int
    cube_cores: int
    vector_cores: int
    dtypes: frozenset[str]


@dataclass(frozen=True)
class Polynomial:
    """A number that depends on a program's scalars: the sum of ``coefficient * product of the named scalars``.

    Data rather than code, so that a launch plan can hold it: ``Polynomial(((4096.0, ("rows",)), (64.0, ())))`` is
    ``4096 * rows + 64``.
    """

    terms: tuple[tuple[float, tuple[str, ...]], ...] = ()

    @classmethod
    def of(cls, number: float, *names: str) -> Polynomial:
        """``number``, times the named scalars."""
        return cls(((float(number), names),))

    def __call__(self, scalars: Mapping[str, int]) -> float:
        return sum(c * math.prod(scalars[name] for name in names) for c, names in self.terms)

    def __add__(self, other: Polynomial) -> Polynomial:
        total: dict[tuple[str, ...], float] = {}
        for coefficient, names in (*self.terms, *other.terms):
            total[names] = total.get(names, 0.0) + coefficient
        return Polynomial(tuple((c, names) for names, c in total.items() if c))

    def __mul__(self, other: Polynomial) -> Polynomial:
        products = (Polynomial(((a * b, tuple(sorted((*m, *n)))),)) for a, m in self.terms for b, n in other.terms)
        return sum(products, Polynomial())


@dataclass(frozen=True)
class GridAxis:
    """Programs along one axis of the launch grid: ``ceil(count / tile)``."""

    count: Polynomial
    tile: int = 1

    def __call__(self, scalars: Mapping[str, int]) -> int:
        return math.ceil(self.count(scalars) / self.tile)


@dataclass(frozen=True)
class TileProgram:
    """One kernel: MLIR text (linalg on tensors, the ABI of Triton's kernels) with what its callers need to know.

    Attributes:
        name: the function's name in `text`, unique within an artifact.
        op: the op of the model it belongs to, such as ``CompressedSparseAttention``.
        text: the module.
        work: cores it needs.
        arguments: buffers in order.
        scalars: names of the integer arguments after the buffers, int32, in order; extents of `arguments` among them.
        grid: programs to launch, one entry per axis.
        workspace: bytes of global memory for its own use, per program of the grid.
        reads, writes: bytes from and to global memory, of the whole grid.
        cube, vector: multiply-adds of the cube, element operations of the vector unit.
            These four are over the names that `launch` gives.
        notes: what a reader of the launch plan should know, such as a tail that is padded.
    """

    name: str
    op: str
    text: str
    work: Work
    arguments: tuple[Argument, ...]
    scalars: tuple[str, ...] = ()
    grid: tuple[GridAxis, ...] = ()
    workspace: int = 0
    reads: Polynomial = Polynomial()
    writes: Polynomial = Polynomial()
    cube: Polynomial = Polynomial()
    vector: Polynomial = Polynomial()
    notes: tuple[str, ...] = ()

    def launch(self, scalars: Mapping[str, int]) -> dict[str, int]:
        """`scalars`, and as ``grid0``, ``grid1``, ... the programs along each axis: what the costs are over."""
        return {**scalars, **{f"grid{i}": axis(scalars) for i, axis in enumerate(self.grid)}}
