"""What the loops of projections and experts need to know about how weights are stored: one class per kind of storage.

A format says what a packed panel looks like and multiplies a block of rows with it. The reduction is counted in steps:
a step is one input of float weights and one group of quantised ones.
"""

# mypy: ignore-errors
# (TVMScript: the macros below are parsed by TVM, not run by Python.)

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from .packing import PANEL
from .panel_product import VECTORS, panel_product, sums_per_output
from .quant_packing import OFFSET, QUANTISED, block_bytes, groups
from .quant_product import QuantisedRows, quant_panel_product, quantise_row, quantised_rows

BLOCK_BYTES = 1 << 17
"""Bytes of a panel per reduction block: they stay in a core's L2 cache while blocks of rows pass over them."""

K_BLOCK = BLOCK_BYTES // (4 * PANEL)
"""Inputs per reduction block of float weights."""

SERIAL_INPUTS = 1 << 14
"""Rows of together up to this many elements are prepared by one thread: starting the others would take longer."""


class FloatFormat:
    """Weights of `k` inputs in float32 or bfloat16 (widened in registers); rows are read as they are.

    Attributes:
        dtype: of the packed weight.
        panel_shape: shape of one panel, ``(k, PANEL)``.
        steps, block: steps of the whole reduction, and of a block that stays in the cache.
        multiply: macro ``(sums, x, row_at, weight, panel, start, stop, rows, cold)``, as `panel_product`; `cold` says
            that these are the first rows that read the panel.
    """

    quantised = False

    def __init__(self, k: int, dtype: str) -> None:
        self.dtype = dtype
        self.panel_shape = (T.int64(k), T.int64(PANEL))
        self.steps, self.block = k, K_BLOCK

        @T.macro
        def multiply(sums, x, row_at, weight, panel, start, stop, rows, cold):
            panel_product(sums, x, row_at, weight, panel, start, stop, rows, sums_per_output(rows, k))

        self.multiply = multiply

    def sums(self, rows: int) -> int:
        """Vectors of float32 that `multiply` needs for a block of `rows` rows; results are in the first of them."""
        return rows * sums_per_output(rows, self.steps) * VECTORS

    def inputs(self, x: Any, rows: Any) -> Any:
        """What `multiply` reads `rows` rows from: here `x` itself."""
        return x


class QuantFormat:
    """Weights of `k` inputs as `quant_packing` has them; rows are quantised before they are multiplied.

    Attributes:
        dtype, panel_shape, steps, block, multiply: as of `FloatFormat`; the x of `multiply` is `QuantisedRows`.
        quantise: macro ``(x, quantised, row)``: quantise one row of ``[rows, >= k]`` float32.
    """

    quantised = True

    def __init__(self, k: int, bits: int, vnni: bool) -> None:
        self.k = k
        self.dtype = "uint8"
        self.panel_shape = (T.int64(groups(k)), T.int64(block_bytes(bits)))
        self.steps, self.block = groups(k), BLOCK_BYTES // block_bytes(bits)

        @T.macro
        def multiply(sums, x, row_at, weight, panel, start, stop, rows, cold):
            quant_panel_product(sums, x, row_at, weight, panel, start, stop, rows, cold, bits, vnni)

        @T.macro
        def quantise(x, quantised, row):
            quantise_row(x, quantised, row, k, OFFSET[bits])

        self.multiply, self.quantise = multiply, quantise

    def sums(self, rows: int) -> int:
        return rows * VECTORS

    def inputs(self, x: Any, rows: Any) -> QuantisedRows:
        """Memory that `quantise` fills with `rows` rows of `x`."""
        return quantised_rows(rows, self.k)


@T.macro
def each_row(body, rows, k):
    """``body(row)`` for every row of `k` elements: few by one thread, more by all."""
    if rows <= SERIAL_INPUTS // k:
        for row in range(rows):
            body(row)
    else:
        for row in T.parallel(rows):
            body(row)


@T.macro
def quantise_rows(stored, x, inputs, rows, k):
    """Fill ``inputs = stored.inputs(x, rows)``, where that is not `x` itself."""
    if stored.quantised:

        @T.inline
        def quantise(row):
            stored.quantise(x, inputs, row)

        each_row(quantise, rows, k)


def weight_format(k: int, dtype: str, vnni: bool) -> FloatFormat | QuantFormat:
    """The format of weights with `k` inputs that are stored as `dtype`: float32, bfloat16, int8 or int4."""
    return QuantFormat(k, QUANTISED[dtype], vnni) if dtype in QUANTISED else FloatFormat(k, dtype)
