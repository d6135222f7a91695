"""``fuse-mhc-norm`` and ``fuse-mhc-post-pre`` before and after on small graphs of one and two sublayers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.passes.onnx_graphs import Shape, function_of, model_of, node, operators, run
from v4c.passes.onnx.fuse_mhc_norm import FuseMHCNorm
from v4c.passes.onnx.fuse_mhc_post_pre import FuseMHCPostPre
from v4c.passes.onnx.hoisting import type_inputs

M, D = 3, 8
Z = (2 + M) * M
HYPER = {"iterations": 4, "hc_eps": 1e-4, "norm_eps": 1e-5}
WEIGHTS: dict[str, Shape] = {"fn": [Z, M * D], "base": [Z], "scale": [3], "norm": [D]}
INPUTS: dict[str, Shape] = {
    "x": ["B", "S", D], "streams": ["B", "S", M, D], "post": ["B", "S", M], "comb": ["B", "S", M, M], **WEIGHTS
}  # fmt: skip
OUTPUTS: dict[str, Shape] = {"y": ["B", "S", D], "next_post": ["B", "S", M], "next_comb": ["B", "S", M, M]}
MIXED: Shape = ["B", "S", M, D]


def leave(x: str = "x", streams: str = "streams", mixed: str = "mixed", **names: str) -> onnx.NodeProto:
    return node("MHCPost", [x, streams, names.get("post", "post"), names.get("comb", "comb")], mixed, "v4c")


def enter(streams: str, norm: str = "norm", axis: int | None = -1, prefix: str = "") -> list[onnx.NodeProto]:
    """`MHCPre` and the norm behind it, as the exporter leaves them; outputs named after `OUTPUTS`."""
    made = [f"{prefix}{n}" for n in ("collapsed", "next_post", "next_comb")]
    given: dict[str, Any] = {"axis": axis} if axis is not None else {}
    return [
        node("MHCPre", [streams, "fn", "base", "scale"], made, "v4c", **HYPER),
        node("RMSNormalization", [made[0], norm], f"{prefix}y", epsilon=1e-3, **given),
    ]


def enter_fused(streams: str, fn: str = "fn", prefix: str = "") -> onnx.NodeProto:
    made = [f"{prefix}{n}" for n in OUTPUTS]
    return node("MHCPreNorm", [streams, fn, "base", "scale", "norm"], made, "v4c", **HYPER, eps=1e-3)


def graph(nodes: Sequence[Any], outputs: dict[str, Shape] = OUTPUTS, in_function: bool = False) -> onnx.ModelProto:
    """The nodes in the main graph, or as a model-local function it calls."""
    produced = {name for n in nodes for name in n.output}
    shapes = {n: s for n, s in INPUTS.items() if any(n in given.input for given in nodes) and n not in produced}
    if not in_function:
        return model_of(nodes, shapes, outputs)
    layer = function_of("Layer", list(shapes), list(outputs), list(nodes))
    call = node("Layer", list(shapes), list(outputs), "local")
    return model_of([call], shapes, outputs, functions=[layer])


def loaded(proto: onnx.ModelProto) -> ir.Model:
    """The model as the pipeline hands it to passes: inputs of functions have the shapes of what is passed to them."""
    model = ir.from_proto(proto)
    type_inputs(model)
    return model


def body(model: ir.Model) -> ir.Graph | ir.Function:
    return next((f for f in model.functions.values() if f.domain == "local"), model.graph)


def the(model: ir.Model, op_type: str) -> ir.Node:
    (found,) = (n for n in body(model) if n.op_type == op_type)
    return found


def values(found: ir.Node) -> tuple[list[str | None], list[str | None]]:
    assert found.domain == "v4c"
    return [v.name for v in found.inputs if v is not None], [v.name for v in found.outputs]


@pytest.mark.parametrize("in_function", [False, True])
@pytest.mark.parametrize("axis", [-1, None])
def test_norm_before_and_after(axis: int | None, in_function: bool) -> None:
    model = loaded(graph(enter("streams", axis=axis), in_function=in_function))
    assert operators(body(model)) == ["MHCPre", "RMSNormalization"]
    report = FuseMHCNorm().run(model)
    assert (report.rewritten, report.refusals) == (1, [])
    assert operators(body(model)) == ["MHCPreNorm"]
    fused = the(model, "MHCPreNorm")
    assert values(fused) == (["streams", *WEIGHTS], list(OUTPUTS))
    assert {n: a.value for n, a in fused.attributes.items()} == pytest.approx({**HYPER, "eps": 1e-3})


@pytest.mark.parametrize("in_function", [False, True])
def test_post_pre_before_and_after(in_function: bool) -> None:
    nodes = [leave(), enter_fused("mixed")]
    model = loaded(graph(nodes, {**OUTPUTS, "mixed": MIXED}, in_function))
    report = FuseMHCPostPre().run(model)
    assert (report.rewritten, report.refusals) == (1, [])
    assert operators(body(model)) == ["MHCPostPreNorm"]
    fused = the(model, "MHCPostPreNorm")
    assert values(fused) == (list(INPUTS), ["mixed", *OUTPUTS])
    assert {n: a.value for n, a in fused.attributes.items()} == pytest.approx({**HYPER, "eps": 1e-3})


def test_a_layer_of_two_sublayers() -> None:
    nodes = [
        *enter("streams", prefix="a_"),
        node("Neg", ["a_y"], "x"),
        leave(post="a_next_post", comb="a_next_comb"),
        *enter("mixed"),
        node("Abs", ["y"], "z"),
        leave("z", "mixed", "left", post="next_post", comb="next_comb"),
    ]
    proto = graph(nodes, {"left": MIXED})
    model = loaded(proto)
    assert [p.run(model).rewritten for p in (FuseMHCNorm(), FuseMHCPostPre())] == [2, 1]
    assert operators(model.graph) == ["MHCPreNorm", "Neg", "MHCPostPreNorm", "Abs", "MHCPost"]
    compare(proto, model, 2, 3, seed=7)


def refusals_of(a_pass: FuseMHCNorm | FuseMHCPostPre, model: ir.Model) -> list[str]:
    """Why the pass left `model` as it is."""
    before = operators(body(model))
    report = a_pass.run(model)
    assert report.rewritten == 0
    assert operators(body(model)) == before
    return report.refusals


@pytest.mark.parametrize(
    ("nodes", "outputs", "reason"),
    [
        (enter("streams", axis=1), OUTPUTS, "y: expected a norm over the last axis, found axis 1"),
        (enter("streams", norm="one"), OUTPUTS, "y: expected a weight per column, found one of shape [1]"),
        (
            [*enter("streams"), node("Neg", ["collapsed"], "more")],
            {**OUTPUTS, "more": ["B", "S", D]},
            "collapsed: expected collapsed to be read here only, found it is read by ['more']",
        ),
        (
            enter("streams"),
            {**OUTPUTS, "collapsed": ["B", "S", D]},
            "collapsed: expected collapsed to be read here only, found it is read by an output",
        ),
        (
            [*enter("streams"), node("RMSNormalization", ["collapsed", "norm"], "again", axis=-1)],
            {**OUTPUTS, "again": ["B", "S", D]},
            "collapsed: expected collapsed to be read here only, found it is read by ['again']",
        ),
        (
            [
                enter("streams")[0],
                node("ReduceMean", ["next_post"], "mean", keepdims=0),
                node("Mul", ["weight", "mean"], "norm"),
                enter("streams")[1],
            ],
            OUTPUTS,
            "y: expected weights that do not depend on the streams, found norm, which does",
        ),
    ],
)
def test_other_norms_are_left_alone_with_a_reason(
    nodes: list[onnx.NodeProto], outputs: dict[str, Shape], reason: str
) -> None:
    extra: dict[str, Shape] = {"one": [1], "weight": [D]}
    used = {name for n in nodes for name in n.input} - {name for n in nodes for name in n.output}
    shapes = {n: s for n, s in (INPUTS | extra).items() if n in used}
    model = loaded(model_of(nodes, shapes, outputs))
    for made in model.graph:
        for value in made.outputs:
            if value.name == "norm":
                value.shape = ir.Shape([D])
    assert reason in refusals_of(FuseMHCNorm(), model)


def test_a_norm_of_the_weights_is_not_meant() -> None:
    nodes = [enter("streams")[0], node("RMSNormalization", ["next_post", "base"], "y")]
    model = loaded(graph(nodes, {"y": ["B", "S", M], "collapsed": ["B", "S", D]}))
    assert refusals_of(FuseMHCNorm(), model) == []


def test_a_weight_of_unknown_shape_is_left_alone() -> None:
    model = ir.from_proto(graph(enter("streams"), in_function=True))
    (reason,) = refusals_of(FuseMHCNorm(), model)
    assert reason == "y: expected a weight per column, found norm of unknown shape"


def test_weights_made_from_the_mixed_streams_are_left_alone() -> None:
    nodes = [
        leave(),
        node("ReduceMean", ["mixed"], "mean", keepdims=0),
        node("Mul", ["fn", "mean"], "scaled"),
        enter_fused("mixed", fn="scaled"),
    ]
    (reason,) = refusals_of(FuseMHCPostPre(), loaded(graph(nodes)))
    assert reason == "y: expected weights that do not depend on the streams, found scaled, which does"


def test_an_entry_of_other_streams_is_left_alone() -> None:
    nodes = [leave(), node("Neg", ["mixed"], "other"), enter_fused("other")]
    assert refusals_of(FuseMHCPostPre(), loaded(graph(nodes))) == []


def test_one_of_two_entries_of_the_same_streams_is_fused() -> None:
    nodes = [leave(), enter_fused("mixed"), enter_fused("mixed", prefix="b_")]
    proto = graph(nodes, {**OUTPUTS, **{f"b_{n}": s for n, s in OUTPUTS.items()}})
    model = loaded(proto)
    assert FuseMHCPostPre().run(model).rewritten == 1
    assert operators(model.graph) == ["MHCPostPreNorm", "MHCPreNorm"]
    compare(proto, model, 1, 2, seed=3)


def compare(proto: onnx.ModelProto, model: ir.Model, batch: int, chunk: int, seed: int) -> None:
    """Same outputs in ONNX Runtime from random inputs."""
    rng = np.random.default_rng(seed)
    sizes = {"B": batch, "S": chunk}
    feeds = {
        i.name: rng.standard_normal([sizes.get(d.dim_param, d.dim_value) for d in i.type.tensor_type.shape.dim])
        for i in proto.graph.input
    }
    feeds = {n: a.astype(np.float32) for n, a in feeds.items()}
    for before, after in zip(run(proto, feeds), run(model, feeds), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 3), st.integers(1, 4), st.booleans(), st.integers(0, 2**32 - 1))
def test_same_numbers_with_and_without(batch: int, chunk: int, in_function: bool, seed: int) -> None:
    # Readers of what the fused operators give stand before the last operator each of them replaces.
    entry, norm = enter("mixed")
    nodes = [leave(), node("Neg", ["mixed"], "negative"), entry, node("Abs", ["next_post"], "size"), norm]
    outputs: dict[str, Shape] = {**OUTPUTS, "negative": MIXED, "size": ["B", "S", M]}
    proto = graph(nodes, outputs, in_function)
    model = loaded(proto)
    assert [p.run(model).rewritten for p in (FuseMHCNorm(), FuseMHCPostPre())] == [1, 1]
    assert sorted(operators(body(model))) == ["Abs", "MHCPostPreNorm", "Neg"]
    compare(proto, model, batch, chunk, seed)
