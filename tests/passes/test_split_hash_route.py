"""``split-hash-route`` before and after on small graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.passes.onnx_graphs import model_of, node, operators, run
from v4c.passes.onnx.split_hash_route import SplitHashRoute

E, D, K, V = 7, 6, 3, 11
WEIGHTS = {"weight": np.zeros((E, D), np.float32), "table": np.zeros((V, K), np.int64)}


def graph(scaling: float = 2.5, second: str = "", weights: Any = WEIGHTS) -> onnx.ModelProto:
    """Router as the exporter leaves it; `second` names another reader of the logits: an operator, or ``output``."""
    nodes = [
        node("Transpose", ["weight"], "transposed", perm=[1, 0]),
        node("MatMul", ["x", "transposed"], "logits"),
        node("HashRoute", ["logits", "input_ids", "table"], ["weights", "indices"], "v4c", scaling=scaling),
    ]
    outputs: dict[str, Any] = {"weights": ["B", "S", K], "indices": ["B", "S", K]}
    if second:
        name = "logits" if second == "output" else "other"
        outputs[name] = ["B", "S", E]
    if second not in ("", "output"):
        nodes.append(node(second, ["logits"], "other"))
    inputs: dict[str, Any] = {"x": ["B", "S", D], "input_ids": ["B", "S"]}
    return model_of(nodes, inputs, outputs, weights, integers=("input_ids", "indices"))


def test_before_and_after() -> None:
    model = ir.from_proto(graph(scaling=2.5))
    assert operators(model.graph) == ["Transpose", "MatMul", "HashRoute"]
    report = SplitHashRoute().run(model)
    assert (report.rewritten, report.refusals) == (1, [])
    lookup, router = model.graph
    assert (lookup.domain, lookup.op_type, lookup.attributes["axis"].value) == ("", "Gather", 0)
    assert [v.name for v in lookup.inputs if v] == ["table", "input_ids"]
    assert (router.domain, router.op_type) == ("v4c", "HashRouter")
    assert {n: a.value for n, a in router.attributes.items()} == {"scaling": 2.5}
    assert [v.name for v in router.inputs if v] == ["x", "weight", "indices"]
    assert [v.name for v in model.graph.outputs] == ["weights", "indices"]


def test_the_lookup_depends_on_the_token_ids_alone() -> None:
    model = ir.from_proto(graph())
    SplitHashRoute().run(model)
    (lookup,) = (n for n in model.graph if n.op_type == "Gather")
    assert all(v is not None and v.producer() is None for v in lookup.inputs)
    assert lookup.outputs[0].dtype == ir.DataType.INT64


@pytest.mark.parametrize(("second", "reader"), [("Neg", "['other']"), ("output", "an output")])
def test_logits_with_another_reader_stay_with_a_reason(second: str, reader: str) -> None:
    model = ir.from_proto(graph(second=second))
    before = operators(model.graph)
    report = SplitHashRoute().run(model)
    assert report.rewritten == 0
    assert report.refusals == [f"logits: expected logits to be read here only, found it is read by {reader}"]
    assert operators(model.graph) == before


@settings(deadline=None, max_examples=15)
@given(
    scaling=st.floats(0.5, 4, width=32), batch=st.integers(1, 3), chunk=st.integers(1, 5), seed=st.integers(0, 2**32)
)
def test_same_numbers_with_and_without(scaling: float, batch: int, chunk: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = {
        "weight": rng.standard_normal((E, D), dtype=np.float32),
        "table": np.stack([rng.permutation(E)[:K] for _ in range(V)]),
    }
    proto = graph(scaling, weights=weights)
    model = ir.from_proto(proto)
    assert SplitHashRoute().run(model).rewritten == 1
    feeds: dict[str, np.ndarray] = {
        "x": rng.standard_normal((batch, chunk, D), dtype=np.float32),
        "input_ids": rng.integers(0, V, (batch, chunk)),
    }
    before, after = run(proto, feeds), run(model, feeds)
    np.testing.assert_allclose(after[0], before[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(after[1], before[1])
