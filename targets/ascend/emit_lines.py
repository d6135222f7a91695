"""The lines of a tile program: its interface, its constants, its arithmetic, and what all of it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .emit_values import BYTES, MLIR_TYPES, Buffer, Value, identity, is_float, literal
from .program import Argument, GridAxis, Polynomial, Role, TileProgram, Work

_MIX_MODES = {Work.VECTOR: "aiv", Work.CUBE: "aic", Work.MIXED: "mix"}
_COMPARISONS = {"lt": ("olt", "slt"), "le": ("ole", "sle"), "gt": ("ogt", "sgt"), "ge": ("oge", "sge"),
                "eq": ("oeq", "eq"), "ne": ("une", "ne")}  # fmt: skip


@dataclass
class _Figures:
    """What has been counted, in bytes, multiply-adds and element operations of one program of the grid."""

    reads: Polynomial = field(default_factory=Polynomial)
    writes: Polynomial = field(default_factory=Polynomial)
    cube: Polynomial = field(default_factory=Polynomial)
    vector: Polynomial = field(default_factory=Polynomial)


class Emitter:
    """Writes one tile program.

    Args:
        name: of the function.
        op: the model's op it belongs to.
        work: cores it needs.
    """

    def __init__(self, name: str, op: str, work: Work = Work.VECTOR) -> None:
        self.program_name, self.op, self.work = name, op, work
        self._arguments: list[Argument] = []
        self._scalar_values: dict[str, Value] = {}
        self._head: list[str] = []
        self._body: list[str] = []
        self._constants: dict[tuple[float, str, tuple[int, ...] | None], Value] = {}
        self._ids: dict[int, Value] = {}
        self._depth, self._count = 0, 0
        self._times = [Polynomial.of(1)]
        self._figures = _Figures()

    # The program's interface.

    def argument(
        self, name: str, shape: Sequence[int | str | Polynomial], dtype: str, role: Role = Role.READ
    ) -> Buffer:
        """The next buffer; extents that are strings must be asked for with `scalar` as well, where code needs them."""
        self._arguments.append(Argument(name, tuple(shape), dtype, role))
        return Buffer(self._arguments[-1])

    def scalar(self, name: str) -> Value:
        """An integer known at launch, as an index; asked for again, the same."""
        if name not in self._scalar_values:
            self._scalar_values[name] = self._cast_head(f"%{name}")
        return self._scalar_values[name]

    def program_id(self, axis: int) -> Value:
        """Where in the grid this program stands."""
        if axis not in self._ids:
            self._ids[axis] = self._cast_head(f"%p{'xyz'[axis]}")
        return self._ids[axis]

    def finish(
        self, grid: Sequence[GridAxis], notes: Sequence[str] = (), repeat: Polynomial | None = None
    ) -> TileProgram:
        """The program, with its costs: what one program does times the programs of the grid (times `repeat`)."""
        programs = Polynomial(((1.0, tuple(f"grid{i}" for i in range(len(grid)))),))
        programs = programs if repeat is None else programs * repeat
        arguments = [
            "%sync: memref<?xi8> {hacc.arg_type = #hacc.arg_type<sync_block_lock>}",
            "%ws: memref<?xi8> {hacc.arg_type = #hacc.arg_type<workspace>}",
            *(f"%{a.name}: memref<?x{MLIR_TYPES[a.dtype]}> {{tt.divisibility = 16 : i32}}" for a in self._arguments),
            *(f"%{name}: i32" for name in (*self._scalar_values, "gx", "gy", "gz", "px", "py", "pz")),
        ]
        attributes = (
            "SyncBlockLockArgIdx = 0 : i64, WorkspaceArgIdx = 1 : i64, hacc.entry, "
            "hacc.function_kind = #hacc.function_kind<DEVICE>, "
            f'mix_mode = "{_MIX_MODES[self.work]}", global_kernel = "local"'
        )
        lines = [
            "module {",
            f"  func.func @{self.program_name}({', '.join(arguments)}) attributes {{{attributes}}} {{",
            *(f"    {line}" for line in (*self._head, *self._body)),
            "    return",
            "  }",
            "}",
        ]
        counted = self._figures
        return TileProgram(
            self.program_name, self.op, "\n".join(lines) + "\n", self.work, tuple(self._arguments),
            tuple(self._scalar_values), tuple(grid), 0, counted.reads * programs, counted.writes * programs,
            counted.cube * programs, counted.vector * programs, tuple(notes),
        )  # fmt: skip

    # Writing lines.

    def _fresh(self, dtype: str, shape: tuple[int, ...] | None = None) -> Value:
        self._count += 1
        return Value(self, f"%v{self._count}", dtype, shape)

    def _line(self, text: str) -> None:
        self._body.append("  " * self._depth + text)

    def _cast_head(self, name: str) -> Value:
        value = self._fresh("index")
        self._head.append(f"{value.name} = arith.index_cast {name} : i32 to index")
        return value

    def _counted(self, what: str, amount: float) -> None:
        total = Polynomial.of(amount)
        for times in self._times:
            total = total * times
        setattr(self._figures, what, getattr(self._figures, what) + total)

    def constant(self, value: float, dtype: str = "index", shape: tuple[int, ...] | None = None) -> Value:
        """A number, or a tensor that holds one number everywhere."""
        key = (value, dtype, shape)
        if key not in self._constants:
            made = self._fresh(dtype, shape)
            number = literal(value, dtype)
            self._head.append(f"{made.name} = arith.constant {number if shape is None else f'dense<{number}>'}"
                              f" : {made.type}")  # fmt: skip
            self._constants[key] = made
        return self._constants[key]

    # Arithmetic.

    def binary(self, kind: str, left: Any, right: Any) -> Any:
        """``add sub mul div rem max min and xor``; numbers and scalars are spread over the other side's shape."""
        if isinstance(left, int) and isinstance(right, int):
            return {"add": left + right, "sub": left - right, "mul": left * right, "div": left // max(right, 1),
                    "rem": left % max(right, 1), "max": max(left, right), "min": min(left, right)}[kind]  # fmt: skip
        like = left if isinstance(left, Value) and (left.shape is not None or not isinstance(right, Value)) else right
        if like.dtype == "index" and (shortcut := identity(kind, left, right)) is not None:
            return shortcut
        left, right = self._spread(left, like), self._spread(right, like)
        if is_float(like.dtype):
            name = {"max": "maximumf", "min": "minimumf"}.get(kind, f"{kind}f")
        else:
            signed = {"div": "divsi", "rem": "remsi", "max": "maxsi", "min": "minsi", "xor": "xori", "shift": "shli"}
            name = signed.get(kind, f"{kind}i")
        return self._elementwise(f"arith.{name}", like, left, right)

    def maximum(self, left: Any, right: Any) -> Any:
        return self.binary("max", left, right)

    def minimum(self, left: Any, right: Any) -> Any:
        return self.binary("min", left, right)

    def unary(self, name: str, x: Value) -> Value:
        """A function of the math dialect: ``exp log sqrt rsqrt absf``."""
        return self._elementwise(f"math.{name}", x, x)

    def compare(self, kind: str, left: Any, right: Any) -> Value:
        """``lt le gt ge eq ne``, as booleans."""
        like = left if isinstance(left, Value) and (left.shape is not None or not isinstance(right, Value)) else right
        left, right = self._spread(left, like), self._spread(right, like)
        out = self._fresh("bool", like.shape)
        floating = is_float(like.dtype)
        name, predicate = ("cmpf", _COMPARISONS[kind][0]) if floating else ("cmpi", _COMPARISONS[kind][1])
        self._line(f"{out.name} = arith.{name} {predicate}, {left.name}, {right.name} : {like.type}")
        self._counted("vector", math.prod(like.shape or ()) if like.shape is not None else 0)
        return out

    def select(self, condition: Value, then: Any, otherwise: Any) -> Value:
        """`then` where `condition` holds; of tensors element by element."""
        like = then if isinstance(then, Value) and (then.shape is not None or condition.shape is None) else otherwise
        then, otherwise = self._spread(then, like), self._spread(otherwise, like)
        out = self._fresh(like.dtype, like.shape)
        self._line(
            f"{out.name} = arith.select {condition.name}, {then.name}, {otherwise.name} : "
            + (f"{condition.type}, {like.type}" if condition.shape is not None else like.type)
        )
        self._counted("vector", math.prod(like.shape) if like.shape is not None else 0)
        return out

    def cast(self, x: Value, dtype: str) -> Value:
        """Another element type: floats are rounded to the nearest, floats to integers cut off."""
        if x.dtype == dtype:
            return x
        out = self._fresh(dtype, x.shape)
        if "index" in (x.dtype, dtype):
            name = "index_cast"
        elif is_float(x.dtype) and is_float(dtype):
            name = "extf" if BYTES[dtype] > BYTES[x.dtype] else "truncf"
        elif is_float(dtype):
            name = "uitofp" if x.dtype == "bool" else "sitofp"
        elif is_float(x.dtype):
            name = "fptosi"
        else:
            name = "extsi" if BYTES[dtype] > BYTES[x.dtype] else "trunci"
        self._line(f"{out.name} = arith.{name} {x.name} : {x.type} to {out.type}")
        self._counted("vector", math.prod(x.shape) if x.shape is not None else 0)
        return out

    def _elementwise(self, name: str, like: Value, *operands: Value) -> Value:
        out = self._fresh(like.dtype, like.shape)
        self._line(f"{out.name} = {name} {', '.join(o.name for o in operands)} : {like.type}")
        self._counted("vector", math.prod(like.shape) if like.shape is not None else 0)
        return out

    def _spread(self, x: Any, like: Value) -> Value:
        """`x` in the shape of `like`."""
        if not isinstance(x, Value):
            return self.constant(x, like.dtype, like.shape)
        return self.fill(x, like.shape) if x.shape is None and like.shape is not None else x

    def empty(self, shape: tuple[int, ...], dtype: str) -> Value:
        """Memory for a result."""
        out = self._fresh(dtype, shape)
        self._line(f"{out.name} = tensor.empty() : {out.type}")
        return out

    def fill(self, value: Value | float, shape: tuple[int, ...], dtype: str = "float32") -> Value:
        """A tensor that holds `value` everywhere."""
        scalar = value if isinstance(value, Value) else self.constant(value, dtype)
        into = self.empty(shape, scalar.dtype)
        out = self._fresh(scalar.dtype, shape)
        self._line(
            f"{out.name} = linalg.fill ins({scalar.name} : {scalar.type}) outs({into.name} : {into.type}) -> {out.type}"
        )
        return out
