"""Weights as the CPU kernels read them: which packing each layout takes, and the shape that results."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import ml_dtypes
import numpy as np

from v4c.custom_ops import TensorSpec
from v4c.errors import UnsupportedError
from v4c.passes.relax.layouts import PAIRS, PRODUCT_LAYOUTS, TABLE_LAYOUTS, Layout, WeightSpec

from ..native_rows import NATIVE_GROUPS, NativeRows
from ..quantisation import QUANTISED
from .kernels.native_packing import (
    native_pack_gate_up,
    native_pack_rows,
    native_packed_gate_up_shape,
    native_packed_shape,
)
from .kernels.packing import PANEL, pack_gate_up, pack_rows, packed_gate_up_shape, packed_shape
from .kernels.pair_packing import (
    pair_pack_gate_up,
    pair_pack_rows,
    pair_packed_gate_up_shape,
    pair_packed_shape,
)
from .kernels.quant_packing import quant_pack_gate_up, quant_pack_rows, quant_packed_gate_up_shape, quant_packed_shape

_BY_ROWS = (Layout.LINEAR, Layout.ROUTER, Layout.EXPERTS_DOWN)
_NUMPY = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "int64": np.int64}

_Shape = Callable[[tuple[int, ...]], tuple[int, ...]]
_Packing = Callable[[np.ndarray], np.ndarray]


def packed(weight: WeightSpec) -> TensorSpec:
    """Shape and dtype of a weight after `pack`."""
    if weight.dtype in QUANTISED:
        bits = _bits(weight)
        by_rows, gate_up = partial(quant_packed_shape, bits=bits), partial(quant_packed_gate_up_shape, bits=bits)
        return TensorSpec(_packed_shape(weight, by_rows, gate_up), "uint8")
    if weight.dtype == PAIRS:
        return TensorSpec(_packed_shape(weight, pair_packed_shape, pair_packed_gate_up_shape), "uint8")
    if weight.dtype in NATIVE_GROUPS:
        by_rows = partial(native_packed_shape, dtype=weight.dtype)
        gate_up = partial(native_packed_gate_up_shape, dtype=weight.dtype)
        return TensorSpec(_packed_shape(weight, by_rows, gate_up), "uint8")
    return TensorSpec(_packed_shape(weight, packed_shape, packed_gate_up_shape), weight.dtype)


def _bits(weight: WeightSpec) -> int:
    """Bits per element of a quantised weight."""
    if weight.layout not in PRODUCT_LAYOUTS:
        raise UnsupportedError(
            f"weight {weight.name}: expected the matrix of a product for {weight.dtype}, found layout {weight.layout}"
        )
    return QUANTISED[weight.dtype]


def _packed_shape(weight: WeightSpec, by_rows: _Shape, gate_up: _Shape) -> tuple[int, ...]:
    """Shape of a packed weight, `by_rows` and `gate_up` the shapes of the two packings."""
    shape = weight.shape
    if weight.layout == Layout.LINEAR_KN:
        return by_rows((shape[1], shape[0]))
    if weight.layout == Layout.GROUPED_LINEAR:
        return by_rows((weight.groups, shape[0] // weight.groups, shape[1]))
    if weight.layout == Layout.GATE_UP:
        return gate_up(shape)
    if weight.layout in _BY_ROWS:
        if not weight.parts:
            return by_rows(shape)
        parts = [by_rows((rows, shape[-1])) for rows in weight.sizes]
        return (sum(part[0] for part in parts), *parts[0][1:])
    return shape


def pack_unit(weight: WeightSpec) -> int | None:
    """Rows at whose multiples each tensor of a weight may be cut, so that its slices can be packed by themselves.

    Packed slices one behind the other are the packed weight. None where it can be packed as a whole only.
    """
    if weight.layout == Layout.GROUPED_LINEAR:
        return weight.shape[0] // weight.groups
    if weight.layout in (Layout.GATE_UP, Layout.EXPERTS_DOWN) and len(weight.shape) == 3:
        return 1
    if weight.layout in _BY_ROWS and len(weight.shape) == 2:
        return PANEL
    return 1 if weight.layout in (Layout.PLAIN, *TABLE_LAYOUTS) else None


def _pack_native(weight: WeightSpec, rows: NativeRows) -> np.ndarray:
    """FP8 or FP4 rows packed."""
    if weight.layout == Layout.GROUPED_LINEAR:
        return native_pack_rows(rows.reshaped(weight.groups, weight.shape[0] // weight.groups), weight.dtype)
    if weight.layout == Layout.GATE_UP:
        return native_pack_gate_up(rows, weight.dtype)
    parts = rows.split(weight.sizes) if weight.parts else [rows]
    return np.concatenate([native_pack_rows(part, weight.dtype) for part in parts])


def pack(weight: WeightSpec, array: np.ndarray | NativeRows) -> np.ndarray:
    """A weight in its storage dtype and packed.

    Args:
        weight: what it is. Every part of a merged projection starts a panel of its own.
        array: of shape ``weight.shape`` and any float dtype (or int64); FP8 and FP4 as codes and scales.
    """
    if isinstance(array, NativeRows):
        return _pack_native(weight, array)
    if weight.dtype in QUANTISED:
        bits = _bits(weight)
        return _packed(weight, array, partial(quant_pack_rows, bits=bits), partial(quant_pack_gate_up, bits=bits))
    if weight.dtype == PAIRS:
        return _packed(weight, array, pair_pack_rows, pair_pack_gate_up)
    return _packed(weight, array.astype(_NUMPY[weight.dtype], copy=False), pack_rows, pack_gate_up)


def _packed(weight: WeightSpec, array: np.ndarray, by_rows: _Packing, gate_up: _Packing) -> np.ndarray:
    """A weight packed, `by_rows` and `gate_up` the two packings."""
    if weight.layout == Layout.LINEAR_KN:
        return by_rows(array.T)
    if weight.layout == Layout.GROUPED_LINEAR:
        return by_rows(array.reshape(weight.groups, -1, array.shape[1]))
    if weight.layout == Layout.GATE_UP:
        return gate_up(array)
    if weight.layout in _BY_ROWS:
        if not weight.parts:
            return by_rows(array)
        return np.concatenate([by_rows(a) for a in np.split(array, np.cumsum(weight.sizes)[:-1])])
    return np.ascontiguousarray(array)
