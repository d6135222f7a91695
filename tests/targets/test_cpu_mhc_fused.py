"""The fused hyper-connection kernels against the ops' references in float64, and independence of a token's batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.targets.cpu_harness import compiled, run
from v4c.custom_ops.base import CustomOp
from v4c.custom_ops.mhc_post_pre_norm import MHC_POST_PRE_NORM
from v4c.custom_ops.mhc_pre_norm import MHC_PRE_NORM
from v4c.targets.cpu.kernels.mhc_fused import mhc_post_pre_norm, mhc_pre_norm

HC_EPS, NORM_EPS, EPS = 1e-4, 1e-5, 0.1
KERNELS = {MHC_PRE_NORM.name: mhc_pre_norm, MHC_POST_PRE_NORM.name: mhc_post_pre_norm}
TOKENS = {"x", "streams", "post", "comb"}
"""Inputs with batch and chunk as their first two axes; the others are weights."""

both = pytest.mark.parametrize("op", [MHC_PRE_NORM, MHC_POST_PRE_NORM], ids=lambda op: op.name)


def make(op: CustomOp, b: int, s: int, m: int, d: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    outputs = (2 + m) * m
    shapes = {
        "x": (b, s, d), "streams": (b, s, m, d), "post": (b, s, m), "comb": (b, s, m, m),
        "fn": (outputs, m * d), "base": (outputs,), "scale": (3,), "norm": (d,),
    }  # fmt: skip
    inputs = {n: rng.standard_normal(shapes[n], dtype=np.float32) for n in op.inputs}
    inputs["streams"] *= 3
    inputs["fn"] /= np.float32((m * d) ** 0.5)
    return inputs


def run_op(op: CustomOp, inputs: dict[str, np.ndarray], iterations: int) -> list[np.ndarray]:
    b, s, m, d = inputs["streams"].shape
    shapes = [(b, s, d), (b, s, m), (b, s, m, m)]
    if op is MHC_POST_PRE_NORM:
        shapes.insert(0, (b, s, m, d))
    kernel = compiled(KERNELS[op.name], m, d, iterations, HC_EPS, NORM_EPS, EPS)
    return run(kernel, list(inputs.values()), [(shape, "float32") for shape in shapes]).outputs


def check(op: CustomOp, b: int, s: int, m: int, d: int, iterations: int, seed: int) -> None:
    inputs = make(op, b, s, m, d, seed)
    wide = [torch.from_numpy(a).double() for a in inputs.values()]
    expected = op.reference(*wide, iterations, HC_EPS, NORM_EPS, EPS)
    for found, want in zip(run_op(op, inputs, iterations), expected, strict=True):
        scale = max(1.0, float(want.abs().max()))
        np.testing.assert_allclose(found, want.numpy(), rtol=1e-5, atol=1e-5 * scale)


@both
@settings(deadline=None, max_examples=4)
@given(
    st.integers(1, 3), st.integers(1, 13), st.integers(1, 5), st.integers(1, 200), st.integers(1, 5),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_any_width(op: CustomOp, b: int, s: int, m: int, d: int, iterations: int, seed: int) -> None:
    check(op, b, s, m, d, iterations, seed)


@both
@settings(deadline=None, max_examples=15)
@given(st.integers(1, 2), st.integers(1, 80), st.integers(0, 2**32 - 1))
def test_any_token_count(op: CustomOp, b: int, s: int, seed: int) -> None:
    check(op, b, s, 4, 40, 20, seed)


@both
@pytest.mark.parametrize("s", [1, 2, 5, 33])
def test_several_parts_with_a_short_one(op: CustomOp, s: int) -> None:
    check(op, 1, s, 4, 2304, 20, seed=s)


@both
def test_a_token_does_not_depend_on_its_batch(op: CustomOp) -> None:
    inputs = make(op, 1, 70, 4, 1200, seed=8)
    together = run_op(op, inputs, 20)
    for tokens in (slice(0, 1), slice(17, 19), slice(30, 39), slice(50, 70)):
        some = {n: a[:, tokens] if n in TOKENS else a for n, a in inputs.items()}
        for few, many in zip(run_op(op, some, 20), together, strict=True):
            np.testing.assert_array_equal(few, many[:, tokens])
