"""Products of bfloat16 weights with rows rounded to bfloat16, two inputs at a time; sums are float32.

A product of two bfloat16 numbers is exact in float32, so only the rounding of the rows and the order of sums differ
from products with float32 rows. With AVX512-BF16 one instruction multiplies and adds 32 pairs, twice as many as a
float32 multiply-add does; elsewhere the halves of each word are widened in registers.
"""

# mypy: ignore-errors
# (TVMScript: the macros below are parsed by TVM, not run by Python.)

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from .common import VECTOR
from .packing import PANEL
from .pair_packing import pairs
from .row_formats import bfloat16_bits

VECTORS = PANEL // VECTOR
"""Vectors of sums per row of a panel."""

_WORDS = 4 * VECTOR
"""Bytes of a vector of pairs."""

# TVM turns what it knows as bfloat16 into float32 before it makes code, operands of this instruction too: to TVM they
# are integers.
_FUNCTION = "v4c_dpbf16ps"
_INSTRUCTION = f"""
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
define linkonce_odr hidden <16 x float> @{_FUNCTION}(<16 x float> %sums, <16 x i32> %w, <16 x i32> %x) alwaysinline
    "target-features"="+avx512f,+avx512bf16" {{
  %weights = bitcast <16 x i32> %w to <32 x bfloat>
  %inputs = bitcast <16 x i32> %x to <32 x bfloat>
  %sum = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(
      <16 x float> %sums, <32 x bfloat> %weights, <32 x bfloat> %inputs)
  ret <16 x float> %sum
}}
"""


def paired_rows(rows: Any, k: int) -> Any:
    """Memory for `rows` rows of `k` inputs as words of two: ``[rows, ceil(k / 2)]`` int32."""
    return T.alloc_buffer((rows, T.int64(pairs(k))), "int32")


def _word(even: Any, odd: Any) -> Any:
    """Two float32 expressions as bfloat16 in one int32."""
    return T.bitwise_or(bfloat16_bits(even), T.shift_left(bfloat16_bits(odd), T.int32(16)))


@T.macro
def round_row(x, words, row, k):
    """Round row `row` of x ``[rows, >= k]`` float32 to bfloat16, ties to even, in pairs: `words` is `paired_rows`."""
    for step in range(T.int64(k // (2 * VECTOR))):
        for v in T.vectorized(VECTOR):
            words[row, step * VECTOR + v] = _word(x[row, (step * VECTOR + v) * 2], x[row, (step * VECTOR + v) * 2 + 1])
    for rest in range(T.int64(k // 2 - k // (2 * VECTOR) * VECTOR)):
        at: T.int64 = T.int64(k // (2 * VECTOR) * VECTOR) + rest
        words[row, at] = _word(x[row, at * 2], x[row, at * 2 + 1])
    if k % 2 == 1:
        words[row, T.int64(k // 2)] = bfloat16_bits(x[row, T.int64(k - 1)])


def _sum_of_products(sums: Any, weights: Any, inputs: Any, instruction: bool) -> Any:
    """``sums +`` the products of both halves: float32x16, uint8x64 and an int32 that is the same for all lanes."""
    words = T.reinterpret("int32x16", weights)
    if instruction:
        return T.call_pure_extern("float32x16", _FUNCTION, sums, words, T.Broadcast(inputs, VECTOR))
    low = T.reinterpret("float32x16", T.shift_left(words, T.Broadcast(T.int32(16), VECTOR)))
    high = T.reinterpret("float32x16", T.bitwise_and(words, T.Broadcast(T.int32(-(1 << 16)), VECTOR)))
    even = T.reinterpret("float32", T.shift_left(inputs, T.int32(16)))
    odd = T.reinterpret("float32", T.bitwise_and(inputs, T.int32(-(1 << 16))))
    return sums + low * T.Broadcast(even, VECTOR) + high * T.Broadcast(odd, VECTOR)


@T.macro
def pair_panel_product(sums, x, row_at, weight, panel, start, stop, rows, columns, unroll, instruction):
    """``sums[r, :] =`` the sum over the pairs from `start` to `stop` of row ``row_at[r]`` times panel `panel`.

    Args:
        sums: local ``[rows * VECTORS, VECTOR]`` float32; vector c of row r is ``r * VECTORS + c``.
        x: `paired_rows`.
        row_at: local ``[rows]`` int64, rows of `x`.
        weight: ``[panels, pairs, STEP_BYTES]`` uint8 from `pair_pack_rows`.
        rows, columns, unroll: static, as of `panel_product`; `unroll` must divide ``stop - start``.
        instruction: static; whether the target has AVX512-BF16.
    """
    for group in T.unroll(VECTORS // columns):
        part = T.alloc_buffer((rows * unroll * columns, VECTOR), "float32", scope="local")
        for a in T.unroll(rows * unroll * columns):
            for v in T.vectorized(VECTOR):
                part[a, v] = T.float32(0)
        for step in range((stop - start) // unroll):
            for u in T.unroll(unroll):
                for r in T.unroll(rows):
                    for c in T.unroll(columns):
                        part[(u * rows + r) * columns + c, T.Ramp(0, 1, VECTOR)] = _sum_of_products(
                            part[(u * rows + r) * columns + c, T.Ramp(0, 1, VECTOR)],
                            weight[panel, start + step * unroll + u, T.Ramp((group * columns + c) * _WORDS, 1, _WORDS)],
                            x[row_at[r], start + step * unroll + u],
                            instruction,
                        )
        for r in T.unroll(rows):
            for c in T.unroll(columns):
                for u in T.unroll(unroll - 1):
                    for v in T.vectorized(VECTOR):
                        part[r * columns + c, v] = (
                            part[r * columns + c, v] + part[((u + 1) * rows + r) * columns + c, v]
                        )
                for v in T.vectorized(VECTOR):
                    sums[r * VECTORS + group * columns + c, v] = part[r * columns + c, v]


def with_instruction(function: Any) -> Any:
    """A PrimFunc with the definition of the instruction, if it calls it; any other as it is."""
    import tvm
    from tvm import tirx

    if f'"{_FUNCTION}"' not in tvm.ir.save_json(function):
        return function
    definition = tvm.ir.StringImm(_INSTRUCTION)
    return function.with_body(tirx.AttrStmt(tirx.IntImm("int32", 0), "pragma_import_llvm", definition, function.body))
