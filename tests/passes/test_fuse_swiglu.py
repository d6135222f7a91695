"""``fuse-swiglu`` before and after on small graphs, and switched off in a compiled model."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from v4c.custom_ops import OPS
from v4c.passes.onnx.fuse_swiglu import FuseSwiGLU


def swiglu_graph(gate_high: float = 2.0, low: float = -2.0, high: float = 2.0) -> Any:
    """The elementwise operators the exporter leaves, limits as initializers."""
    limits = {"gate_high": gate_high, "low": low, "high": high}
    nodes = [
        helper.make_node("Clip", ["gate", "", "gate_high"], ["g"], name="clamp"),
        helper.make_node("Sigmoid", ["g"], ["s"]),
        helper.make_node("Mul", ["g", "s"], ["m"]),
        helper.make_node("Clip", ["up", "low", "high"], ["u"], name="clamp_up"),
        helper.make_node("Mul", ["m", "u"], ["y"]),
    ]
    shape = ["batch", "chunk", 12]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("gate", "up")]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)]
    initializers = [numpy_helper.from_array(np.float32(v).reshape(()), n) for n, v in limits.items()]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("v4c", 1)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=opsets, ir_version=11)


def operators(model: ir.Model) -> list[str]:
    return [n.op_type for n in model.graph if n.op_type != "Constant"]


def test_before_and_after() -> None:
    model = ir.from_proto(swiglu_graph())
    assert operators(model) == ["Clip", "Sigmoid", "Mul", "Clip", "Mul"]
    report = FuseSwiGLU().run(model)
    assert (report.rewritten, report.refusals) == (1, [])
    assert operators(model) == ["ClampedSwiGLU"]
    (node,) = (n for n in model.graph if n.op_type == "ClampedSwiGLU")
    assert node.domain == "v4c"
    assert node.attributes["limit"].value == 2.0
    assert [v.name for v in node.inputs] == ["gate", "up"]


@pytest.mark.parametrize("limits", [(2.0, -2.0, 3.0), (2.0, -1.0, 2.0), (-2.0, 2.0, -2.0)])
def test_other_limits_are_left_alone_with_a_reason(limits: tuple[float, float, float]) -> None:
    model = ir.from_proto(swiglu_graph(*limits))
    report = FuseSwiGLU().run(model)
    assert report.rewritten == 0
    assert operators(model) == ["Clip", "Sigmoid", "Mul", "Clip", "Mul"]
    assert any("expected one limit on all sides" in r for r in report.refusals)


def test_limits_of_run_time_are_left_alone() -> None:
    proto = swiglu_graph()
    del proto.graph.initializer[:]
    proto.graph.input.extend(
        helper.make_tensor_value_info(n, TensorProto.FLOAT, []) for n in ("gate_high", "low", "high")
    )
    model = ir.from_proto(proto)
    report = FuseSwiGLU().run(model)
    assert report.rewritten == 0
    assert "constant limits" in report.refusals[0]


@settings(deadline=None, max_examples=15)
@given(
    limit=st.floats(0.25, 20, width=32), batch=st.integers(1, 3), chunk=st.integers(1, 5), seed=st.integers(0, 2**32)
)
def test_same_numbers_with_and_without(limit: float, batch: int, chunk: int, seed: int) -> None:
    proto = swiglu_graph(limit, -limit, limit)
    model = ir.from_proto(proto)
    FuseSwiGLU().run(model)
    for function in OPS["ClampedSwiGLU"].functions:
        made = ir.from_proto(function.to_function_proto())
        model.functions[made.identifier()] = made
    rng = np.random.default_rng(seed)
    feeds = {n: (10 * rng.standard_normal((batch, chunk, 12))).astype(np.float32) for n in ("gate", "up")}
    before = ort.InferenceSession(proto.SerializeToString()).run(None, feeds)[0]
    after = ort.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, feeds)[0]
    np.testing.assert_allclose(after, before, rtol=1e-6, atol=1e-6)
