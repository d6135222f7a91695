"""Which tile programs stand for which op: the importer's `Kernels` protocol, answered with operations.

Activations between operations are float32, so that sums over many layers lose nothing; products, attention and experts
round their inputs to half precision in a program of their own. Caches of key-value rows and the matrices of products
are float16 (bfloat16 with ``--dtype bf16``, matrices only), integers are int32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from v4c.custom_ops import CustomOp, TensorSpec
from v4c.errors import UnsupportedError
from v4c.passes.relax.kernels import Kernel
from v4c.passes.relax.layouts import WeightSpec

from . import packing
from .custom import CUSTOM, Inputs, Unnamed, floats
from .host_function import host_function
from .kernels.casts import cast_rows
from .kernels.norms import rms_norm
from .kernels.products import linear
from .kernels.swiglu import add
from .operation import Operation, Variant
from .program import DeviceLimits, Role, TileProgram
from .tiles import ProductTiles

FEW_ROWS = 16
"""Calls of at most so many rows have programs whose tiles are chosen for them: decode steps."""

CACHES = {"window": "float16", "rows": "float16", "index_rows": "float16"}
"""Caches that are stored in half precision; rings of raw projections stay float32, for they are summed."""

HOST = DeviceLimits(
    "host", 1 << 40, 1 << 40, 1 << 40, 1 << 40, 1 << 40, 1, 1, frozenset(("float16", "bfloat16", "float32"))
)
"""Limits of programs that no core of the device can hold: those the host runs in their place."""


@dataclass(frozen=True)
class Product:
    """A product with a weight, whose tiles can be chosen.

    Attributes:
        n, k: outputs and inputs of a group.
        dtype: of both operands.
        groups: blocks of the weight.
        few: whether for calls of few rows (`FEW_ROWS`).
    """

    n: int
    k: int
    dtype: str
    groups: int
    few: bool


@dataclass
class AscendKernels:
    """Operations for the importer.

    Attributes:
        limits: of the device.
        operations: what was asked for so far, by name.
        tiles: of products, in place of those that the limits give: what `tune` found.
        too_large: names of operations for which the device has no tiles, with the reason.
        products: that were asked for so far.
    """

    limits: DeviceLimits
    tiles: Mapping[Product, ProductTiles] = field(default_factory=dict)
    operations: dict[str, Operation] = field(default_factory=dict)
    too_large: dict[str, str] = field(default_factory=dict)
    products: list[Product] = field(default_factory=list)
    _named: dict[Any, str] = field(default_factory=dict)
    _texts: dict[str, TileProgram] = field(default_factory=dict)

    def custom(self, op: CustomOp, inputs: Sequence[TensorSpec], attributes: Mapping[str, Any]) -> Kernel:
        if op.name not in CUSTOM:
            raise UnsupportedError(f"operator {op.name}: no tile program")
        return self._kernel(op.name, CUSTOM[op.name](Inputs(op, inputs), attributes))

    def linear(self, sizes: tuple[int, ...], k: int, dtype: str, norm_eps: float | None) -> Kernel:
        if len(sizes) > 1 or norm_eps is not None:
            raise UnsupportedError("merged and normalising products: no tile program")
        # Routers are float32, every other matrix is half precision.
        return self._product(sizes[0], k, dtype, 1)

    def linear_unpacked(self, n: int, k: int, dtype: str) -> Kernel:
        return self._product(n, k, dtype, 1)

    def grouped_linear(self, groups: int, n: int, k: int, dtype: str) -> Kernel:
        return self._product(n, k, dtype, groups)

    def _product(self, n: int, k: int, dtype: str, groups: int) -> Kernel:
        self.products += [p for few in (True, False) if (p := Product(n, k, dtype, groups, few)) not in self.products]
        middle = (groups,) if groups > 1 else ()
        wide = dtype == "float32"
        borders = (
            floats("x", "rows", *middle, k), floats("weight", *middle, n, k, dtype=dtype),
            floats("y", "rows", *middle, n, role=Role.WRITE),
        )  # fmt: skip

        def programs(at: DeviceLimits, rows: int | None) -> tuple[TileProgram, ...]:
            names = ("x" if wide else "x_half", "weight", "y")
            tiles = self.tiles.get(Product(n, k, dtype, groups, rows is not None))
            product = linear(n, k, at, dtype=dtype, out="float32", rows=rows, groups=groups, names=names, tiles=tiles)
            if wide:
                return (product,)
            return cast_rows(groups * k, "float32", dtype, at, op="MatMul", names=("x", "x_half")), product

        return self._kernel("MatMul", Unnamed(borders, programs, by_rows=True))

    def rms_norm(self, width: int, eps: float, weighted: bool) -> Kernel:
        borders = (floats("x", "rows", width), *((floats("weight", width),) if weighted else ()),
                   floats("y", "rows", width, role=Role.WRITE))  # fmt: skip
        return self._kernel("RMSNormalization", Unnamed(borders, lambda at, rows: (
            rms_norm(width, eps, at, weighted=weighted, dtype="float32", out="float32"),
        )))  # fmt: skip

    def add(self, width: int) -> Kernel:
        borders = (floats("left", "rows", width), floats("right", "rows", width),
                   floats("y", "rows", width, role=Role.WRITE))  # fmt: skip
        return self._kernel("Add", Unnamed(borders, lambda at, rows: (add(width, at, dtype="float32"),)))

    def packed(self, weight: WeightSpec) -> TensorSpec:
        return packing.packed(weight)

    def _kernel(self, op: str, plan: Unnamed) -> Kernel:
        reason = ""
        try:
            variants = self._variants(plan, self.limits)
        except UnsupportedError as error:
            reason, variants = str(error), self._variants(plan, HOST)
        key = (op, plan.borders, tuple((v.most_rows, tuple(p.text for p in v.programs)) for v in variants))
        if key not in self._named:
            name = _fresh(_snake(op), self.operations)
            variants = tuple(replace(v, programs=tuple(self._distinct(p) for p in v.programs)) for v in variants)
            self.operations[name] = Operation(name, op, plan.borders, variants, plan.ratio)
            self._named[key] = name
            if reason:
                self.too_large[name] = reason
        operation = self.operations[self._named[key]]
        return Kernel(_Factory(operation.name), (operation,))

    def _variants(self, plan: Unnamed, at: DeviceLimits) -> tuple[Variant, ...]:
        many = Variant(None, plan.programs(at, None))
        return (Variant(FEW_ROWS, plan.programs(at, FEW_ROWS)), many) if plan.by_rows else (many,)

    def _distinct(self, program: TileProgram) -> TileProgram:
        """The program under a name that no other has: names do not tell every setting, such as an epsilon."""
        name, count = program.name, 1
        while name in self._texts and self._texts[name] != program:
            count += 1
            name = f"{program.name}_v{count}"
        self._texts.setdefault(name, program)
        return replace(program, name=name, text=program.text.replace(f"@{program.name}(", f"@{name}("))


@dataclass(frozen=True)
class _Factory:
    """`host_function` under the operation's name, which becomes the kernel's."""

    __name__: str

    def __call__(self, operation: Operation) -> Any:
        return host_function(operation)


def _snake(name: str) -> str:
    """``TopKRoute`` as ``top_k_route``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _fresh(base: str, taken: Mapping[str, Any]) -> str:
    name, count = base, 1
    while name in taken:
        name, count = f"{base}{count}", count + 1
    return name
