"""Small ONNX graphs for tests of passes: built from nodes, run before and after in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from v4c.custom_ops.base import DOMAIN, ONNX_OPSET
from v4c.frontend.onnx_export import op_functions

_TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
Shape = Sequence[int | str]


def model_of(
    nodes: Sequence[onnx.NodeProto], inputs: Mapping[str, Shape], outputs: Mapping[str, Shape],
    weights: Mapping[str, np.ndarray] | None = None, functions: Sequence[onnx.FunctionProto] = (),
    integers: Sequence[str] = (),
) -> onnx.ModelProto:  # fmt: skip
    """A model of float32 inputs (int64 those in `integers`), weights as initializers."""

    def value(name: str, shape: Shape) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, _TYPES["int64" if name in integers else "float32"], shape)

    domains = {DOMAIN, *(f.domain for f in functions)}
    graph = helper.make_graph(
        list(nodes), "g", [value(n, s) for n, s in inputs.items()], [value(n, s) for n, s in outputs.items()],
        [numpy_helper.from_array(a, n) for n, a in (weights or {}).items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", ONNX_OPSET), *(helper.make_opsetid(d, 1) for d in sorted(domains))]
    return helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=11)


def function_of(name: str, inputs: list[str], outputs: list[str], nodes: list[Any]) -> onnx.FunctionProto:
    """A model-local function of domain ``local``."""
    opsets = [helper.make_opsetid(d, v) for d, v in (("", ONNX_OPSET), (DOMAIN, 1))]
    return helper.make_function("local", name, inputs, outputs, nodes, opsets)


def node(op: str, inputs: list[str], outputs: list[str] | str, domain: str = "", **attributes: Any) -> onnx.NodeProto:
    """A node named after its first output."""
    made = [outputs] if isinstance(outputs, str) else outputs
    return helper.make_node(op, inputs, made, name=made[0], domain=domain, **attributes)


def operators(graph: ir.Graph | ir.Function) -> list[str]:
    """Operators in order, constants left out."""
    return [n.op_type for n in graph if n.op_type != "Constant"]


def run(model: onnx.ModelProto | ir.Model, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Outputs in ONNX Runtime, the bodies of custom ops attached."""
    made = model if isinstance(model, ir.Model) else ir.from_proto(model)
    for function in op_functions([made.graph, *made.functions.values()]):
        made.functions[function.identifier()] = function
    return ort.InferenceSession(ir.to_proto(made).SerializeToString()).run(None, dict(feeds))
