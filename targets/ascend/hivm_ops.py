"""Semantics of HIVM's own operations: moves between memories, vector operations on the UB, products of the cube.

Each is a function of its operand groups (``operandSegmentSizes``) that writes into its outputs. An attribute that is
not understood is an error, never ignored.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .hivm_memory import Buffer, HIVMError
from .hivm_scalars import UNARY
from .mlir_text import Operation, integers, keyword, string

Groups = list[list[Any]]
Effect = Callable[[Groups], None]

PIPES = {"load": "PIPE_MTE2", "nd2nz": "PIPE_MTE2", "store": "PIPE_MTE3", "mmadL1": "PIPE_M", "fixpipe": "PIPE_FIX"}
"""The pipe an operation runs on; vector operations run on PIPE_V, a copy on that of its target."""

IGNORED = frozenset(
    {"set_mask_norm", "set_ctrl", "set_ffts_base_addr", "pipe_barrier", "init_debug", "finish_debug", "dcci"}
)
"""Operations without effect on values; `hivm_simulator` looks at PIPE_ALL barriers itself."""


def pipe(operation: Operation) -> str:
    name = operation.name.removeprefix("hivm.hir.")
    if name == "copy":
        return "PIPE_MTE3" if "address_space<cbuf>" in operation.operand_types[1] else "PIPE_V"
    return PIPES.get(name, "PIPE_V")


def _value(operand: Any) -> Any:
    return operand.view() if isinstance(operand, Buffer) else operand


def _write(target: Buffer, value: Any) -> None:
    view = target.view()
    value = np.asarray(value)
    if value.ndim > view.ndim or (value.ndim and value.shape != view.shape and value.size == view.size):
        value = value.reshape(view.shape)
    with np.errstate(all="ignore"):
        view[...] = value.astype(view.dtype, copy=False)


def _check(operation: Operation, known: str, **expected: str) -> None:
    """Refuses attributes beyond `known` names and `expected` values."""
    unknown = set(operation.attributes) - set(known.split()) - set(expected) - _HARMLESS
    wrong = [k for k, v in expected.items() if operation.attributes.get(k, v) != v]
    if unknown or wrong:
        name = sorted(unknown or wrong)[0]
        raise HIVMError(f"{operation.name} with {name} = {operation.attributes[name]}")


_HARMLESS = {
    "operandSegmentSizes",
    "tcoretype",
    "eviction_policy",
    "inserted-load",
    "inserted-store",
    "inserted-copy",
    "tiled_op",
    "may_implicit_transpose_with_last_axis",
    "already_set_real_mkn",
    "fixpipe_for_result_already_inserted",
    "normalized_in_L0C",
    "hivm.remain_in_l0c",
    "dst_continuous",
    "to_be_bubbled_slice",
    "enable_saturate",
    "unsigned_mode",
}


def _move(operation: Operation) -> Effect:
    """load, store, copy. A load may pad each row to a whole 32-byte block with a value."""
    expected = {"init_out_buffer": "false", "pad_mode": "#hivm.padmode<PadValue>"}
    _check(operation, "", may_implicit_transpose_with_last_axis="false", **expected)

    def run(groups: Groups) -> None:
        if len(groups) > 1:
            (source,), (target,), *rest = groups
        else:
            (source, target), rest = groups[0], []
        # Of a load: the value to pad with, elements to pad on the left and on the right, a condition.
        padding, *others = rest or [[]]
        if any(value for group in others for value in group):
            raise HIVMError(f"{operation.name} with padding {others}")
        _write(target, source.view())
        if padding:
            _pad_rows(target, padding[0])

    return run


def _pad_rows(target: Buffer, value: Any) -> None:
    block = 32 // target.base.itemsize
    if not target.shape or 0 in target.shape or target.strides[-1] != 1:
        return
    for place in np.ndindex(target.shape[:-1]):
        start = target.offset + sum(i * s for i, s in zip(place, target.strides, strict=False))
        end = start + target.shape[-1]
        target.base[end : -(-end // block) * block] = value


_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "vadd": lambda a, b: a + b,
    "vsub": lambda a, b: a - b,
    "vmul": lambda a, b: a * b,
    "vmax": np.maximum,
    "vmin": np.minimum,
    "vand": lambda a, b: a & b,
    "vor": lambda a, b: a | b,
    "vxor": lambda a, b: a ^ b,
    "vpow": np.power,
    "vshl": lambda a, b: a << b,
    "vshr": lambda a, b: a >> b,
}
_UNARY: dict[str, Callable[[Any], Any]] = {
    "vexp": np.exp,
    "vln": np.log,
    "vsqrt": np.sqrt,
    "vrsqrt": UNARY["rsqrt"],
    "vrec": lambda a: 1 / a,
    "vabs": np.abs,
    "vrelu": lambda a: np.maximum(a, 0),
    "vnot": lambda a: ~a,
    "vsin": np.sin,
    "vcos": np.cos,
    "vtanh": np.tanh,
    "verf": UNARY["erf"],
}
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
_ROUND: dict[str, Callable[[Any], Any]] = {
    "rint": np.rint,
    "round": lambda a: np.copysign(np.floor(np.abs(a) + 0.5), a),
    "floor": np.floor,
    "ceil": np.ceil,
    "trunc": np.trunc,
}
_REDUCE: dict[str, Callable[..., Any]] = {
    "sum": np.sum,
    "max": np.max,
    "min": np.min,
    "prod": np.prod,
    "any": np.any,
    "all": np.all,
}


def _divide(a: Any, b: Any) -> Any:
    if np.asarray(a).dtype.kind in "iu" and np.asarray(b).dtype.kind in "iu":
        quotient = np.abs(a) // np.where(b == 0, 1, np.abs(b))
        return np.where((a < 0) == (b < 0), quotient, -quotient)
    return a / b


def _elementwise(operation: Operation, function: Callable[..., Any]) -> Effect:
    # Extents of 1 in the operands are what `broadcast` says once more.
    _check(operation, "broadcast compare_mode", transpose="array<i64>")

    def run(groups: Groups) -> None:
        inputs, (target, *_) = groups[0], groups[1]
        with np.errstate(all="ignore"):
            _write(target, function(*map(_value, inputs)))

    return run


def _cast(operation: Operation) -> Effect:
    _check(operation, "broadcast round_mode cast is_unsigned", transpose="array<i64>")
    mode = keyword(operation.attributes.get("round_mode", "#hivm.round_mode<rint>"))
    if "unsigned" in operation.attributes.get("cast", ""):
        raise HIVMError(f"{operation.name} of unsigned integers")

    def run(groups: Groups) -> None:
        (source,), (target,) = groups[0], groups[1]
        value, dtype = source.view(), target.base.dtype
        if value.dtype.kind not in "iub" and dtype.kind in "iu":
            if mode not in _ROUND:
                raise HIVMError(f"{operation.name} with round_mode {mode}")
            limits = np.iinfo(dtype)
            rounded = _ROUND[mode](value.astype(np.float64))
            value = np.nan_to_num(np.clip(rounded, limits.min, limits.max))
        elif mode not in ("rint", "trunc") or (mode == "trunc" and dtype.itemsize < value.itemsize):
            raise HIVMError(f"{operation.name} from {value.dtype} to {dtype} with round_mode {mode}")
        _write(target, value)

    return run


def _reduce(operation: Operation) -> Effect:
    _check(operation, "arith reduce_dims tie_break_left unsigned_src")
    kind, axes = keyword(operation.attributes["arith"]), tuple(integers(operation.attributes["reduce_dims"]))
    if kind not in _REDUCE:
        raise HIVMError(f"{operation.name} <{kind}>")

    def run(groups: Groups) -> None:
        (source,), (target,) = groups[0], groups[1]
        value = source.view()
        accumulate = {"dtype": value.dtype} if kind in ("sum", "prod") else {}
        with np.errstate(all="ignore"):
            _write(target, _REDUCE[kind](value, axis=axes, keepdims=True, **accumulate))

    return run


def _broadcast(operation: Operation) -> Effect:
    _check(operation, "broadcast_dims")

    def run(groups: Groups) -> None:
        if len(groups) > 1:
            source, target = groups[0][0], groups[1][0]
        else:
            source, target = groups[0][:2]
        _write(target, np.broadcast_to(_value(source), target.shape))

    return run


def _interleave(operation: Operation) -> Effect:
    _check(operation, "", interleave_channel_nums="2 : i64")

    def run(groups: Groups) -> None:
        parts = [source.view() for source in groups[0]]
        _write(groups[1][0], np.stack(parts, axis=-1).reshape(groups[1][0].shape))

    return run


def _deinterleave(operation: Operation) -> Effect:
    _check(operation, "index_mode", channel_num="2 : i64")
    mode = keyword(operation.attributes.get("index_mode", "<ALL_CHANNELS>"))

    def run(groups: Groups) -> None:
        source, *targets = [value for group in groups for value in group][: 2 if mode[-1].isdigit() else 3]
        channels = [int(mode[-1])] if mode[-1].isdigit() else [0, 1]
        for target, channel in zip(targets, channels, strict=True):
            _write(target, source.view()[..., channel::2])

    return run


def _transpose(operation: Operation) -> Effect:
    _check(operation, "permutation", disable_align="false")
    order = integers(operation.attributes["permutation"])

    def run(groups: Groups) -> None:
        operands = [value for group in groups for value in group]
        _write(operands[1], operands[0].view().transpose(order))

    return run


def _sort(operation: Operation) -> Effect:
    """Values, and their places where a second output stands; equal values keep their order."""
    _check(operation, "descending sort_axis")
    descending = operation.attributes.get("descending") == "true"
    axis = int(operation.attributes["sort_axis"].split(" ")[0])

    def run(groups: Groups) -> None:
        value = groups[0][0].view()
        order = np.argsort(-value if descending else value, axis=axis, kind="stable")
        _write(groups[1][0], np.take_along_axis(value, order, axis))
        if len(groups[1]) > 1:
            _write(groups[1][1], order)

    return run


def _arange(operation: Operation) -> Effect:
    _check(operation, "")

    def run(groups: Groups) -> None:
        numbers = [v for group in groups for v in group if not isinstance(v, Buffer)]
        target = next(v for group in groups for v in group if isinstance(v, Buffer))
        steps = numbers[-len(target.shape) :]
        start = numbers[0] if len(numbers) > len(steps) else 0
        _write(target, start + sum(i * s for i, s in zip(np.indices(target.shape), steps, strict=True)))

    return run


def _to_fractals(operation: Operation) -> Effect:
    """nd2nz: ``[R, C]`` into ``[C / c, R / 16, 16, c]``, c elements to 32 bytes; what lies beyond stays."""
    _check(operation, "", init_out_buffer="false")

    def run(groups: Groups) -> None:
        source, target = groups[0][0].view(), groups[1][0].view()
        if any(groups[2:]):
            raise HIVMError(f"{operation.name} with padding")
        _write_fractals(source, target, operation.name)

    return run


def _write_fractals(matrix: np.ndarray, target: np.ndarray, name: str) -> None:
    columns, rows, height, width = target.shape
    if matrix.ndim != 2 or matrix.shape[0] > rows * height or matrix.shape[1] > columns * width:
        raise HIVMError(f"{name}: a matrix {matrix.shape} into fractals {target.shape}")
    whole = target.transpose(1, 2, 0, 3).reshape(rows * height, columns * width)
    whole[: matrix.shape[0], : matrix.shape[1]] = matrix
    target[...] = whole.reshape(rows, height, columns, width).transpose(2, 0, 1, 3)


def _from_fractals(fractals: np.ndarray) -> np.ndarray:
    columns, rows, height, width = fractals.shape
    return fractals.transpose(1, 2, 0, 3).reshape(rows * height, columns * width)


def _product(operation: Operation) -> Effect:
    """mmadL1: ``c = a @ b`` or ``c += a @ b`` over fractals; operands a, b, whether to start at zero, m, k, n, c."""
    _check(operation, "a_transpose b_transpose normalize_matmul_counter")
    turned_a, turned_b = "a_transpose" in operation.attributes, "b_transpose" in operation.attributes

    def run(groups: Groups) -> None:
        (a,), (b,), (starts,), (m,), (k,), (n,), (c,), _, bias, *_ = groups
        if bias:
            raise HIVMError(f"{operation.name} with a bias")
        left, right = _from_fractals(a.view()), _from_fractals(b.view())
        left, right = (left.T if turned_a else left)[:m, :k], (right.T if turned_b else right)[:k, :n]
        target = c.view()
        if left.shape != (m, k) or right.shape != (k, n):
            raise HIVMError(f"{operation.name}: [{m}, {k}] @ [{k}, {n}] from {left.shape} and {right.shape}")
        wide = np.int32 if target.dtype.kind == "i" else np.float32
        with np.errstate(all="ignore"):
            result = left.astype(wide) @ right.astype(wide)
            if not starts:
                result = result + _from_fractals(target)[:m, :n]
        _write_fractals(result.astype(target.dtype), target, operation.name)

    return run


def _fixpipe(operation: Operation) -> Effect:
    """From the cube's accumulator to rows in global memory, or to both vector cores' UB (``dual_dst_mode``)."""
    _check(operation, "dual_dst_mode pre_quant pre_relu", dma_mode="#hivm.dma_mode<nz2nd>")
    if keyword(operation.attributes.get("pre_relu", "<NO_RELU>")).upper() != "NO_RELU":
        raise HIVMError(f"{operation.name} with pre_relu")
    split = keyword(operation.attributes.get("dual_dst_mode", "<NO_DUAL>"))
    if split not in ("NO_DUAL", "ROW_SPLIT", "COLUMN_SPLIT"):
        raise HIVMError(f"{operation.name} with dual_dst_mode {split}")

    def run(groups: Groups) -> None:
        source, (target,) = _from_fractals(groups[0][0].view()), groups[1]
        targets = target if isinstance(target, tuple) else (target,)  # one UB per vector core
        if any(groups[2:]):
            raise HIVMError(f"{operation.name} with scales")
        rows, columns = (*targets[0].shape, 1)[:2]
        for i, target in enumerate(targets):
            top = i * rows if split == "ROW_SPLIT" else 0
            left = i * columns if split == "COLUMN_SPLIT" else 0
            _write(target, source[top : top + rows, left : left + columns])

    return run


def effect(operation: Operation) -> Effect | None:
    """What a ``hivm.hir`` operation does, or None where it is not one this file knows."""
    name = operation.name.removeprefix("hivm.hir.")
    if name in ("load", "store", "copy"):
        return _move(operation)
    if name in _UNARY:
        return _elementwise(operation, _UNARY[name])
    if name in _BINARY:
        return _elementwise(operation, _BINARY[name])
    if name == "vdiv":
        return _elementwise(operation, _divide)
    if name == "vsel":
        return _elementwise(operation, lambda c, a, b: np.where(c, a, b))
    if name == "vcmp":
        mode = keyword(operation.attributes.get("compare_mode", "#hivm.compare_mode<eq>"))
        return _elementwise(operation, _COMPARE[mode])
    special: dict[str, Callable[[Operation], Effect]] = {
        "vcast": _cast,
        "vreduce": _reduce,
        "vbrc": _broadcast,
        "vtranspose": _transpose,
        "vinterleave": _interleave,
        "vdeinterleave": _deinterleave,
        "vsort": _sort,
        "varange": _arange,
        "nd2nz": _to_fractals,
        "mmadL1": _product,
        "fixpipe": _fixpipe,
    }
    return special[name](operation) if name in special else None


def callee(operation: Operation) -> str:
    """The function a ``func.call`` calls."""
    return re.sub(r"^@", "", string(operation.attributes["callee"]))
