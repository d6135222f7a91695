"""A small builder of MLIR text for tile programs: linalg on tensors inside the ABI of Triton's kernels.

A generator asks for buffers, scalars and program ids, loads tiles, computes with Python operators and stores tiles;
`TileBuilder.finish` gives the `TileProgram`. Every tile that moves and every element that is computed is counted, so
the costs of a program are those of the plan it was written from.

The ABI is that of triton-ascend's kernels as bishengir-compile 1.2.0 takes them: a lock, a workspace, the buffers, the
integers, the grid's three sizes and the program's three ids.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .emit_lines import Emitter
from .emit_values import BYTES, MLIR_TYPES, Buffer, Local, Loop, Value, extents, groups, is_float, packed, places
from .program import Polynomial

__all__ = ["BYTES", "MLIR_TYPES", "Buffer", "Local", "Loop", "TileBuilder", "Value"]


class TileBuilder(Emitter):
    """Writes one tile program; `Emitter` has its interface and arithmetic, this class its tensors, loops and memory."""

    # Tensors.

    def iota(self, size: int, dtype: str = "int32") -> Value:
        """``0, 1, ... size - 1``."""
        into, out = self.empty((size,), "int32"), self._fresh("int32", (size,))
        self._line(
            f"{out.name} = linalg.generic {{indexing_maps = [affine_map<(d0) -> (d0)>], iterator_types = "
            f'["parallel"]}} outs({into.name} : {into.type}) {{'
        )
        self._line("^bb0(%.element: i32):")
        self._line("  %.place = linalg.index 0 : index")
        self._line("  %.number = arith.index_cast %.place : index to i32")
        self._line("  linalg.yield %.number : i32")
        self._line(f"}} -> {out.type}")
        self._counted("vector", size)
        return self.cast(out, dtype)

    def reduce(self, x: Value, axis: int, kind: str = "add") -> Value:
        """Sum (``add``) or largest (``max``) over one axis, which goes away."""
        shape = tuple(d for i, d in enumerate(x.shape or ()) if i != axis)
        start = {"add": 0.0, "max": -math.inf if is_float(x.dtype) else -(2**31)}[kind]
        into, out = self.fill(start, shape, x.dtype), self._fresh(x.dtype, shape)
        element = MLIR_TYPES[x.dtype]
        name = {"add": "addf", "max": "maximumf"}[kind] if is_float(x.dtype) else {"add": "addi", "max": "maxsi"}[kind]
        self._line(
            f"{out.name} = linalg.reduce ins({x.name} : {x.type}) outs({into.name} : {into.type}) dimensions = [{axis}]"
        )
        self._line(f"  (%.one: {element}, %.two: {element}) {{")
        self._line(f"    %.both = arith.{name} %.one, %.two : {element}")
        self._line(f"    linalg.yield %.both : {element}")
        self._line("  }")
        self._counted("vector", math.prod(x.shape or ()))
        return out

    def broadcast(self, x: Value, shape: tuple[int, ...], axis: int) -> Value:
        """`x` repeated along a new axis."""
        into, out = self.empty(shape, x.dtype), self._fresh(x.dtype, shape)
        self._line(
            f"{out.name} = linalg.broadcast ins({x.name} : {x.type}) outs({into.name} : {into.type}) "
            f"dimensions = [{axis}]"
        )
        self._counted("vector", math.prod(shape))
        return out

    def transpose(self, x: Value) -> Value:
        """Rows and columns of a matrix exchanged."""
        rows, columns = x.shape or (0, 0)
        into, out = self.empty((columns, rows), x.dtype), self._fresh(x.dtype, (columns, rows))
        self._line(
            f"{out.name} = linalg.transpose ins({x.name} : {x.type}) outs({into.name} : {into.type}) "
            "permutation = [1, 0]"
        )
        return out

    def reshape(self, x: Value, shape: tuple[int, ...]) -> Value:
        """One row as a vector or a vector as one row, and the like: axes of size one come or go."""
        assert x.shape is not None
        assert math.prod(shape) == math.prod(x.shape)
        if x.shape == shape:
            return x
        out = self._fresh(x.dtype, shape)
        longer, shorter = (x.shape, shape) if len(x.shape) > len(shape) else (shape, x.shape)
        merged = str(groups(longer, shorter))
        if len(x.shape) > len(shape):
            self._line(f"{out.name} = tensor.collapse_shape {x.name} {merged} : {x.type} into {out.type}")
        else:
            sizes = ", ".join(map(str, shape))
            self._line(
                f"{out.name} = tensor.expand_shape {x.name} {merged} output_shape [{sizes}] : {x.type} into {out.type}"
            )
        return out

    def part(
        self, x: Value, offsets: Sequence[Any], shape: Sequence[int], strides: Sequence[int] | None = None
    ) -> Value:
        """A block of `x`, or every `strides`-th element of one."""
        out = self._fresh(x.dtype, tuple(shape))
        self._line(
            f"{out.name} = tensor.extract_slice {x.name}{places(offsets)} {places(shape)} "
            f"{places(strides or [1] * len(shape))} : {x.type} to {out.type}"
        )
        return out

    def put(self, x: Value, into: Value, offsets: Sequence[Any], strides: Sequence[int] | None = None) -> Value:
        """`into` with `x` in the place of a block."""
        out = self._fresh(into.dtype, into.shape)
        assert x.shape is not None
        self._line(
            f"{out.name} = tensor.insert_slice {x.name} into {into.name}{places(offsets)} {places(x.shape)} "
            f"{places(strides or [1] * len(x.shape))} : {x.type} into {into.type}"
        )
        self._counted("vector", math.prod(x.shape))
        return out

    def extract(self, x: Value, place: int = 0) -> Value:
        """One number of a vector, as a scalar."""
        out = self._fresh(x.dtype)
        self._line(f"{out.name} = tensor.extract {x.name}[{self.constant(place).name}] : {x.type}")
        return out

    def bitcast(self, x: Value, dtype: str) -> Value:
        """The same bits as another type."""
        out = self._fresh(dtype, x.shape)
        self._line(f"{out.name} = arith.bitcast {x.name} : {x.type} to {out.type}")
        return out

    def matmul(self, left: Value, right: Value, onto: Value | None = None) -> Value:
        """Product in float32, added to `onto`."""
        (rows, inner), columns = left.shape or (0, 0), (right.shape or (0, 0))[1]
        into = onto or self.fill(0.0, (rows, columns))
        out = self._fresh("float32", (rows, columns))
        self._line(
            f"{out.name} = linalg.matmul ins({left.name}, {right.name} : {left.type}, {right.type}) "
            f"outs({into.name} : {into.type}) -> {out.type}"
        )
        self._counted("cube", rows * columns * inner)
        return out

    # Loops.

    @contextmanager
    def loop(
        self, stop: Any, step: int = 1, start: Any = 0, carried: Sequence[Value] = (), trips: Polynomial | None = None,
        gathers: bool = False,
    ) -> Iterator[Loop]:  # fmt: skip
        """A loop; set `next` of what it gives to the values that go on, and read `results` behind it.

        Args:
            stop, step, start: bounds of the index.
            carried: values of the first step.
            trips: steps to count in the costs, where the bounds are not numbers.
            gathers: whether each step copies a row whose place is read from memory.
        """
        index = self._fresh("index")
        inner = tuple(self._fresh(v.dtype, v.shape) for v in carried)
        # Always from 0: of a loop with another first index, bishengir 1.2.0 rescales the step but not that index in the
        # vector half of a mixed kernel, so that its halves go different ways.
        last = self.binary("sub", stop, start)
        bounds = [self._index(v).name for v in (0, last, step)]
        head = f"scf.for {index.name} = {bounds[0]} to {bounds[1]} step {bounds[2]}"
        types = ", ".join(v.type for v in carried)
        results = self._fresh("index") if carried else None
        if results:
            pairs = ", ".join(f"{i.name} = {v.name}" for i, v in zip(inner, carried, strict=True))
            many = f":{len(carried)}" if len(carried) > 1 else ""
            head = f"{results.name}{many} = {head} iter_args({pairs}) -> ({types})"
        self._line(head + " {")
        self._depth += 1
        known = all(isinstance(v, int) for v in (start, stop))
        self._times.append(Polynomial.of(math.ceil((stop - start) / step)) if known else trips or Polynomial.of(1))
        loop = Loop(self.binary("add", index, start), inner)
        yield loop
        if carried:
            self._line(f"scf.yield {', '.join(v.name for v in loop.next)} : {types}")
        self._times.pop()
        self._depth -= 1
        self._line("} {ExtractedLoadOrStore}" if gathers else "}")
        if results:
            names = [results.name] if len(carried) == 1 else [f"{results.name}#{i}" for i in range(len(carried))]
            loop.results = tuple(Value(self, n, v.dtype, v.shape) for n, v in zip(names, carried, strict=True))

    # Global memory.

    def _index(self, x: Any) -> Value:
        return x if isinstance(x, Value) else self.constant(x)

    def _view(self, buffer: Buffer, offset: Any, shape: Sequence[int], strides: Sequence[Any]) -> tuple[str, str]:
        name = self._fresh("index").name
        layout = f"strided<[{extents(strides)}], offset: ?>"
        kind = f"memref<{'x'.join((*map(str, shape), MLIR_TYPES[buffer.dtype]))}, {layout}>"
        self._line(
            f"{name} = memref.reinterpret_cast {buffer.name} to offset: [{self._index(offset).name}], "
            f"sizes: {places(shape)}, strides: {places(strides)} : {buffer.type} to {kind}"
        )
        return name, kind

    def _window(
        self, name: str, kind: str, offsets: Sequence[Any], sizes: Sequence[Any], strides: Sequence[Any], dtype: str,
        moved: bool,
    ) -> tuple[str, str]:  # fmt: skip
        """A block of a memref; `moved` when its offset is not known to be 0."""
        out = self._fresh("index").name
        layout = f"strided<[{extents(strides)}]{', offset: ?' if moved else ''}>"
        shape = "x".join(("?" if isinstance(s, Value) else str(s)) for s in sizes)
        target = f"memref<{shape}x{MLIR_TYPES[dtype]}, {layout}>"
        self._line(
            f"{out} = memref.subview {name}{places(offsets)} {places(sizes)} {places([1] * len(sizes))} : "
            f"{kind} to {target}"
        )
        return out, target

    def load(
        self, buffer: Buffer, offset: Any, shape: tuple[int, ...], strides: Sequence[Any] | None = None,
        valid: Sequence[Any] | None = None, fill: float | None = None,
    ) -> Value:  # fmt: skip
        """A tile from global memory.

        Args:
            buffer: what it is read from.
            offset: elements before its first one.
            shape: of the tile.
            strides: elements between neighbours along each axis; without them the tile is one piece.
            valid: extents that exist; what lies beyond is not read.
            fill: what stands there instead; without it, anything may.
        """
        local = self.local(shape, buffer.dtype)
        if valid is not None and fill is not None:
            self.fill_local(local, fill)
        self.copy_in(local, [0] * len(shape), buffer, offset, shape, strides, valid)
        return self.tensor(local)

    def local(self, shape: tuple[int, ...], dtype: str) -> Local:
        """Memory on the core."""
        local = Local(self._fresh("index").name, shape, dtype)
        self._line(f"{local.name} = memref.alloc() : {local.type}")
        return local

    def fill_local(self, local: Local, value: float) -> None:
        """`value` everywhere in `local`."""
        number = self.constant(value, local.dtype)
        self._line(f"linalg.fill ins({number.name} : {number.type}) outs({local.name} : {local.type})")

    def copy_in(
        self, local: Local, at: Sequence[Any], buffer: Buffer, offset: Any, shape: tuple[int, ...],
        strides: Sequence[Any] | None = None, valid: Sequence[Any] | None = None,
    ) -> None:  # fmt: skip
        """A tile from global memory into a block of `local`; arguments as those of `load`."""
        strides = strides or packed(shape)
        name, kind = self._view(buffer, offset, shape, strides)
        into, into_kind = local.name, local.type
        whole = all(isinstance(a, int) and a == 0 for a in at)
        if valid is not None:
            name, kind = self._window(name, kind, [0] * len(shape), valid, strides, buffer.dtype, moved=True)
        if valid is not None or not whole or shape != local.shape:
            sizes = valid if valid is not None else shape
            into, into_kind = self._window(
                into, into_kind, at, sizes, packed(local.shape), local.dtype, moved=not whole
            )
        self._line(f"memref.copy {name}, {into} : {kind} to {into_kind}")
        self._counted("reads", math.prod(shape) * BYTES[buffer.dtype])

    def tensor(self, local: Local) -> Value:
        """What `local` holds, once it is filled."""
        out = self._fresh(local.dtype, local.shape)
        self._line(f"{out.name} = bufferization.to_tensor {local.name} restrict writable : {local.type}")
        return out

    def store(
        self, x: Value, buffer: Buffer, offset: Any, strides: Sequence[Any] | None = None,
        valid: Sequence[Any] | None = None, start: Sequence[Any] | None = None,
    ) -> None:  # fmt: skip
        """A tile, or the block of it that begins at `start` and is `valid` large, to global memory."""
        assert x.shape is not None
        strides = strides or packed(x.shape)
        name, kind = self._view(buffer, offset, x.shape, strides)
        source = x.name, x.type
        if valid is not None:
            name, kind = self._window(name, kind, [0] * len(x.shape), valid, strides, buffer.dtype, moved=True)
            shape = "x".join(("?" if isinstance(s, Value) else str(s)) for s in valid)
            out = self._fresh("index").name, f"tensor<{shape}x{MLIR_TYPES[x.dtype]}>"
            self._line(
                f"{out[0]} = tensor.extract_slice {x.name}{places(start or [0] * len(x.shape))} {places(valid)} "
                f"{places([1] * len(x.shape))} : {x.type} to {out[1]}"
            )
            source = out
        self._line(
            f"bufferization.materialize_in_destination {source[0]} in writable {name} : ({source[1]}, {kind}) -> ()"
        )
        self._counted("writes", math.prod(x.shape) * BYTES[x.dtype])

    def write(self, number: Value, local: Local, place: int) -> None:
        """One number into `local`, a vector."""
        at = self.constant(place).name
        self._line(f"memref.store {number.name}, {local.name}[{at}] : {local.type}")

    def read(self, buffer: Buffer, offset: Any) -> Value:
        """One number of a buffer; integers of 32 bits as an index."""
        name, kind = self._view(buffer, offset, (1,), (1,))
        out = self._fresh(buffer.dtype)
        self._line(f"{out.name} = memref.load {name}[{self.constant(0).name}] : {kind}")
        self._counted("reads", BYTES[buffer.dtype])
        return self.cast(out, "index") if buffer.dtype == "int32" else out
