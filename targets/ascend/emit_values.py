"""What tile programs are written with: element types, values and memories, and how MLIR spells them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .program import Argument

if TYPE_CHECKING:
    from .emit_lines import Emitter

MLIR_TYPES = {
    "bool": "i1", "int8": "i8", "int32": "i32", "int64": "i64", "float16": "f16", "bfloat16": "bf16", "float32": "f32",
    "float8_e4m3fn": "f8E4M3FN", "index": "index",
}  # fmt: skip
"""Element types by their NumPy or ml_dtypes names."""

BYTES = {
    "bool": 1, "int8": 1, "float8_e4m3fn": 1, "float16": 2, "bfloat16": 2, "int32": 4, "float32": 4, "int64": 8,
}  # fmt: skip
"""Bytes of an element."""


def is_float(dtype: str) -> bool:
    return dtype.startswith(("float", "bfloat"))


def literal(value: float, dtype: str) -> str:
    """A literal of `dtype`."""
    if not is_float(dtype):
        return str(int(value))
    if math.isinf(value):
        bits = {"float32": "0x7F800000", "float16": "0x7C00", "bfloat16": "0x7F80"}[dtype]
        return bits if value > 0 else {"0x7F800000": "0xFF800000", "0x7C00": "0xFC00", "0x7F80": "0xFF80"}[bits]
    return f"{value:.9e}"


@dataclass(frozen=True, eq=False)
class Value:
    """A scalar (`shape` is None) or a tensor; operators work element by element, with numbers and scalars as well."""

    builder: Emitter
    name: str
    dtype: str
    shape: tuple[int, ...] | None = None

    @property
    def type(self) -> str:
        """Its MLIR type."""
        element = MLIR_TYPES[self.dtype]
        return element if self.shape is None else f"tensor<{'x'.join((*map(str, self.shape), element))}>"

    def __add__(self, other: Any) -> Value:
        return self.builder.binary("add", self, other)

    def __radd__(self, other: Any) -> Value:
        return self.builder.binary("add", other, self)

    def __sub__(self, other: Any) -> Value:
        return self.builder.binary("sub", self, other)

    def __rsub__(self, other: Any) -> Value:
        return self.builder.binary("sub", other, self)

    def __mul__(self, other: Any) -> Value:
        return self.builder.binary("mul", self, other)

    def __rmul__(self, other: Any) -> Value:
        return self.builder.binary("mul", other, self)

    def __truediv__(self, other: Any) -> Value:
        return self.builder.binary("div", self, other)

    def __rtruediv__(self, other: Any) -> Value:
        return self.builder.binary("div", other, self)

    def __floordiv__(self, other: Any) -> Value:
        """Of integers that are not negative: the quotient is cut off."""
        return self.builder.binary("div", self, other)

    def __mod__(self, other: Any) -> Value:
        """Of integers that are not negative: the sign follows the dividend."""
        return self.builder.binary("rem", self, other)


@dataclass(frozen=True, eq=False)
class Buffer:
    """An argument in global memory."""

    argument: Argument

    @property
    def dtype(self) -> str:
        return self.argument.dtype

    @property
    def type(self) -> str:
        return f"memref<?x{MLIR_TYPES[self.dtype]}>"

    @property
    def name(self) -> str:
        return f"%{self.argument.name}"


@dataclass(frozen=True, eq=False)
class Local:
    """Memory on the core that is filled piece by piece."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def type(self) -> str:
        return f"memref<{'x'.join((*map(str, self.shape), MLIR_TYPES[self.dtype]))}>"


@dataclass
class Loop:
    """A loop being written: its index, the values carried into the step, and those that go on (`next`)."""

    index: Value
    carried: tuple[Value, ...]
    next: Sequence[Value] = ()
    results: tuple[Value, ...] = ()


def packed(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def places(items: Sequence[Any]) -> str:
    return "[" + ", ".join(i.name if isinstance(i, Value) else str(i) for i in items) + "]"


def extents(items: Sequence[Any]) -> str:
    """Numbers as a type writes them: a question mark for what is known at launch."""
    return ", ".join("?" if isinstance(i, Value) else str(i) for i in items)


def groups(longer: Sequence[int], shorter: Sequence[int]) -> list[list[int]]:
    """Axes of `longer` that make up each axis of `shorter`."""
    groups: list[list[int]] = []
    axis = 0
    for extent in shorter:
        group, product = [axis], longer[axis]
        axis += 1
        while product != extent or (len(groups) == len(shorter) - 1 and axis < len(longer)):
            group.append(axis)
            product *= longer[axis]
            axis += 1
        groups.append(group)
    return groups


def identity(kind: str, left: Any, right: Any) -> Any:
    """The result of an index operation that changes nothing, or None."""
    zero = {"add": (0, 0), "sub": (None, 0), "mul": (1, 1), "div": (None, 1)}.get(kind)
    if zero is None:
        return None
    if isinstance(left, int) and left == zero[0]:
        return right
    return left if isinstance(right, int) and right == zero[1] else None
