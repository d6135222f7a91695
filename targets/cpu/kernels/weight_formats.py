"""What the loops of projections and experts need to know about how weights are stored: one class per kind of storage.

A format says what a packed panel looks like and multiplies a block of rows with it. The reduction is counted in steps:
a step is one input of float weights and one group of quantised ones.
"""

# mypy: ignore-errors
# (TVMScript: the macros below are parsed by TVM, not run by Python.)

from __future__ import annotations

from math import gcd
from typing import Any

from tvm.script import tirx as T

from v4c.passes.relax.layouts import PAIRS

from ...native_rows import NATIVE_GROUPS
from ...quantisation import QUANTISED, groups
from ..schedule import PanelSchedule
from .fp8_product import fp8_panel_product
from .native_packing import BLOCK_BYTES
from .packing import PANEL
from .pair_packing import STEP_BYTES, pairs
from .pair_product import pair_panel_product, paired_rows, round_row
from .panel_product import panel_product
from .quant_product import QuantisedRows, StoredBlocks, quant_panel_product, quantise_row, quantised_rows

SERIAL_INPUTS = 1 << 14
"""Rows of together up to this many elements are prepared by one thread: starting the others would take longer."""


class FloatFormat:
    """Weights of `k` inputs in float32 or bfloat16 (widened in registers); rows are read as they are.

    Attributes:
        dtype: of the packed weight.
        panel_shape: shape of one panel, ``(k, PANEL)``.
        steps: of the whole reduction.
        step_bytes: bytes of a panel that a step takes, in the cache.
        row_block: rows of the largest block that `multiply` is to be used with (`panel_product.row_blocks`).
        multiply: macro ``(sums, x, row_at, weight, panel, start, stop, rows, cold)``, as `panel_product`, from step
            `start` to `stop`; `cold` says that these are the first rows that read the panel.
    """

    quantised = False

    def __init__(self, k: int, dtype: str, schedule: PanelSchedule) -> None:
        self.dtype = dtype
        self.panel_shape = (T.int64(k), T.int64(PANEL))
        self.steps, self.step_bytes, self.row_block = k, 4 * PANEL, schedule.row_block

        @T.macro
        def multiply(sums, x, row_at, weight, panel, start, stop, rows, cold):
            panel_product(
                sums, x, row_at, weight, panel, start, stop, rows, schedule.columns(rows),
                schedule.partial_sums(rows, k),
            )  # fmt: skip

        self.multiply = multiply

    def inputs(self, x: Any, rows: Any) -> Any:
        """What `multiply` reads `rows` rows from: here `x` itself."""
        return x


class FP8Format:
    """Published FP8 weights of `k` inputs, widened in registers; rows are read as they are. Attributes as above."""

    quantised = False

    def __init__(self, k: int, schedule: PanelSchedule) -> None:
        steps, nbytes = -(-k // NATIVE_GROUPS["fp8"]), BLOCK_BYTES["fp8"]
        self.dtype = "uint8"
        self.panel_shape = (T.int64(steps), T.int64(nbytes))
        self.steps, self.step_bytes, self.row_block = steps, nbytes, schedule.row_block

        @T.macro
        def multiply(sums, x, row_at, weight, panel, start, stop, rows, cold):
            fp8_panel_product(
                sums, x, row_at, weight, panel, start, stop, rows, schedule.columns(rows),
                schedule.partial_sums(rows, gcd(k, NATIVE_GROUPS["fp8"])), k,
            )  # fmt: skip

        self.multiply = multiply

    def inputs(self, x: Any, rows: Any) -> Any:
        """What `multiply` reads `rows` rows from: here `x` itself."""
        return x


class PairFormat:
    """Weights of `k` inputs in bfloat16, in pairs of inputs (`pair_packing`); rows are rounded to bfloat16 first.

    Attributes:
        dtype, panel_shape, steps, step_bytes, row_block, multiply: as of `FloatFormat`; a step is a pair of inputs, and
            the x of `multiply` is `paired_rows`.
        quantise: macro ``(x, words, row)``: round one row of ``[rows, >= k]`` float32.
    """

    quantised = True

    def __init__(self, k: int, dots: bool, schedule: PanelSchedule) -> None:
        self.k = k
        self.dtype = "uint8"
        self.panel_shape = (T.int64(pairs(k)), T.int64(STEP_BYTES))
        self.steps, self.step_bytes, self.row_block = pairs(k), STEP_BYTES, schedule.row_block

        @T.macro
        def multiply(sums, x, row_at, weight, panel, start, stop, rows, cold):
            pair_panel_product(
                sums, x, row_at, weight, panel, start, stop, rows, schedule.columns(rows),
                schedule.partial_sums(rows, pairs(k)), dots,
            )  # fmt: skip

        @T.macro
        def quantise(x, words, row):
            round_row(x, words, row, k)

        self.multiply, self.quantise = multiply, quantise

    def inputs(self, x: Any, rows: Any) -> Any:
        """Memory that `quantise` fills with `rows` rows of `x`."""
        return paired_rows(rows, self.k)


class QuantFormat:
    """Weights of `k` inputs as `quant_packing` or, of FP4, `native_packing` has them; rows are quantised first.

    Attributes:
        dtype, panel_shape, steps, step_bytes, row_block, multiply: as of `FloatFormat`; the x of `multiply` is
            `QuantisedRows`.
        quantise: macro ``(x, quantised, row)``: quantise one row of ``[rows, >= k]`` float32.
    """

    quantised = True

    def __init__(self, k: int, dtype: str, dots: bool, schedule: PanelSchedule) -> None:
        stored = StoredBlocks.of(dtype)
        self.k = k
        self.dtype = "uint8"
        self.panel_shape = (T.int64(groups(k)), T.int64(stored.nbytes))
        self.steps, self.step_bytes, self.row_block = groups(k), stored.nbytes, schedule.row_block

        @T.macro
        def multiply(sums, x, row_at, weight, panel, start, stop, rows, cold):
            quant_panel_product(sums, x, row_at, weight, panel, start, stop, rows, cold, stored, dots)

        @T.macro
        def quantise(x, quantised, row):
            quantise_row(x, quantised, row, k, stored.offset)

        self.multiply, self.quantise = multiply, quantise

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


StoredFormat = FloatFormat | FP8Format | PairFormat | QuantFormat


def weight_format(k: int, dtype: str, dots: bool, schedule: PanelSchedule) -> StoredFormat:
    """The format of weights with `k` inputs.

    Args:
        k: inputs.
        dtype: what they are stored as: float32, bfloat16, fp8, fp4, int8, int4, or bf16_pairs.
        dots: whether the target has the instruction that sums up products of these weights with rows of few bits:
            AVX512-VNNI for integers and FP4, AVX512-BF16 for pairs of bfloat16; of no account for the others.
        schedule: register blocks.
    """
    if dtype == "fp8":
        return FP8Format(k, schedule)
    if dtype == PAIRS:
        return PairFormat(k, dots, schedule)
    return QuantFormat(k, dtype, dots, schedule) if dtype in (*QUANTISED, "fp4") else FloatFormat(k, dtype, schedule)
