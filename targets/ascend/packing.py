"""Weights as the tile programs read them: half precision for products and tables, int32 for tables of integers.

Matrices lie as in checkpoints, ``[n, k]``: the cube transposes tiles on their way in.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from v4c.custom_ops import TensorSpec
from v4c.errors import UnsupportedError
from v4c.passes.relax.layouts import TABLE_LAYOUTS, Layout, WeightSpec

_NUMPY = {
    "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "int64": np.int64, "int32": np.int32,
}  # fmt: skip


def packed(weight: WeightSpec) -> TensorSpec:
    """Shape and dtype of a weight after `pack`."""
    shape = weight.shape
    if weight.layout == Layout.LINEAR_KN:
        shape = (shape[1], shape[0])
    elif weight.layout == Layout.GROUPED_LINEAR and weight.groups > 1:
        shape = (weight.groups, shape[0] // weight.groups, shape[1])
    elif weight.layout == Layout.CONVOLUTION:
        shape = (shape[1], shape[0])
    return TensorSpec(shape, _dtype(weight))


def _dtype(weight: WeightSpec) -> str:
    if weight.dtype == "int64":
        return "int32" if weight.layout in TABLE_LAYOUTS else "int64"
    return weight.dtype


def pack_unit(weight: WeightSpec) -> int | None:
    """Rows at whose multiples each tensor of a weight may be cut; None where it is packed as a whole only."""
    if weight.layout in (Layout.LINEAR_KN, Layout.CONVOLUTION):
        return None
    return weight.shape[0] // weight.groups if weight.layout == Layout.GROUPED_LINEAR else 1


def pack(weight: WeightSpec, array: np.ndarray) -> np.ndarray:
    """A weight of shape ``weight.shape`` in its storage dtype and layout.

    Raises:
        UnsupportedError: a number that float16 or int32 does not hold.
    """
    dtype = np.dtype(_NUMPY[_dtype(weight)])
    _check_range(weight, array, dtype)
    array = array.astype(dtype, copy=False)
    if weight.layout in (Layout.LINEAR_KN, Layout.CONVOLUTION):
        array = array.T
    elif weight.layout == Layout.GROUPED_LINEAR and weight.groups > 1:
        array = array.reshape(weight.groups, -1, array.shape[1])
    return np.ascontiguousarray(array)


def _check_range(weight: WeightSpec, array: np.ndarray, dtype: np.dtype) -> None:
    if array.dtype == dtype or not array.size or dtype.name not in ("float16", "int32"):
        return
    most = float(np.finfo(np.float16).max) if dtype == np.float16 else float(np.iinfo(np.int32).max)
    found = max(float(array.max()), -float(array.min()))
    if found > most:
        raise UnsupportedError(
            f"weight {weight.name}: expected magnitudes of at most {most:g} for {dtype.name}, found {found:g}"
        )
