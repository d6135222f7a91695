"""Grouped experts against transformers and a plain numpy loop; experts nobody chose must never be touched."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts

from tests.custom_ops.harness import OnnxOp, spec
from v4c.custom_ops.grouped_experts import GROUPED_EXPERTS, grouped_experts

seeds = st.integers(0, 2**32 - 1)
limits = st.sampled_from([0.5, 10.0])


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    """B, S, D, E, K, F."""
    return tuple(draw(st.integers(1, n)) for n in (3, 5, 12, 6, 4, 9))


def make(seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random inputs by name; an expert may be chosen twice by a token."""
    b, s, d, e, k, f = shape
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=g, dtype=dtype)

    return {
        "x": normal(b, s, d),
        "weights": torch.rand(b, s, k, generator=g, dtype=dtype),
        "indices": torch.randint(0, e, (b, s, k), generator=g),
        "gate_up": normal(e, 2 * f, d),
        "down": normal(e, d, f) / f**0.5,
    }


def numpy_experts(inputs: dict[str, torch.Tensor], limit: float) -> np.ndarray:
    """One token and one choice at a time, in float64."""
    x, weights, gate_up, down = (inputs[n].double().numpy() for n in ("x", "weights", "gate_up", "down"))
    out = np.zeros_like(x)
    for b, s, k in np.ndindex(*weights.shape):
        expert = int(inputs["indices"][b, s, k])
        if expert < 0:
            continue
        gate, up = np.split(gate_up[expert] @ x[b, s], 2)
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        out[b, s] += weights[b, s, k] * (down[expert] @ (gate / (1 + np.exp(-gate)) * up))
    return out


@cache
def onnx_experts(limit: float, dtype: str = "float32") -> OnnxOp:
    specs = {
        "x": spec("B", "S", "D"),
        "weights": spec("B", "S", "K"),
        "indices": spec("B", "S", "K", dtype="int64"),
        "gate_up": spec("E", "F2", "D", dtype=dtype),
        "down": spec("E", "D", "F", dtype=dtype),
    }
    return OnnxOp(GROUPED_EXPERTS, specs, limit=limit)


@settings(deadline=None, max_examples=60)
@given(seeds, shapes(), limits)
def test_matches_transformers(seed: int, shape: tuple[int, ...], limit: float) -> None:
    _, _, d, e, k, f = shape
    inputs = make(seed, shape)
    config: Any = SimpleNamespace(
        num_local_experts=e,
        hidden_size=d,
        intermediate_size=f,
        hidden_act="silu",
        swiglu_limit=limit,
        _experts_implementation="eager",
    )
    theirs = DeepseekV4Experts(config)
    theirs.load_state_dict({"gate_up_proj": inputs["gate_up"], "down_proj": inputs["down"]})
    with torch.no_grad():
        flat = theirs(inputs["x"].flatten(0, 1), inputs["indices"].view(-1, k), inputs["weights"].view(-1, k))
    torch.testing.assert_close(grouped_experts(**inputs, limit=limit).flatten(0, 1), flat, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=100)
@given(seeds, shapes(), limits, st.floats(0, 1))
def test_matches_numpy_with_missing_choices(seed: int, shape: tuple[int, ...], limit: float, missing: float) -> None:
    inputs = make(seed, shape, torch.float64)
    drop = torch.rand(inputs["indices"].shape, generator=torch.Generator().manual_seed(seed)) < missing
    inputs["indices"] = inputs["indices"].masked_fill(drop, -1)
    expected = numpy_experts(inputs, limit)
    np.testing.assert_allclose(grouped_experts(**inputs, limit=limit).numpy(), expected, rtol=1e-10, atol=1e-10)
    single = {n: t.float() if t.is_floating_point() else t for n, t in inputs.items()}
    np.testing.assert_allclose(onnx_experts(limit)(single)[0], expected, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(seeds, shapes(), st.data())
def test_unchosen_experts_are_never_touched(seed: int, shape: tuple[int, ...], data: st.DataObject) -> None:
    inputs = make(seed, shape)
    allowed = data.draw(st.sets(st.integers(-1, shape[3] - 1), min_size=1), "experts in use")
    inputs["indices"] = torch.tensor(sorted(allowed))[inputs["indices"] % len(allowed)]
    expected = numpy_experts(inputs, 10.0)
    chosen = inputs["indices"].unique()
    for expert in range(shape[3]):
        if expert not in chosen:
            inputs["gate_up"][expert] = torch.nan
            inputs["down"][expert] = torch.nan
    np.testing.assert_allclose(grouped_experts(**inputs, limit=10.0).numpy(), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(onnx_experts(10.0)(inputs)[0], expected, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=30)
@given(seeds, shapes(), st.sampled_from(["bfloat16", "float16"]))
def test_narrow_weights_are_widened_exactly(seed: int, shape: tuple[int, ...], dtype: str) -> None:
    inputs = make(seed, shape)
    for name in ("gate_up", "down"):
        inputs[name] = inputs[name].to(getattr(torch, dtype))
    expected = numpy_experts(inputs, 10.0)
    got = grouped_experts(**inputs, limit=10.0)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=1e-4)

    kind = getattr(TensorProto, dtype.upper())
    feeds = {
        n: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(t.view(torch.uint16).numpy(), kind)
        if n in ("gate_up", "down")
        else ort.OrtValue.ortvalue_from_numpy(t.numpy())
        for n, t in inputs.items()
    }
    (in_onnx,) = onnx_experts(10.0, dtype).session.run_with_ort_values(None, feeds)
    np.testing.assert_allclose(in_onnx.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_torch_op_is_pure_and_declares_its_shape() -> None:
    inputs = make(0, (2, 3, 8, 5, 2, 4))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(GROUPED_EXPERTS.torch_op, (*inputs.values(), 10.0), test_utils=checks)
