"""Weights as the CPU kernels read them: which packing each layout takes, and the shape that results."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from v4c.custom_ops import TensorSpec
from v4c.passes.relax.layouts import Layout, WeightSpec

from .kernels.packing import PANEL, pack_gate_up, pack_rows, packed_gate_up_shape, packed_shape, panels

_BY_ROWS = (Layout.LINEAR, Layout.ROUTER, Layout.EXPERTS_DOWN)
_NUMPY = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "int64": np.int64}


def packed(weight: WeightSpec) -> TensorSpec:
    """Shape and dtype of a weight after `pack`."""
    shape = weight.shape
    if weight.layout == Layout.LINEAR_KN:
        shape = packed_shape((shape[1], shape[0]))
    elif weight.layout == Layout.GROUPED_LINEAR:
        shape = packed_shape((weight.groups, shape[0] // weight.groups, shape[1]))
    elif weight.layout == Layout.GATE_UP:
        shape = packed_gate_up_shape(shape)
    elif weight.layout in _BY_ROWS:
        count = sum(panels(rows) for rows in weight.sizes) if weight.parts else panels(shape[-2])
        shape = (*shape[:-2], count, shape[-1], PANEL)
    return TensorSpec(shape, weight.dtype)


def pack(weight: WeightSpec, array: np.ndarray) -> np.ndarray:
    """A weight in its storage dtype and packed.

    Args:
        weight: what it is. Every part of a merged projection starts a panel of its own.
        array: of shape ``weight.shape`` and any float dtype (or int64).
    """
    array = array.astype(_NUMPY[weight.dtype], copy=False)
    if weight.layout == Layout.LINEAR_KN:
        return pack_rows(array.T)
    if weight.layout == Layout.GROUPED_LINEAR:
        return pack_rows(array.reshape(weight.groups, -1, array.shape[1]))
    if weight.layout == Layout.GATE_UP:
        return pack_gate_up(array)
    if weight.layout in _BY_ROWS:
        if not weight.parts:
            return pack_rows(array)
        return np.concatenate([pack_rows(a) for a in np.split(array, np.cumsum(weight.sizes)[:-1])])
    return np.ascontiguousarray(array)
