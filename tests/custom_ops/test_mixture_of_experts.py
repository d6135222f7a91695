"""Routed experts and the shared one in one op: the ONNX body against the torch reference, with missing choices."""

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
from v4c.custom_ops.grouped_experts import grouped_experts
from v4c.custom_ops.mixture_of_experts import MIXTURE_OF_EXPERTS, mixture_of_experts

seeds = st.integers(0, 2**32 - 1)
limits = st.sampled_from([0.5, 10.0])


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    """B, S, D, E, K, F, G."""
    return tuple(draw(st.integers(1, n)) for n in (3, 5, 12, 6, 4, 9, 9))


def make(seed: int, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random inputs by name; an expert may be chosen twice by a token, and a choice may be missing."""
    b, s, d, e, k, f, g_width = shape
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=g)

    return {
        "x": normal(b, s, d),
        "weights": torch.rand(b, s, k, generator=g),
        "indices": torch.randint(-1, e, (b, s, k), generator=g),
        "gate_up": normal(e, 2 * f, d),
        "down": normal(e, d, f) / f**0.5,
        "shared_gate_up": normal(2 * g_width, d),
        "shared_down": normal(d, g_width) / g_width**0.5,
    }


def expected(inputs: dict[str, torch.Tensor], limit: float) -> np.ndarray:
    """The reference in float64."""
    wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    return mixture_of_experts(**wide, limit=limit).numpy()


@cache
def onnx_op(limit: float, dtype: str = "float32") -> OnnxOp:
    specs = {
        "x": spec("B", "S", "D"),
        "weights": spec("B", "S", "K"),
        "indices": spec("B", "S", "K", dtype="int64"),
        "gate_up": spec("E", "F2", "D", dtype=dtype),
        "down": spec("E", "D", "F", dtype=dtype),
        "shared_gate_up": spec("G2", "D"),
        "shared_down": spec("D", "G"),
    }
    return OnnxOp(MIXTURE_OF_EXPERTS, specs, limit=limit)


@settings(deadline=None, max_examples=60)
@given(seeds, shapes(), limits)
def test_onnx_body_matches_the_reference(seed: int, shape: tuple[int, ...], limit: float) -> None:
    inputs = make(seed, shape)
    wide = expected(inputs, limit)
    np.testing.assert_allclose(onnx_op(limit)(inputs)[0], wide, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(mixture_of_experts(**inputs, limit=limit).numpy(), wide, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=30)
@given(seeds, shapes(), limits)
def test_the_shared_expert_is_one_that_every_token_chose(seed: int, shape: tuple[int, ...], limit: float) -> None:
    inputs = make(seed, shape)
    b, s = shape[:2]
    inputs["indices"] = torch.full_like(inputs["indices"], -1)
    alone = grouped_experts(
        inputs["x"], torch.ones(b, s, 1), torch.zeros(b, s, 1, dtype=torch.int64),
        inputs["shared_gate_up"][None], inputs["shared_down"][None], limit,
    )  # fmt: skip
    torch.testing.assert_close(mixture_of_experts(**inputs, limit=limit), alone, rtol=1e-5, atol=1e-5)


def test_unchosen_experts_are_never_touched() -> None:
    inputs = make(4, (2, 5, 8, 6, 3, 4, 5))
    inputs["indices"].clamp_(max=3)
    wide = expected(inputs, 10.0)
    for name in ("gate_up", "down"):
        inputs[name][4:] = torch.nan
    np.testing.assert_allclose(mixture_of_experts(**inputs, limit=10.0).numpy(), wide, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(onnx_op(10.0)(inputs)[0], wide, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@settings(deadline=None, max_examples=20)
@given(seed=seeds, shape=shapes())
def test_narrow_routed_weights_are_widened_exactly(dtype: str, seed: int, shape: tuple[int, ...]) -> None:
    inputs = make(seed, shape)
    for name in ("gate_up", "down"):
        inputs[name] = inputs[name].to(getattr(torch, dtype))
    wide = expected(inputs, 10.0)
    got = mixture_of_experts(**inputs, limit=10.0)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), wide, rtol=1e-4, atol=1e-4)

    kind = getattr(TensorProto, dtype.upper())
    feeds = {
        n: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(t.view(torch.uint16).numpy(), kind)
        if n in ("gate_up", "down")
        else ort.OrtValue.ortvalue_from_numpy(t.numpy())
        for n, t in inputs.items()
    }
    (in_onnx,) = onnx_op(10.0, dtype).session.run_with_ort_values(None, feeds)
    np.testing.assert_allclose(in_onnx.numpy(), wide, rtol=1e-4, atol=1e-4)


def test_torch_op_is_pure_and_declares_its_shape() -> None:
    inputs = make(0, (2, 3, 8, 5, 2, 4, 3))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(MIXTURE_OF_EXPERTS.torch_op, (*inputs.values(), 10.0), test_utils=checks)
