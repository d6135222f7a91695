"""Work that leaves a function for the graph that calls it: `open-layer-borders` and `hoist-token-work`."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from tests.passes.onnx_graphs import function_of, model_of, node, operators, run
from v4c.passes.onnx.hoist_token_work import HoistTokenWork
from v4c.passes.onnx.hoisting import type_inputs
from v4c.passes.onnx.open_layer_borders import OpenLayerBorders

M, D, V = 2, 8, 11
MIX = (2 + M) * M
HC = {"fn": (MIX, M * D), "base": (MIX,), "scale": (3,)}


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def two_layers(engram: bool = False) -> onnx.ModelProto:
    """A function that collapses the streams, does something and writes back, called twice."""
    rng = np.random.default_rng()
    settings: dict[str, Any] = {"iterations": 3, "hc_eps": 1e-6, "norm_eps": 1e-6, "eps": 1e-6}
    start = [node("Add", ["streams", "streams"], "entered")] if engram else []
    body = [
        *start,
        node("MHCPreNorm", ["entered" if engram else "streams", "fn", "base", "scale", "norm"], ["y", "post", "comb"],
             domain="v4c", **settings),
        node("Sigmoid", ["y"], "out"),
        node("MHCPost", ["out", "entered" if engram else "streams", "post", "comb"], "new", domain="v4c"),
    ]  # fmt: skip
    formals = [*HC, "norm"]
    function = function_of("Layer", ["streams", *formals], ["new"], body)
    weights, calls, value = {}, [], "x"
    for layer in (1, 2):
        shapes: dict[str, tuple[int, ...]] = {**HC, "norm": (D,)}
        weights |= {f"{n}{layer}": normal(rng, s) for n, s in shapes.items()}
        calls.append(node("Layer", [value, *(f"{n}{layer}" for n in formals)], f"h{layer}", domain="local"))
        value = f"h{layer}"
    model = model_of(calls, {"x": ["b", "s", M, D]}, {"h2": ["b", "s", M, D]}, weights, [function])
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("h1", onnx.TensorProto.FLOAT, ["b", "s", M, D]))
    return model


def test_borders_of_layers_meet_in_the_main_graph() -> None:
    proto = two_layers()
    model = ir.from_proto(proto)
    type_inputs(model)
    assert OpenLayerBorders().run(model).rewritten == 2
    assert operators(model.graph) == ["MHCPreNorm", "Layer", "MHCPost", "MHCPreNorm", "Layer", "MHCPost"]
    (layer,) = (f for f in model.functions.values() if f.name == "Layer")
    assert operators(layer) == ["Sigmoid"]
    assert not {v.name for v in layer.inputs} & {*HC, "norm"}, "weights went with the nodes that read them"
    assert model.graph.outputs[0].name == "h2"
    feeds = {"x": normal(np.random.default_rng(), (2, 3, M, D))}
    np.testing.assert_allclose(run(model, feeds)[0], run(proto, feeds)[0], rtol=1e-6, atol=1e-6)


def test_a_layer_that_begins_otherwise_keeps_its_beginning() -> None:
    proto = two_layers(engram=True)
    model = ir.from_proto(proto)
    type_inputs(model)
    assert OpenLayerBorders().run(model).rewritten == 1
    assert operators(model.graph) == ["Layer", "MHCPost", "Layer", "MHCPost"]
    feeds = {"x": normal(np.random.default_rng(), (1, 2, M, D))}
    np.testing.assert_allclose(run(model, feeds)[0], run(proto, feeds)[0], rtol=1e-6, atol=1e-6)


def token_graph(from_input: bool) -> onnx.ModelProto:
    """Two calls of a function that looks a row up by token id (or by something it computes) and adds it."""
    ids = [] if from_input else [node("Cast", ["x"], "ids", to=onnx.TensorProto.INT64)]
    body = [*ids, node("Gather", ["table", "tokens" if from_input else "ids"], "rows", axis=0)]
    body.append(node("Add", ["x", "rows"], "y"))
    if not from_input:
        body.insert(1, node("Identity", ["tokens"], "unused"))
    shape: list[int | str] = ["b", "s", 1] if from_input else ["b", "s"]
    function = function_of("Layer", ["x", "tokens", "table"], ["y"], body)
    rng = np.random.default_rng()
    weights = {f"table{i}": normal(rng, (V, D) if from_input else (V,)) for i in (1, 2)}
    calls = [
        node("Layer", ["x", "tokens", "table1"], "h1", domain="local"),
        node("Layer", ["h1", "tokens", "table2"], "h2", domain="local"),
    ]
    inputs = {"x": shape, "tokens": ["b", "s"]}
    model = model_of(calls, inputs, {"h2": ["b", "s", D] if from_input else ["b", "s"]}, weights, [function],
                     integers=["tokens"])  # fmt: skip
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("h1", onnx.TensorProto.FLOAT, None))
    return model


def test_lookups_by_token_stand_at_the_head() -> None:
    proto = token_graph(from_input=True)
    model = ir.from_proto(proto)
    type_inputs(model)
    assert HoistTokenWork().run(model).rewritten == 1
    assert operators(model.graph) == ["Gather", "Gather", "Layer", "Layer"]
    (layer,) = (f for f in model.functions.values() if f.name == "Layer")
    assert [v.name for v in layer.inputs] == ["x", "rows"]
    rng = np.random.default_rng()
    feeds = {"x": normal(rng, (2, 3, 1)), "tokens": rng.integers(0, V, (2, 3))}
    np.testing.assert_array_equal(run(model, feeds)[0], run(proto, feeds)[0])


def test_a_table_that_is_cast_is_cast_before() -> None:
    proto = token_graph(from_input=True)
    for call in proto.graph.node:
        call.input[2] += ".float"
    casts = [node("Cast", [f"table{i}"], f"table{i}.float", to=onnx.TensorProto.FLOAT) for i in (1, 2)]
    nodes = [casts[0], proto.graph.node[0], casts[1], proto.graph.node[1]]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    model = ir.from_proto(proto)
    type_inputs(model)
    assert HoistTokenWork().run(model).rewritten == 1
    assert operators(model.graph).index("Gather") < operators(model.graph).index("Layer")
    rng = np.random.default_rng()
    feeds = {"x": normal(rng, (2, 3, 1)), "tokens": rng.integers(0, V, (2, 3))}
    np.testing.assert_array_equal(run(model, feeds)[0], run(proto, feeds)[0])


def test_lookups_by_what_a_layer_computes_stay() -> None:
    model = ir.from_proto(token_graph(from_input=False))
    type_inputs(model)
    assert HoistTokenWork().run(model).rewritten == 0
    assert operators(model.graph) == ["Layer", "Layer"]


def test_state_that_hoisted_work_writes_keeps_its_name() -> None:
    """An output of the function that hoisted work gives is given by that work; the calls lose it."""
    body = [node("Gather", ["table", "tokens"], "rows", axis=0), node("Add", ["x", "rows"], "y")]
    function = function_of("Layer", ["x", "tokens", "table"], ["rows", "y"], body)
    calls = [node("Layer", ["x", "tokens", "table1"], ["present", "out"], domain="local")]
    weights = {"table1": normal(np.random.default_rng(), (V, D))}
    outputs = {"present": ["b", "s", D], "out": ["b", "s", D]}
    proto = model_of(calls, {"x": ["b", "s", D], "tokens": ["b", "s"]}, outputs, weights, [function], ["tokens"])
    model = ir.from_proto(proto)
    type_inputs(model)
    HoistTokenWork().run(model)
    assert operators(model.graph) == ["Gather", "Layer"]
    assert [v.name for v in model.graph.outputs] == ["present", "out"]
    assert [len(n.outputs) for n in model.graph] == [1, 1]
    rng = np.random.default_rng()
    feeds = {"x": normal(rng, (2, 3, D)), "tokens": rng.integers(0, V, (2, 3))}
    for found, expected in zip(run(model, feeds), run(proto, feeds), strict=True):
        np.testing.assert_array_equal(found, expected)
