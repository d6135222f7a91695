"""One kernel of the host graph as the device sees it: its buffers at the border and the tile programs it launches.

The programs of an operation share buffers by name. Those that are not at its border are scratch in global memory, which
lives as long as one call. Dimensions that a call decides are named; everything else about a launch follows from them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .program import Argument, Role, TileProgram

Dim = int | str


@dataclass(frozen=True)
class Border:
    """A buffer that an operation is called with.

    Attributes:
        name: as its programs call it.
        shape: in the host graph; a string names a dimension that a call decides.
        dtype: on the device.
        role: what the operation does with it.
        carried: dtype in the host graph, where it is not `dtype`: int64 for the int32 of the device.
        draw: bounds of the integers that an example of a call has, the second exclusive.
    """

    name: str
    shape: tuple[Dim, ...]
    dtype: str
    role: Role = Role.READ
    carried: str = ""
    draw: tuple[int, int] = (0, 1)

    @property
    def host_dtype(self) -> str:
        return self.carried or self.dtype


@dataclass(frozen=True)
class Variant:
    """Programs for calls of at most so many rows; None for any number."""

    most_rows: int | None
    programs: tuple[TileProgram, ...]


@dataclass(frozen=True)
class Operation:
    """A kernel of the host graph.

    Attributes:
        name: unique within an artifact.
        op: the operator of the model.
        borders: inputs in order, then the outputs that are not written over one.
        variants: by rising `Variant.most_rows`, the last for any number of rows.
        ratio: tokens per compressed row, of operations that know positions; 1 without.
    """

    name: str
    op: str
    borders: tuple[Border, ...]
    variants: tuple[Variant, ...]
    ratio: int = 1

    @property
    def dims(self) -> tuple[str, ...]:
        """Dimensions that a call decides, in order of appearance."""
        return tuple(dict.fromkeys(d for b in self.borders for d in b.shape if isinstance(d, str)))

    @property
    def programs(self) -> tuple[TileProgram, ...]:
        """Every program once."""
        return tuple(dict.fromkeys(p for v in self.variants for p in v.programs))

    def variant(self, scalars: Mapping[str, int]) -> Variant:
        """The one that a call with these dimensions launches."""
        rows = scalars_of(scalars)["rows"]
        return next(v for v in self.variants if v.most_rows is None or rows <= v.most_rows)

    def scratch(self, variant: Variant) -> tuple[Argument, ...]:
        """Buffers between the programs of a variant, in order of first use."""
        given = {b.name for b in self.borders}
        found: dict[str, Argument] = {}
        for program in variant.programs:
            for argument in program.arguments:
                if argument.name not in given:
                    found.setdefault(argument.name, argument)
        return tuple(found.values())

    def workspace(self, variant: Variant, scalars: Mapping[str, int]) -> int:
        """Bytes of scratch of one call, every buffer at a multiple of 64."""
        sizes = (math.prod(a.extents(scalars)) * np.dtype(a.dtype).itemsize for a in self.scratch(variant))
        return sum(-(-size // 64) * 64 for size in sizes)


def scalars_of(dims: Mapping[str, int]) -> dict[str, int]:
    """What programs call the dimensions of a call: ``rows`` are the tokens of all sequences."""
    rows = dims.get("rows", dims.get("batch", 1) * dims.get("chunk", 1))
    return {**dims, "rows": rows}


def example_dims(operation: Operation, rows: int = 3) -> dict[str, int]:
    """Dimensions of a small call."""
    usual = {"batch": 2, "chunk": rows, "rows": rows, "capacity": 40, "vocabulary": 64, "table_rows": 64}
    return {name: usual[name] for name in operation.dims}


def example_bytes(operation: Operation, dims: Mapping[str, int]) -> int:
    """Bytes of the device buffers at the border of a call."""
    shapes = (([dims[d] if isinstance(d, str) else d for d in b.shape], b.dtype) for b in operation.borders)
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in shapes)


def example_arrays(operation: Operation, dims: Mapping[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    """Device buffers of a small call: numbers from a generator, and positions before and after a ring's first turn."""
    generator = np.random.default_rng(seed)
    ready = 37 * operation.ratio + operation.ratio - 2 if operation.ratio > 1 else 300
    fixed: dict[str, Any] = {
        "positions": [ready, 5][: dims.get("batch", 0)],
        "lengths": [dims.get("chunk", 1), max(0, dims.get("chunk", 1) - 1)][: dims.get("batch", 0)],
    }
    arrays = {}
    for border in operation.borders:
        if border.role is Role.WRITE:
            continue
        shape = tuple(dims[d] if isinstance(d, str) else d for d in border.shape)
        dtype = np.dtype(border.dtype)
        if border.name in fixed:
            arrays[border.name] = np.array(fixed[border.name], dtype)
        elif dtype.kind in "iu":
            arrays[border.name] = generator.integers(*border.draw, shape, dtype=np.int64).astype(dtype)
        else:
            arrays[border.name] = generator.standard_normal(shape).astype(dtype)
    return arrays
