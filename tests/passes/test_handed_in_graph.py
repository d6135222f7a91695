"""A whole model in which nothing of ours is fused, norms, rotations, routers and experts spelled out, is recovered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir import tape
from onnx_ir.passes import common

from tests.passes.whole_graph import Traced
from v4c.custom_ops import DOMAIN
from v4c.frontend.config import ModelConfig
from v4c.frontend.initialise import RandomCheckpoint
from v4c.frontend.onnx_export import op_functions
from v4c.passes.onnx.fuse_experts import FuseExperts
from v4c.passes.onnx.fuse_rms_norm import FuseRMSNorm
from v4c.passes.onnx.fuse_rope import FuseRope
from v4c.passes.onnx.fuse_router import FuseRouter
from v4c.passes.onnx.fuse_swiglu import FuseSwiGLU
from v4c.passes.onnx.hoisting import parts, type_inputs

SPELLED = {
    "TrailingRope", "RotateTrailing", "TokenPositions", "TopKRoute", "HashRoute", "RouteScores", "RouteWeights",
    "ClampedSwiGLU",
}  # fmt: skip
"""Custom ops whose bodies are put in their place, and the functions these bodies call."""

RECOVERED = {"TrailingRope", "TopKRoute", "HashRoute", "GroupedExperts", "RMSNormalization", "ClampedSwiGLU"}


@pytest.fixture(scope="module")
def traced(tiny_engram: ModelConfig) -> Traced:
    return Traced.of(RandomCheckpoint(tiny_engram, seed=11))


def spell_out(model: ir.Model) -> None:
    """Leave nothing but standard operators of norms, rotations, routers and experts in the layers."""
    for function in op_functions([model.graph, *model.functions.values()]):
        function.opset_imports.update(model.opset_imports)
        model.functions[function.identifier()] = function
    common.InlinePass(criteria=lambda f: f.domain == DOMAIN and f.name in SPELLED)(model)
    for function in parts(model):
        for node in list(function):
            if node.op_type == "RMSNormalization":
                _replace(function, node, _norm)
            elif node.op_type == "GroupedExperts":
                _replace(function, node, _experts)


def _replace(function: ir.Function, node: ir.Node, spell: Callable[[tape.Tape, ir.Node], ir.Value]) -> None:
    operators = tape.Tape()
    result = spell(operators, node)
    ir.convenience.replace_nodes_and_values(function, node, [node], list(operators.nodes), node.outputs, [result])


def _constant(operators: tape.Tape, value: Any) -> ir.Value:
    return operators.op("Constant", [], {"value": ir.tensor(value)})


def _norm(operators: tape.Tape, node: ir.Node) -> ir.Value:
    x, weight = node.inputs
    assert weight is not None
    square = operators.op("Pow", [x, _constant(operators, np.float32(2))])
    mean = operators.op("ReduceMean", [square, _constant(operators, np.array([-1]))])
    epsilon = _constant(operators, np.float32(node.attributes["epsilon"].value))
    root = operators.op("Sqrt", [operators.op("Add", [mean, epsilon])])
    normed = operators.op("Mul", [x, operators.op("Reciprocal", [root])])
    ones = ir.convenience.get_const_tensor(weight)
    return normed if ones is not None and (ones.numpy() == 1).all() else operators.op("Mul", [weight, normed])


def _experts(operators: tape.Tape, node: ir.Node) -> ir.Value:
    x, weights, indices, gate_up, down = node.inputs
    high = _constant(operators, np.float32(node.attributes["limit"].value))
    last, columns = _constant(operators, np.array([-1])), _constant(operators, np.array([2, 4]))
    first = operators.op(
        "MatMul", [operators.op("Gather", [gate_up, indices]), operators.op("Unsqueeze", [x, columns])]
    )
    both = operators.op("Squeeze", [first, last])
    gate, up = operators.op_multi_out("Split", [both], {"axis": -1, "num_outputs": 2}, num_outputs=2)
    gate = operators.op("Clip", [gate, None, high])
    up = operators.op("Clip", [up, operators.op("Neg", [high]), high])
    hidden = operators.op("Mul", [operators.op("Mul", [gate, operators.op("Sigmoid", [gate])]), up])
    second = operators.op(
        "MatMul", [operators.op("Gather", [down, indices]), operators.op("Unsqueeze", [hidden, last])]
    )
    result = operators.op("Squeeze", [second, last])
    weighted = operators.op("Mul", [result, operators.op("Unsqueeze", [weights, last])])
    return operators.op("ReduceSum", [weighted, _constant(operators, np.array([2]))], {"keepdims": 0})


def recover(model: ir.Model) -> dict[str, list[str]]:
    """Run the passes; the reasons each gave for leaving a place alone."""
    type_inputs(model)
    reports = [make().run(model) for make in (FuseRMSNorm, FuseRope, FuseRouter, FuseExperts, FuseSwiGLU)]
    assert all(r.rewritten for r in reports)
    return {r.name: r.refusals for r in reports}


def counts(model: ir.Model) -> dict[str, Counter[str]]:
    """Operators of each layer, constants left out."""
    return {f.name: Counter(n.op_type for n in f if n.op_type != "Constant") for f in parts(model)}


def test_every_op_is_recovered(traced: Traced) -> None:
    plain = traced.model()
    FuseSwiGLU().run(plain)
    expected = counts(plain)
    model = traced.model()
    FuseSwiGLU().run(model)
    spell_out(model)
    for name, found in counts(model).items():
        assert not RECOVERED & set(found), name
    refusals = recover(model)
    assert counts(model) == expected
    assert not any(refusals.values()), refusals


def test_same_logits(traced: Traced, tmp_path: Path) -> None:
    expected = traced.logits(traced.model(), tmp_path, seed=3)
    model = traced.model()
    FuseSwiGLU().run(model)
    spell_out(model)
    recover(model)
    for found, logits in zip(traced.logits(model, tmp_path, seed=3), expected, strict=True):
        np.testing.assert_allclose(found, logits, rtol=0, atol=1e-5 * max(1.0, float(np.abs(logits).max(initial=0))))
