"""``fuse-topk-router`` before and after on small graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.passes.onnx_graphs import model_of, node, operators, run
from v4c.passes.onnx.fuse_topk_router import FuseTopKRouter

E, D = 7, 6
WEIGHTS = {"weight": np.zeros((E, D), np.float32), "bias": np.zeros(E, np.float32)}


def graph(
    top_k: int = 3, scaling: float = 2.5, second: str = "", perm: tuple[int, int] = (1, 0), weights: Any = WEIGHTS
) -> onnx.ModelProto:
    """Router as the exporter leaves it; `second` names another reader of the logits or of the transposed weight."""
    nodes = [
        node("Transpose", ["weight"], "transposed", perm=list(perm)),
        node("MatMul", ["x", "transposed"], "logits"),
        node("TopKRoute", ["logits", "bias"], ["weights", "indices"], "v4c", top_k=top_k, scaling=scaling),
    ]
    outputs: dict[str, Any] = {"weights": ["B", "S", top_k], "indices": ["B", "S", top_k]}
    if second == "output":
        outputs["logits"] = ["B", "S", E]
    elif second:
        nodes.append(node("Neg", [second], "other"))
        outputs["other"] = ["B", "S", E] if second == "logits" else [D, E]
    return model_of(nodes, {"x": ["B", "S", D]}, outputs, weights, integers=("indices",))


def test_before_and_after() -> None:
    model = ir.from_proto(graph(top_k=3, scaling=2.5))
    assert operators(model.graph) == ["Transpose", "MatMul", "TopKRoute"]
    report = FuseTopKRouter().run(model)
    assert (report.rewritten, report.refusals) == (1, [])
    (fused,) = model.graph
    assert (fused.domain, fused.op_type) == ("v4c", "TopKRouter")
    assert {n: a.value for n, a in fused.attributes.items()} == {"top_k": 3, "scaling": 2.5}
    assert [v.name for v in fused.inputs if v] == ["x", "weight", "bias"]
    assert [v.name for v in model.graph.outputs] == ["weights", "indices"]


@pytest.mark.parametrize(("second", "reader"), [("logits", "['other']"), ("output", "an output")])
def test_logits_with_another_reader_stay_with_a_reason(second: str, reader: str) -> None:
    model = ir.from_proto(graph(second=second))
    before = operators(model.graph)
    report = FuseTopKRouter().run(model)
    assert report.rewritten == 0
    assert report.refusals == [f"logits: expected logits to be read here only, found it is read by {reader}"]
    assert operators(model.graph) == before


def test_a_transposed_weight_with_another_reader_stays_for_it() -> None:
    model = ir.from_proto(graph(second="transposed"))
    assert FuseTopKRouter().run(model).rewritten == 1
    assert sorted(operators(model.graph)) == ["Neg", "TopKRouter", "Transpose"]


def test_logits_that_are_no_product_with_a_transposed_weight_are_left_alone() -> None:
    square = {"weight": np.zeros((D, E), np.float32), "bias": WEIGHTS["bias"]}
    model = ir.from_proto(graph(perm=(0, 1), weights=square))
    report = FuseTopKRouter().run(model)
    assert (report.rewritten, report.refusals) == (0, [])


@settings(deadline=None, max_examples=15)
@given(
    top_k=st.integers(1, E),
    scaling=st.floats(0.5, 4, width=32),
    batch=st.integers(1, 3),
    chunk=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
def test_same_numbers_with_and_without(top_k: int, scaling: float, batch: int, chunk: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = {n: rng.standard_normal(a.shape, dtype=np.float32) for n, a in WEIGHTS.items()}
    proto = graph(top_k, scaling, weights=weights)
    model = ir.from_proto(proto)
    assert FuseTopKRouter().run(model).rewritten == 1
    feeds = {"x": rng.standard_normal((batch, chunk, D), dtype=np.float32)}
    before, after = run(proto, feeds), run(model, feeds)
    np.testing.assert_allclose(after[0], before[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(after[1], before[1])
