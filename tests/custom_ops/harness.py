"""Runs one custom op as a one-node ONNX model in ONNX Runtime, its function bodies attached and its dims dynamic."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from hypothesis import strategies as st
from onnx import TensorProto, helper

from v4c.custom_ops.base import DOMAIN, ONNX_OPSET, OPSET_VERSION, CustomOp, TensorSpec

torch.set_num_threads(1)

_ONNX_TYPES = {
    "float32": TensorProto.FLOAT,
    "int64": TensorProto.INT64,
    "bfloat16": TensorProto.BFLOAT16,
    "float16": TensorProto.FLOAT16,
}


def spec(*shape: int | str, dtype: str = "float32") -> TensorSpec:
    """Shape and dtype of one tensor; a dimension is an int or the name of a dynamic one."""
    return TensorSpec(shape, dtype)


def build_model(op: CustomOp, specs: Mapping[str, TensorSpec], attributes: Mapping[str, Any]) -> onnx.ModelProto:
    """A model of one node of `op`, checked: inputs by their names, outputs as ``<name>_out``, as in the op's schema."""
    inputs = [specs[name] for name in op.inputs]
    outputs = op.shape_rule(inputs, attributes)
    names = [f"{name}_out" for name in op.outputs]

    def value(name: str, tensor: TensorSpec) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, _ONNX_TYPES[tensor.dtype], tensor.shape)

    graph = helper.make_graph(
        [helper.make_node(op.name, list(op.inputs), names, domain=DOMAIN, **attributes)],
        op.name,
        [value(name, tensor) for name, tensor in zip(op.inputs, inputs, strict=True)],
        [value(name, tensor) for name, tensor in zip(names, outputs, strict=True)],
    )
    model = helper.make_model(
        graph,
        ir_version=11,
        opset_imports=[helper.make_opsetid("", ONNX_OPSET), helper.make_opsetid(DOMAIN, OPSET_VERSION)],
        functions=[function.to_function_proto() for function in op.functions],
    )
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    return model


def new_session(model: onnx.ModelProto, optimize: bool = True, parallel: bool = False) -> ort.InferenceSession:
    """An ONNX Runtime session on one CPU thread (two inter-op threads when `parallel`)."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    if parallel:
        options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
        options.inter_op_num_threads = 2
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


class OnnxOp:
    """`op` with fixed attributes, called on numpy arrays or torch tensors by input name; returns all outputs."""

    def __init__(self, op: CustomOp, specs: Mapping[str, TensorSpec], **attributes: int | float) -> None:
        self.op = op
        self.model = build_model(op, specs, attributes)

    @cached_property
    def session(self) -> ort.InferenceSession:
        return new_session(self.model)

    def __call__(self, inputs: Mapping[str, np.ndarray | torch.Tensor]) -> list[np.ndarray]:
        feeds = {name: np.ascontiguousarray(inputs[name]) for name in self.op.inputs}
        return self.session.run(None, feeds)


@st.composite
def plans(draw: st.DrawFn, max_chunk: int, max_calls: int = 4) -> list[tuple[int, np.ndarray]]:
    """Successive calls on the same rows: the chunk length S of each, and the live tokens of each row, 0 ... S.

    Rows advance at their own pace, so positions, idle rows and padding come in all combinations.
    """
    batch = draw(st.integers(1, 3))
    calls = []
    for _ in range(draw(st.integers(1, max_calls))):
        chunk = draw(st.integers(1, max_chunk))
        live = st.one_of(st.sampled_from([0, chunk]), st.integers(0, chunk))
        calls.append((chunk, np.array(draw(st.lists(live, min_size=batch, max_size=batch)))))
    return calls


def to_torch(inputs: Mapping[str, np.ndarray], op: CustomOp) -> list[torch.Tensor]:
    """The inputs of `op` in order, floats as float64: what the reference is compared in."""
    tensors = [torch.from_numpy(np.array(inputs[name])) for name in op.inputs]
    return [t.double() if t.is_floating_point() else t for t in tensors]
