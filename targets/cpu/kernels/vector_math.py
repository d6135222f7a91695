"""Arithmetic on TIR expressions that LLVM turns into vector code: exp and sums over lanes.

``T.exp`` becomes one libm call per lane. The polynomial here stays in registers, at an error below 2 units in the last
place, which is what a softmax over thousands of slots needs.
"""

# mypy: ignore-errors
# (TVMScript builders have no useful static types.)

from __future__ import annotations

from collections.abc import Sequence

from tvm.ir import Expr
from tvm.script import tirx as T

LOWEST = -3.0e38
"""Start of a running maximum: below every finite logit, and finite itself so that differences stay finite."""

_LOG2_E = 1.44269504088896341
# ln 2 in two parts; the first has so few bits that its product with an exponent is exact (Cody and Waite).
_LN2_HIGH = 0.693359375
_LN2_LOW = -2.12194440e-4
_POLYNOMIAL = (  # of (exp(r) - 1 - r) / r^2 on |r| <= ln(2) / 2, as in Cephes expf
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
_SMALLEST, _LARGEST = -87.3, 88.3  # exp of these is still a normal number


def exp(x: Expr) -> Expr:
    """exp(x) of a float32 expression; arguments are clamped to where the result is a normal float32."""
    x = T.max(T.min(x, T.float32(_LARGEST)), T.float32(_SMALLEST))
    exponent = T.nearbyint(x * T.float32(_LOG2_E))
    r = x - exponent * T.float32(_LN2_HIGH) - exponent * T.float32(_LN2_LOW)
    p = T.float32(_POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        p = p * r + T.float32(coefficient)
    power = T.reinterpret("float32", T.shift_left(T.cast(exponent, "int32") + T.int32(127), T.int32(23)))
    return (p * r * r + r + T.float32(1)) * power


def sigmoid(x: Expr) -> Expr:
    """1 / (1 + exp(-x)) of a float32 expression."""
    return T.float32(1) / (T.float32(1) + exp(T.float32(0) - x))


def tree_sum(terms: Sequence[Expr]) -> Expr:
    """The sum of `terms`, added pairwise: a short dependence chain, in a fixed order."""
    while len(terms) > 1:
        pairs = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + ([terms[-1]] if len(terms) % 2 else [])
    return terms[0]
