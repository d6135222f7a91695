"""``merge-compressors`` before and after on small graphs: what it merges, what it leaves, and where the pair stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from v4c.custom_ops import OPS
from v4c.custom_ops.kv_compress_pair import KV_COMPRESS_PAIR
from v4c.passes.onnx.merge_compressors import MergeCompressors
from v4c.passes.onnx.rewriting import PassReport

RATIO, PAIRS = 3, 2
WIDTHS = {"a": 6, "b": 4, "c": 5, "d": 7}
"""The row width of each compressor; windows overlap."""
STATES = ("state_kv", "state_gate", "rows")
INTEGERS = ("positions", "other_positions", "lengths")


def own_shapes(prefix: str) -> dict[str, list[Any]]:
    width = WIDTHS[prefix]
    shapes: dict[str, list[Any]] = {
        "kv": ["batch", "chunk", 2 * width],
        "gate": ["batch", "chunk", 2 * width],
        "bias": [RATIO, 2 * width],
        "norm": [width],
        "state_kv": ["batch", 2 * RATIO, 2 * width],
        "state_gate": ["batch", 2 * RATIO, 2 * width],
        "rows": ["batch", "capacity", width],
    }
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


SHAPES: dict[str, list[Any]] = {name: shape for prefix in WIDTHS for name, shape in own_shapes(prefix).items()}
SHAPES |= {"inv_freq": [PAIRS], "other_inv_freq": [PAIRS]} | {name: ["batch"] for name in INTEGERS}


def compressor(prefix: str, attributes: dict[str, Any] | None = None, **changed: str) -> onnx.NodeProto:
    """A compressor with inputs ``<prefix>.<name>`` and outputs ``<prefix>.new_<state>``; `changed` inputs by name."""
    shared = {name: name for name in ("inv_freq", "positions", "lengths")}
    names = [changed.get(n, shared.get(n, f"{prefix}.{n}")) for n in OPS["KVCompress"].inputs]
    outputs = [f"{prefix}.new_{state}" for state in STATES]
    attributes = {"ratio": RATIO, "eps": 1e-5} | (attributes or {})
    return helper.make_node("KVCompress", names, outputs, name=prefix, domain="v4c", **attributes)


def model_of(nodes: Sequence[onnx.NodeProto], outputs: Sequence[str], functions: Sequence[Any] = ()) -> Any:
    """A checked model of `nodes`; every input of `SHAPES` is there, read or not. An output is a state or ``last``."""
    inputs = [
        helper.make_tensor_value_info(n, TensorProto.INT64 if n in INTEGERS else TensorProto.FLOAT, shape)
        for n, shape in SHAPES.items()
    ]
    made = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, SHAPES["a.rows" if n == "last" else n.replace("new_", "")])
        for n in outputs
    ]
    graph = helper.make_graph(nodes, "g", inputs, made)
    opsets = [helper.make_opsetid(d, v) for d, v in (("", 23), ("v4c", 1), ("v4c.parts", 1))]
    bodies = [f.to_function_proto() for f in OPS["KVCompress"].functions]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11, functions=[*bodies, *functions])
    onnx.checker.check_model(model)
    return model


def states_of(*prefixes: str) -> list[str]:
    return [f"{prefix}.new_{state}" for prefix in prefixes for state in STATES]


def merged(proto: Any) -> tuple[ir.Model, PassReport]:
    """`proto` after the pass, checked: nodes in order, the pair's body attached."""
    model = ir.from_proto(proto)
    report = MergeCompressors().run(model)
    for function in KV_COMPRESS_PAIR.functions:
        made = ir.from_proto(function.to_function_proto())
        model.functions[made.identifier()] = made
    onnx.checker.check_model(ir.to_proto(model))  # includes the order of the nodes
    return model, report


def operators(nodes: Any) -> list[str]:
    return [n.op_type for n in nodes]


