"""RMS norm and projection in one op: the ONNX body against the torch reference, with weights of every stored dtype."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from tests.custom_ops.harness import OnnxOp, spec
from v4c.custom_ops.rms_norm_linear import RMS_NORM_LINEAR, rms_norm_linear

seeds = st.integers(0, 2**32 - 1)
epsilons = st.sampled_from([1e-6, 0.5])


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    """B, S, K, N."""
    return tuple(draw(st.integers(1, n)) for n in (3, 5, 40, 20))


def make(seed: int, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random inputs by name; rows of `x` differ in size, so that a norm over the wrong axis shows."""
    b, s, k, n = shape
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(b, s, k, generator=g) * torch.rand(b, s, 1, generator=g).exp2() ** 4
    return {"x": x, "norm": torch.randn(k, generator=g), "weight": torch.randn(n, k, generator=g)}


@cache
def onnx_op(eps: float, dtype: str = "float32") -> OnnxOp:
    specs = {"x": spec("B", "S", "K"), "norm": spec("K"), "weight": spec("N", "K", dtype=dtype)}
    return OnnxOp(RMS_NORM_LINEAR, specs, eps=eps)


def expected(inputs: dict[str, torch.Tensor], eps: float) -> tuple[np.ndarray, np.ndarray]:
    """The reference in float64, and the error allowed: rounding grows with the sum of the terms' sizes."""
    x, norm, weight = (t.double() for t in inputs.values())
    size = rms_norm_linear(x.abs(), norm.abs(), weight.abs(), eps)
    return rms_norm_linear(x, norm, weight, eps).numpy(), 2e-6 * size.numpy() + 1e-30


@settings(deadline=None, max_examples=60)
@given(seeds, shapes(), epsilons)
def test_onnx_body_matches_the_reference(seed: int, shape: tuple[int, ...], eps: float) -> None:
    inputs = make(seed, shape)
    wide, bound = expected(inputs, eps)
    assert np.all(np.abs(onnx_op(eps)(inputs)[0] - wide) <= bound)
    assert np.all(np.abs(rms_norm_linear(**inputs, eps=eps).numpy() - wide) <= bound)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@settings(deadline=None, max_examples=20)
@given(seed=seeds, shape=shapes())
def test_narrow_weights_are_widened_exactly(dtype: str, seed: int, shape: tuple[int, ...]) -> None:
    inputs = make(seed, shape)
    inputs["weight"] = inputs["weight"].to(getattr(torch, dtype))
    wide, bound = expected(inputs, 1e-6)
    got = rms_norm_linear(**inputs, eps=1e-6)
    assert got.dtype == torch.float32
    assert np.all(np.abs(got.numpy() - wide) <= bound)

    feeds = {name: ort.OrtValue.ortvalue_from_numpy(inputs[name].numpy()) for name in ("x", "norm")}
    stored = inputs["weight"].view(torch.uint16).numpy()
    kind = getattr(TensorProto, dtype.upper())
    feeds["weight"] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(stored, kind)
    (in_onnx,) = onnx_op(1e-6, dtype).session.run_with_ort_values(None, feeds)
    assert np.all(np.abs(in_onnx.numpy() - wide) <= bound)


def test_torch_op_is_pure_and_declares_its_shape() -> None:
    inputs = make(0, (2, 3, 8, 5))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(RMS_NORM_LINEAR.torch_op, (*inputs.values(), 1e-6), test_utils=checks)
