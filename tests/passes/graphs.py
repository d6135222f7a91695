"""Small graphs written as ONNX text, and what the tests of the recognising passes ask of a pass on them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

from tests.passes.onnx_graphs import operators, run
from v4c.custom_ops.base import DOMAIN, ONNX_OPSET, OPSET_VERSION


def graph(inputs: str, outputs: str, body: str) -> onnx.ModelProto:
    """A checked model with shapes inferred; values are named as in the text, nodes after what they make."""
    header = f'<ir_version: 11, opset_import: ["": {ONNX_OPSET}, "{DOMAIN}": {OPSET_VERSION}]>'
    model = onnx.parser.parse_model(f"{header} g ({inputs}) => ({outputs}) {{ {body} }}")
    for node in model.graph.node:
        node.name = f"make_{node.output[0] or node.output[1]}"
    onnx.checker.check_model(model)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


def only(model: ir.Model, op_type: str) -> ir.Node:
    """The one node of an operator."""
    (node,) = (n for n in model.graph if n.op_type == op_type)
    return node


def rewritten(proto: onnx.ModelProto, graph_pass: Any) -> tuple[ir.Model, Any]:
    """The model after the pass, and the pass's report; the result is checked."""
    model = ir.from_proto(proto)
    report = graph_pass.run(model)
    onnx.checker.check_model(ir.to_proto(model))
    return model, report


def left_alone(proto: onnx.ModelProto, graph_pass: Any) -> list[str]:
    """The reasons a pass gives for not touching the model."""
    before = operators(ir.from_proto(proto).graph)
    model, report = rewritten(proto, graph_pass)
    assert report.rewritten == 0
    assert operators(model.graph) == before
    return list(report.refusals)


def same_numbers(
    proto: onnx.ModelProto, graph_pass: Any, feeds: Mapping[str, np.ndarray], tolerance: float = 1e-5
) -> None:
    """The pass rewrites once, and ONNX Runtime computes the same with and without it, relative to the largest value."""
    model, report = rewritten(proto, graph_pass)
    assert (report.rewritten, report.refusals) == (1, [])
    for old, new in zip(run(proto, feeds), run(model, feeds), strict=True):
        if old.dtype.kind == "i":
            np.testing.assert_array_equal(new, old)
        else:
            np.testing.assert_allclose(new, old, rtol=tolerance, atol=tolerance * max(1.0, float(np.abs(old).max())))


def export(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...], folder: Path) -> onnx.ModelProto:
    """`module` as ``torch.onnx.export(dynamo=True)`` leaves it, with dynamic ``batch`` and ``chunk``."""
    names = [torch.export.Dim("batch"), torch.export.Dim("chunk")]
    dims = tuple(dict(enumerate(names[: a.dim()])) for a in arguments)
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module.eval(), arguments, dynamo=True, opset_version=ONNX_OPSET, verbose=False, dynamic_shapes=dims
            )
    finally:
        logging.disable(disabled)
    assert program is not None
    program.save(folder / "module.onnx")
    return onnx.load(folder / "module.onnx")
