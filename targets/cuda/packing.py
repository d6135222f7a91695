"""How weights lie in device memory: every matrix by rows of its inputs, as the kernels copy them 16 bytes at a time."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from v4c.custom_ops import TensorSpec
from v4c.errors import UnsupportedError
from v4c.passes.relax.layouts import PRODUCT_LAYOUTS, TABLE_LAYOUTS, Layout, WeightSpec

from ..native_rows import NativeRows
from . import coded_rows

_NUMPY = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "int64": np.int64}
_BY_ROWS = (
    Layout.PLAIN, *TABLE_LAYOUTS, Layout.LINEAR, Layout.ROUTER, Layout.GATE_UP, Layout.EXPERTS_DOWN,
    Layout.GROUPED_LINEAR,
)  # fmt: skip


def packed(weight: WeightSpec) -> TensorSpec:
    """Shape and dtype of a weight after `pack`.

    Raises:
        UnsupportedError: a storage dtype that no kernel of this target reads.
    """
    shape = weight.shape[::-1] if weight.layout == Layout.LINEAR_KN else weight.shape
    if weight.dtype in coded_rows.CTYPES:
        if weight.layout not in PRODUCT_LAYOUTS:
            raise UnsupportedError(
                f"weight {weight.name}: expected the matrix of a product for {weight.dtype}, "
                f"found layout {weight.layout}"
            )
        return TensorSpec((*shape[:-1], coded_rows.row_bytes(int(shape[-1]), weight.dtype)), "uint8")
    if weight.dtype not in _NUMPY:
        raise UnsupportedError(
            f"weight {weight.name}: expected {', '.join((*_NUMPY, *coded_rows.CTYPES))} for target cuda, "
            f"found {weight.dtype}"
        )
    return TensorSpec(shape, weight.dtype)


def pack(weight: WeightSpec, array: np.ndarray | NativeRows) -> np.ndarray:
    """A weight in its storage dtype.

    Args:
        weight: what it is.
        array: of shape ``weight.shape`` and any float dtype (or int64); FP8 and FP4 as codes and scales.
    """
    if isinstance(array, NativeRows):
        return coded_rows.pack_published(array, weight.shape[-1], weight.dtype)
    array = array.T if weight.layout == Layout.LINEAR_KN else array
    if weight.dtype in coded_rows.CTYPES:
        return coded_rows.pack_quantised(array, weight.dtype)
    return np.ascontiguousarray(array.astype(_NUMPY[weight.dtype], copy=False))


def pack_unit(weight: WeightSpec) -> int | None:
    """Rows at whose multiples a weight may be cut to be packed in slices: any, but of a matrix that is turned."""
    if weight.layout == Layout.GROUPED_LINEAR:
        return weight.shape[0] // weight.groups
    return 1 if weight.layout in _BY_ROWS else None