def test_before_and_after() -> None:
    model, report = merged(model_of([compressor("a"), compressor("b")], states_of("a", "b")))
    assert (report.name, report.rewritten, report.refusals) == ("merge-compressors", 1, [])
    (node,) = model.graph
    assert (node.domain, node.op_type) == ("v4c", "KVCompressPair")
    assert {n: a.value for n, a in node.attributes.items()} == {"ratio": RATIO, "eps": pytest.approx(1e-5)}
    assert [v.name for v in node.inputs if v] == [
        *(f"{p}.{n}" for p in "ab" for n in ("kv", "gate", "bias", "norm", *STATES)),
        "inv_freq", "positions", "lengths",
    ]  # fmt: skip
    assert [v.name for v in node.outputs] == states_of("a", "b")
    assert [v.name for v in model.graph.outputs] == states_of("a", "b")


def test_the_first_in_the_graph_is_the_first_of_the_pair() -> None:
    model, _ = merged(model_of([compressor("b"), compressor("a")], states_of("a", "b")))
    (node,) = model.graph
    assert [v.name for v in node.outputs] == states_of("b", "a")
    assert [v.name for v in model.graph.outputs] == states_of("a", "b")


def nested(value: str) -> list[onnx.NodeProto]:
    """``nested`` = the absolute of `value`, read inside of both branches of an If."""
    branches = [
        helper.make_graph(
            [helper.make_node("Abs", [value], [f"inner{side}"])],
            "branch", [], [helper.make_tensor_value_info(f"inner{side}", TensorProto.FLOAT, None)],
        )
        for side in range(2)
    ]  # fmt: skip
    return [
        helper.make_node("ReduceSum", ["lengths"], ["total"], keepdims=0),
        helper.make_node("Cast", ["total"], ["any"], to=TensorProto.BOOL),
        helper.make_node("If", ["any"], ["nested"], then_branch=branches[0], else_branch=branches[1]),
    ]


def between() -> Any:
    """Readers of the first stand before an input of the second, so that the pair can stand nowhere without a move."""
    nodes = [
        compressor("a"),
        helper.make_node("Neg", ["a.new_rows"], ["read"]),
        *nested("a.new_rows"),
        helper.make_node("Sin", ["b.kv"], ["ready"]),
        compressor("b", kv="ready"),
        helper.make_node("Add", ["read", "nested"], ["last"]),
    ]
    return model_of(nodes, [*states_of("a", "b"), "last"])


def test_readers_of_the_first_move_behind_the_pair() -> None:
    model, report = merged(between())
    assert (report.rewritten, report.refusals) == (1, [])
    order = operators(model.graph)
    assert sorted(order) == sorted(["ReduceSum", "Cast", "Sin", "KVCompressPair", "Neg", "If", "Add"])
    pair = order.index("KVCompressPair")
    assert order.index("Sin") < pair < min(order.index("Neg"), order.index("If"))


def chain(read: Sequence[onnx.NodeProto], value: str, target: str) -> list[onnx.NodeProto]:
    """``chained`` = `target` plus a number made of `value`, by way of the nodes `read`."""
    return [
        *read,
        helper.make_node("ReduceSum", [value], ["sum"], keepdims=0),
        helper.make_node("Add", [target, "sum"], ["chained"]),
    ]


def test_each_layer_of_one_graph_makes_a_pair() -> None:
    nodes = [compressor("a"), compressor("b"), *chain([], "b.new_rows", "c.kv")]
    nodes += [compressor("c", kv="chained"), compressor("d")]
    model, report = merged(model_of(nodes, states_of("a", "b", "c", "d")))
    assert (report.rewritten, report.refusals) == (2, [])
    assert operators(model.graph) == ["KVCompressPair", "ReduceSum", "Add", "KVCompressPair"]
    pairs = [n for n in model.graph if n.op_type == "KVCompressPair"]
    assert [[v.name for v in n.outputs] for n in pairs] == [states_of("a", "b"), states_of("c", "d")]


