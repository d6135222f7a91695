"""Where the walking passes look, what they leave alone, and how they read constants and shapes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.passes.graphs import graph
from tests.passes.onnx_graphs import operators
from v4c.passes.onnx.fuse_rms_norm import FuseRMSNorm
from v4c.passes.onnx.matching import array, dim, scalar, sizes

NORM = """
    axes = Constant<value_ints = [-1]>() eps = Constant<value_float = 1e-6>() square = Mul(x, x)
    mean = ReduceMean(square, axes) v = Add(mean, eps) root = Sqrt(v) y = Div(x, root)
"""


def values(model: ir.Model) -> dict[str, ir.Value]:
    return {str(v.name): v for n in model.graph for v in (*n.inputs, *n.outputs) if v is not None}


def test_an_older_opset_is_refused() -> None:
    proto = graph("float[b, 4] x", "float[b, 4] y", NORM)
    proto.opset_import[0].version = 18
    report = FuseRMSNorm().run(ir.from_proto(proto))
    assert (report.rewritten, report.refusals) == (0, ["g: expected opset 23 or later, found 18"])


@pytest.mark.parametrize(("domain", "parameters", "rewritten"), [("local", "", 1), ("v4c", "", 0), ("local", "<k>", 0)])
def test_functions_are_walked_but_not_op_bodies_nor_those_with_parameters(
    domain: str, parameters: str, rewritten: int
) -> None:
    text = f"""
        <ir_version: 11, opset_import: ["": 23, "{domain}": 1]> g (float[b, 4] x) => (float[b, 4] y)
        {{ y = {domain}.Norm{"<k = 1>" if parameters else ""}(x) }}
        <domain: "{domain}", opset_import: ["": 23]> Norm {parameters} (x) => (y) {{ {NORM} }}
    """
    model = ir.from_proto(onnx.parser.parse_model(text))
    (function,) = model.functions.values()
    function.inputs[0].shape, function.inputs[0].type = ir.Shape(["b", 4]), ir.TensorType(ir.DataType.FLOAT)
    assert FuseRMSNorm().run(model).rewritten == rewritten
    assert ("RMSNormalization" in operators(function)) == bool(rewritten)


def test_subgraphs_are_walked() -> None:
    branches = "then_branch = a () => (float[b, 4] y1) { %s }, else_branch = c () => (float[b, 4] y2) { y2 = Neg(x) }"
    body = NORM.replace("y =", "y1 =")
    proto = graph("float[b, 4] x, bool flag", "float[b, 4] y", f"y = If<{branches % body}>(flag)")
    model = ir.from_proto(proto)
    assert FuseRMSNorm().run(model).rewritten == 1
    branch = model.graph[0].attributes["then_branch"].as_graph()
    assert operators(branch) == ["RMSNormalization"]
    onnx.checker.check_model(ir.to_proto(model))


def test_what_reaches_out_of_a_subgraph_is_left_alone_with_a_reason() -> None:
    outside, inside = NORM.split("root =")
    branches = f"then_branch = a () => (float[b, 4] y1) {{ root = {inside.replace('y =', 'y1 =')} }},"
    branches += "else_branch = c () => (float[b, 4] y2) { y2 = Neg(x) }"
    proto = graph("float[b, 4] x, bool flag", "float[b, 4] y", f"{outside} y = If<{branches}>(flag)")
    report = FuseRMSNorm().run(ir.from_proto(proto))
    assert report.rewritten == 0
    assert "expected all of the spelling in one graph" in report.refusals[0]


def test_constants_are_read_in_every_form() -> None:
    body = """
        a = Constant<value_float = 2.5>() b = Constant<value_ints = [3]>() c = Constant<value = float[1] {4.0}>()
        i0 = Constant<value_ints = [0]>() i1 = Constant<value_ints = [1]>() s = Constant<value_string = "text">()
        d = Neg(a) e = Unsqueeze(a, i0) f = Cast<to = 1>(b) g = Reshape(c, i1) w = Unsqueeze(c, i0) y = Identity(x)
    """
    found = values(ir.from_proto(graph("float[b, 4] x", "float[b, 4] y", body)))
    assert [scalar(found[n]) for n in "abcdefgwsx"] == [2.5, 3.0, 4.0, -2.5, 2.5, 3.0, 4.0, None, None, None]
    np.testing.assert_array_equal(array(found["w"]), [[4.0]])


def test_shapes_are_read_as_dimensions() -> None:
    body = """
        i0 = Constant<value_ints = [0]>() i1 = Constant<value_ints = [1]>() i2 = Constant<value_ints = [2]>()
        i9 = Constant<value_ints = [9]>() shape = Shape(x) lead = Shape<end = -1>(x) chunk = Gather(shape, i1)
        width = Slice(shape, i2, i9, i0) half = Sub(width, i2) doubled = Mul(chunk, i2)
        all = Concat<axis = 0>(lead, half) scalar = Squeeze(chunk) y = Identity(x)
    """
    found = values(ir.from_proto(graph("float[b, s, 6] x", "float[b, s, 6] y", body)))
    assert sizes(found["shape"]) == ["b", "s", 6]
    assert (sizes(found["chunk"]), sizes(found["scalar"]), sizes(found["width"])) == (["s"], ["s"], [6])
    assert sizes(found["all"]) == ["b", "s", 4]
    assert sizes(found["doubled"]) == [(found["doubled"], 0)], "a size that is computed stands for itself"
    assert sizes(found["x"]) is None
    assert dim(found["x"], -1) == 6
