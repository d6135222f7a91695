"""Conversions of the standard ONNX operators that the exporter leaves between custom ops.

Each converter takes the importer, the arguments (Relax variables, NumPy constants, `Shape`s or weights), the node's
attributes and its number of outputs, and returns that many results.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
from tvm import relax, tirx

from v4c.errors import UnsupportedError

from . import products
from .kernels import Adds
from .layouts import Layout
from .values import Parts, Shape, WeightUse

if TYPE_CHECKING:
    from .importer import Importer

R = relax.op
Converter = Callable[["Importer", list[Any], dict[str, Any], int], list[Any]]
CONVERTERS: dict[str, Converter] = {}


def converter(*names: str) -> Callable[[Converter], Converter]:
    """Register a converter under ONNX operator names."""

    def register(function: Converter) -> Converter:
        CONVERTERS.update(dict.fromkeys(names, function))
        return function

    return register


def as_shape(value: Any) -> Shape | None:
    """`value` as integers known now, or None if it is a tensor of run time."""
    if isinstance(value, Shape):
        return value
    if isinstance(value, np.ndarray) and value.dtype == np.int64 and value.ndim <= 1:
        return Shape([int(v) for v in np.atleast_1d(value)], scalar=value.ndim == 0)
    return None


def integers(value: Any) -> list[Any]:
    """`value` as a list of integers known at import; UnsupportedError if it is only known at run time."""
    shape = as_shape(value)
    if shape is None:
        raise UnsupportedError("a shape argument depends on run-time data: expected constants or input shapes")
    return list(shape)


def expression(value: Any) -> Any:
    """A dimension as a PrimExpr."""
    return tirx.IntImm("int64", value) if isinstance(value, int) else value


def dims_of(value: Any) -> list[Any]:
    """Dimensions of a tensor, constant or weight."""
    if isinstance(value, np.ndarray):
        return list(value.shape)
    if isinstance(value, WeightUse):
        return list(value.spec.shape)
    if isinstance(value, Parts):
        return [*dims_of(value.tensors[0])[:-1], sum(value.sizes)]
    return [int(d) if isinstance(d, tirx.IntImm) else d for d in value.ty.shape.values]


@converter("Constant")
def _constant(importer: Importer, args: list[Any], attributes: dict[str, Any], outputs: int) -> list[Any]:
    ((name, value),) = attributes.items()
    if name == "value":
        return [value]
    dtype = np.float32 if "float" in name else np.int64
    return [np.array(value, dtype=dtype)]


@converter("Shape")
def _shape(importer: Importer, args: list[Any], attributes: dict[str, Any], outputs: int) -> list[Any]:
    return [Shape(dims_of(args[0])[attributes.get("start", 0) : attributes.get("end")])]


@converter("Concat")
def _concat(importer: Importer, args: list[Any], attributes: dict[str, Any], outputs: int) -> list[Any]:
    shapes = [as_shape(a) for a in args]
    if all(s is not None for s in shapes):
        return [Shape([d for s in shapes if s is not None for d in s])]
    return [importer.builder.emit(R.concat([importer.tensor(a) for a in args], axis=attributes["axis"]))]


@converter("Gather")
def _gather(importer: Importer, args: list[Any], attributes: dict[str, Any], outputs: int) -> list[Any]:
    data, index = as_shape(args[0]), as_shape(args[1])
    if data is not None and index is not None:
        return [Shape([data[i] for i in index], scalar=index.scalar)]
    taken = R.take(importer.tensor(args[0]), importer.tensor(args[1]), axis=attributes.get("axis", 0), mode="clip")
    return [_float(importer, importer.builder.emit(taken))]


@converter("GatherElements")
def _gather_elements(importer: Importer, args: list[Any], attributes: dict[str, Any], outputs: int) -> list[Any]:
    x, index = importer.tensor(args[0]), importer.tensor(args[1])
    return [importer.builder.emit(R.gather_elements(x, index, axis=attributes.get("axis", 0)))]


@converter("Cast")
def _cast(importer: Importer, args: list[Any], attributes: dict[str, Any], outputs: int) -> list[Any]:
    x, dtype = args[0], {1: "float32", 7: "int64", 6: "int32", 9: "bool", 16: "bfloat16"}[int(attributes["to"])]
    if isinstance(x, Shape) and dtype == "int64":
        return [x]
    if isinstance(x, np.ndarray):
        return [x.astype(dtype)]
    if isinstance(x, WeightUse):
        return [x]  # a stored weight: its kernel converts it, or packing did
    return [x if str(x.ty.dtype) == dtype else importer.builder.emit(R.astype(x, dtype))]


@converter("Reshape")
def _reshape(importer: Importer, args: list[Any], attributes: dict[str, Any], outputs: int) -> list[Any]:
    if isinstance(args[0], WeightUse) and args[0].spec.layout == Layout.GROUPED_LINEAR:
        return [args[0]]
    dims, target = dims_of(args[0]), integers(args[1])
    target = [dims[i] if isinstance(d, int) and d == 0 else d for i, d in enumerate(target)]
    if -1 in [d for d in target if isinstance(d, int)]:
        target = _infer(dims, target)
    return [_reshaped(importer, args[0], target)]


def _reshaped(importer: Importer, x: Any, dims: list[Any]) -> Any:
    return importer.builder.emit(R.reshape(importer.tensor(x), [expression(d) for d in dims]))


def _infer(dims: list[Any], target: list[Any]) -> list[Any]:
    """Replace -1: dimensions that stand on both sides cancel, so no symbolic division is left where none is needed."""
    left, right = list(dims), [d for d in target if not (isinstance(d, int) and d == -1)]
    for dim in list(right):
        match = next((i for i, d in enumerate(left) if _same(d, dim)), None)
        if match is not None:
            left.pop(match)
            right.remove(dim)
    rest = reduce(operator.mul, left, 1)
    known = reduce(operator.mul, right, 1)
    size = rest // known if isinstance(rest, int) and isinstance(known, int) else _divide(rest, known)
    return [size if isinstance(d, int) and d == -1 else d for d in target]


def _divide(rest: Any, known: Any) -> Any:
    return rest if isinstance(known, int) and known == 1 else tirx.floordiv(expression(rest), expression(known))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return not isinstance(a, int) and not isinstance(b, int) and a.same_as(b)


@converter("Transpose")
def _transpose(importer: Importer, args: list[Any], attributes: dict[str, Any], outputs: int) -> list[Any]:
    x = args[0]
    if isinstance(x, WeightUse) and x.spec.layout in (Layout.ROWS, Layout.LINEAR, Layout.ROUTER, Layout.GROUPED_LINEAR):
        return [x]
    return [importer.builder.emit(R.permute_dims(importer.tensor(x), list(attributes["perm"])))]


@converter("Unsqueeze")
def _unsqueeze(importer: Importer, args: list[Any], attributes: dict[str, Any], outputs: int) -> list[Any]:
    shape = as_shape(args[0])
    if shape is not None and shape.scalar:
        return [Shape(shape)]
    dims, axes = dims_of(args[0]), integers(args[1])
    rank = len(dims) + len(axes)
    inserted = {a % rank for a in axes}
    rest = iter(dims)
    return [_reshaped(importer, args[0], [1 if i in inserted else next(rest) for i in range(rank)])]


@converter("Squeeze")
def _squeeze(importer: Importer, args: list[Any], attributes: dict[str, Any], outputs: int) -> list[Any]:
    shape = as_shape(args[0])
    if shape is not None:
        return [Shape(shape, scalar=True)]
    dims = dims_of(args[0])
    axes = integers(args[1]) if len(args) > 1 else [i for i, d in enumerate(dims) if isinstance(d, int) and d == 1]
    dropped = {a % len(dims) for a in axes}
    return [_reshaped(importer, args[0], [d for i, d in enumerate(dims) if i not in dropped])]


@converter("Expand")
def _expand(importer: Importer, args: list[Any], attributes: dict[str, Any], outputs: int) -> list[Any]:
    dims, target = dims_of(args[0]), integers(args[1])
    # ONNX broadcasts both ways: a 1 in the target keeps the input's dimension.
    missing = len(target) - len(dims)
    merged = [dims[i - missing] if i >= missing and isinstance(t, int) and t == 1 else t for i, t in enumerate(target)]
    return [importer.builder.emit(R.broadcast_to(importer.tensor(args[0]), [expression(d) for d in merged]))]


@converter("Slice")
def _slice(importer: Importer, args: list[Any], attributes: dict[str, Any], outputs: int) -> list[Any]:
    starts, ends = integers(args[1]), integers(args[2])
    shape = as_shape(args[0])
    if shape is not None:
        return [Shape(shape[starts[0] : ends[0]])]
    rank = len(dims_of(args[0]))
    axes = [a % rank for a in integers(args[3])] if len(args) > 3 else list(range(len(starts)))
    steps = integers(args[4]) if len(args) > 4 else [1] * len(starts)
    x = importer.tensor(args[0])
    return [importer.builder.emit(R.strided_slice(x, axes, starts, ends, steps, assume_inbound=False))]


@converter("Split")
def _split(importer: Importer, args: list[Any], attributes: dict[str, Any], outputs: int) -> list[Any]:
    axis = attributes.get("axis", 0)
    if isinstance(args[0], Parts) and axis in (-1, len(dims_of(args[0])) - 1) and args[0].sizes == integers(args[1]):
        return list(args[0].tensors)
    bounds = np.cumsum(integers(args[1]))[:-1].tolist() if len(args) > 1 and args[1] is not None else outputs
    parts = importer.builder.emit(R.split(importer.tensor(args[0]), bounds, axis))
    return [importer.builder.emit(relax.TupleGetItem(parts, i)) for i in range(outputs)]


def _arithmetic(symbolic: Callable[[Any, Any], Any], tensor: Callable[[Any, Any], Any]) -> Converter:
    def convert(importer: Importer, args: list[Any], attributes: dict[str, Any], outputs: int) -> list[Any]:
        a, b = as_shape(args[0]), as_shape(args[1])
        if a is not None and b is not None:
            size = max(len(a), len(b))
            wide = [list(s) * size if len(s) == 1 else list(s) for s in (a, b)]
            values = [symbolic(x, y) for x, y in zip(*wide, strict=True)]
            return [Shape(values, scalar=a.scalar and b.scalar)]
        return [importer.builder.emit(tensor(*(_tensor_or_shape(importer, v) for v in args)))]

    return convert


def _tensor_or_shape(importer: Importer, value: Any) -> Any:
    if isinstance(value, Shape) and all(isinstance(d, int) for d in value):
        return relax.const(np.array(value[0] if value.scalar else list(value)), "int64")
    return importer.tensor(value)


def _floor_divide(a: Any, b: Any) -> Any:
    return a // b if isinstance(a, int) and isinstance(b, int) else tirx.floordiv(expression(a), expression(b))


CONVERTERS.update(
    Add=_arithmetic(operator.add, R.add),
    Sub=_arithmetic(operator.sub, R.subtract),
    Mul=_arithmetic(operator.mul, R.multiply),
    Div=_arithmetic(_floor_divide, R.divide),
)


def _elementwise(function: Callable[[Any], Any]) -> Converter:
    def convert(importer: Importer, args: list[Any], attributes: dict[str, Any], outputs: int) -> list[Any]:
        return [importer.builder.emit(function(importer.tensor(args[0])))]

    return convert


CONVERTERS.update(
    Sigmoid=_elementwise(R.sigmoid),
    Sqrt=_elementwise(R.sqrt),
    Neg=_elementwise(R.negative),
    Exp=_elementwise(R.exp),
    Softplus=_elementwise(R.nn.softplus),
    Identity=lambda importer, args, attributes, outputs: [args[0]],
)


def _clip(importer: Importer, args: list[Any], attributes: dict[str, Any], outputs: int) -> list[Any]:
    x = importer.tensor(args[0])
    for bound, apply in zip([*args[1:], None, None][:2], (R.maximum, R.minimum), strict=True):
        if bound is not None:
            x = importer.builder.emit(apply(x, importer.tensor(bound)))
    return [x]


def _fold(apply: Callable[[Any, Any], Any]) -> Converter:
    def convert(importer: Importer, args: list[Any], attributes: dict[str, Any], outputs: int) -> list[Any]:
        tensors = [_tensor_or_shape(importer, a) for a in args]
        return [reduce(lambda x, y: importer.builder.emit(apply(x, y)), tensors)]

    return convert


CONVERTERS.update(Clip=_clip, Min=_fold(R.minimum), Max=_fold(R.maximum))


def _add(importer: Importer, args: list[Any], attributes: dict[str, Any], outputs: int) -> list[Any]:
    """Add: a kernel of the target, where it has one, for two activations of one shape."""
    kernels, dims = importer.kernels, dims_of(args[0])
    activations = all(isinstance(a, relax.Expr) and str(a.ty.dtype) == "float32" for a in args)
    alike = activations and len(dims) == len(dims_of(args[1]))
    if not (alike and isinstance(kernels, Adds) and all(map(_same, dims, dims_of(args[1])))):
        return _ADD(importer, args, attributes, outputs)
    flats = [importer.rows(a, dims[-1])[0] for a in args]
    kernel = importer.kernel(kernels.add(dims[-1]), "Add", 2)
    out = importer.builder.emit(R.call_tir(kernel, flats, flats[0].ty))
    return [_reshaped(importer, out, dims)]


_ADD = CONVERTERS["Add"]
CONVERTERS |= {"Add": _add, "MatMul": products.matmul, "RMSNormalization": products.rms_norm}


def _float(importer: Importer, x: Any) -> Any:
    """Rows taken from a half-precision table, as float32."""
    return importer.builder.emit(R.astype(x, "float32")) if str(x.ty.dtype) in ("bfloat16", "float16") else x