def test_functions_are_rewritten_but_not_bodies_of_ops() -> None:
    inputs, outputs = [n for n in SHAPES if n[0] in "abilp"], states_of("a", "b")
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("v4c", 1)]
    layers = [
        helper.make_function(domain, name, inputs, outputs, [compressor("a"), compressor("b")], opsets)
        for domain, name in (("v4c.parts", "Layer"), ("v4c", "Body"))
    ]
    call = helper.make_node("Layer", inputs, outputs, domain="v4c.parts")
    model, report = merged(model_of([call], outputs, layers))
    assert report.rewritten == 1
    assert operators(model.functions["v4c.parts", "Layer", ""]) == ["KVCompressPair"]
    assert operators(model.functions["v4c", "Body", ""]) == ["KVCompress", "KVCompress"]


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ([compressor("a"), compressor("b", {"eps": 0.5})], "a: expected eps 0.5 as in b, found"),
        ([compressor("a", {"ratio": 5}), compressor("b")], "a: expected ratio 3 as in b, found 5"),
        (
            [compressor("a"), compressor("b", inv_freq="other_inv_freq")],
            "a: expected inv_freq other_inv_freq as in b, found inv_freq",
        ),
        (
            [compressor("a"), compressor("b", positions="other_positions")],
            "a: expected positions other_positions as in b, found positions",
        ),
        (
            [compressor("a", lengths="other_positions"), compressor("b")],
            "a: expected lengths lengths as in b, found other_positions",
        ),
        (
            [compressor("a"), *chain([], "a.new_rows", "b.kv"), compressor("b", kv="chained")],
            "a: expected a compressor that does not depend on it, found b",
        ),
        (
            [compressor("a"), *chain(nested("a.new_rows"), "nested", "b.kv"), compressor("b", kv="chained")],
            "a: expected a compressor that does not depend on it, found b",
        ),
        (
            [compressor("a"), helper.make_node("Neg", ["b.rows"], ["old"], name="reader"), compressor("b")],
            "a: expected b.rows read by b alone, found reader",
        ),
    ],
)
def test_compressors_that_do_not_fit_are_left_alone_with_a_reason(nodes: list[onnx.NodeProto], reason: str) -> None:
    model, report = merged(model_of(nodes, states_of("a", "b")))
    assert report.rewritten == 0
    (refusal,) = report.refusals
    assert refusal.startswith(reason)
    assert operators(model.graph) == [n.op_type for n in nodes]


def test_a_compressor_of_its_own_is_no_near_miss() -> None:
    _, report = merged(model_of([compressor("a")], states_of("a")))
    assert (report.rewritten, report.refusals) == (0, [])


def test_the_shape_of_a_state_may_be_read() -> None:
    nodes = [compressor("a"), helper.make_node("Shape", ["b.rows"], ["dims"]), compressor("b")]
    model, report = merged(model_of(nodes, states_of("a", "b")))
    assert (report.rewritten, report.refusals) == (1, [])
    assert operators(model.graph) == ["Shape", "KVCompressPair"]


def test_one_that_fits_further_on_is_found() -> None:
    nodes = [compressor("a"), compressor("c", positions="other_positions"), compressor("b")]
    model, report = merged(model_of(nodes, states_of("a", "b", "c")))
    assert (report.rewritten, report.refusals) == (1, [])
    assert operators(model.graph) == ["KVCompress", "KVCompressPair"]


@settings(deadline=None, max_examples=10)
@given(batch=st.integers(1, 3), chunk=st.integers(1, 8), seed=st.integers(0, 2**32))
def test_same_numbers_with_and_without(batch: int, chunk: int, seed: int) -> None:
    proto = between()
    model, report = merged(proto)
    assert report.rewritten == 1
    rng = np.random.default_rng(seed)
    sizes = {"batch": batch, "chunk": chunk, "capacity": 8}
    feeds: dict[str, Any] = {
        n: rng.standard_normal([sizes.get(d, d) for d in shape], dtype=np.float32) for n, shape in SHAPES.items()
    }
    feeds |= {"positions": rng.integers(0, 12, batch), "other_positions": np.zeros(batch, np.int64)}
    feeds["lengths"] = rng.integers(0, chunk + 1, batch)
    before = ort.InferenceSession(proto.SerializeToString()).run(None, feeds)
    after = ort.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, feeds)
    for ours, expected in zip(after, before, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
