"""``merge-projections`` before and after: in a graph, in a shared function, and where it must not."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.passes.onnx_graphs import function_of, model_of, node, operators, run
from v4c.passes.onnx.hoisting import type_inputs
from v4c.passes.onnx.merge_projections import MergeProjections

K = 6


def products(names: list[str], x: str = "x") -> list:
    made = []
    for name in names:
        made += [node("Transpose", [f"w{name}"], f"t{name}", perm=[1, 0]), node("MatMul", [x, f"t{name}"], f"y{name}")]
    return made


def weights(sizes: dict[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"w{n}": rng.standard_normal((size, K)).astype(np.float32) for n, size in sizes.items()}


def test_in_a_graph() -> None:
    sizes = {"a": 3, "b": 1, "c": 5}
    model = model_of(products([*sizes]), {"x": [2, K]}, {f"y{n}": [2, s] for n, s in sizes.items()}, weights(sizes))
    graph = ir.from_proto(model)
    report = MergeProjections().run(graph)
    assert (report.rewritten, report.refusals) == (1, [])
    assert operators(graph.graph) == ["Concat", "Transpose", "MatMul", "Split"]
    concat, split = graph.graph[0], graph.graph[-1]
    assert [v.name for v in concat.inputs] == ["wa", "wb", "wc"]
    assert [v.name for v in split.outputs] == ["ya", "yb", "yc"]
    assert [v.name for v in graph.graph.outputs] == ["ya", "yb", "yc"]


def test_in_a_function_the_join_moves_to_the_calls() -> None:
    """The function takes one joined weight; each call joins its own."""
    body = [*products(["a", "b"]), node("Add", ["ya", "yb"], "y")]
    function = function_of("Block", ["x", "wa", "wb"], ["y"], body)
    stored = {**weights({"a1": 4, "b1": 4}), **weights({"a2": 4, "b2": 4}, seed=1)}
    calls = [
        node("Block", ["x", "wa1", "wb1"], "h", domain="local"),
        node("Block", ["x", "wa2", "wb2"], "z", domain="local"),
        node("Add", ["h", "z"], "out"),
    ]  # fmt: skip
    model = model_of(calls, {"x": [3, K]}, {"out": [3, 4]}, stored, [function])
    graph = ir.from_proto(model)
    type_inputs(graph)
    assert MergeProjections().run(graph).rewritten == 1
    assert operators(graph.graph) == ["Concat", "Block", "Concat", "Block", "Add"]
    (block,) = (f for f in graph.functions.values() if f.name == "Block")
    assert [v.name for v in block.inputs] == ["x", "ya.merged.weights"]
    assert operators(block) == ["Transpose", "MatMul", "Split", "Add"]
    feeds = {"x": np.random.default_rng(2).standard_normal((3, K)).astype(np.float32)}
    np.testing.assert_allclose(run(graph, feeds)[0], run(model, feeds)[0], rtol=1e-5, atol=1e-5)


def test_a_weight_with_another_reader_is_left_alone_with_a_reason() -> None:
    nodes = [*products(["a", "b"]), node("Add", ["wa", "wa"], "twice")]
    outputs = {"ya": [2, 3], "yb": [2, 3], "twice": [3, K]}
    graph = ir.from_proto(model_of(nodes, {"x": [2, K]}, outputs, weights({"a": 3, "b": 3})))
    report = MergeProjections().run(graph)
    assert report.rewritten == 0
    assert operators(graph.graph) == ["Transpose", "MatMul", "Transpose", "MatMul", "Add"]
    assert report.refusals == ["ya: expected wa to be read by this product only, found 3 readers"]


@pytest.mark.parametrize("inputs", [{"x": [2, K], "z": [2, K]}, {"x": [2, K]}])
def test_products_of_different_inputs_and_single_ones_stay(inputs: dict[str, list[int]]) -> None:
    nodes = products(["a"]) + (products(["b"], "z") if "z" in inputs else [])
    outputs = {"ya": [2, 3], **({"yb": [2, 3]} if "z" in inputs else {})}
    graph = ir.from_proto(model_of(nodes, inputs, outputs, weights({"a": 3, "b": 3})))
    before = operators(graph.graph)
    assert MergeProjections().run(graph).rewritten == 0
    assert operators(graph.graph) == before


@settings(deadline=None, max_examples=10)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_same_numbers(sizes: list[int], rows: int, seed: int) -> None:
    named = {f"{i}": n for i, n in enumerate(sizes)}
    outputs = {f"y{n}": [rows, size] for n, size in named.items()}
    model = model_of(products([*named]), {"x": [rows, K]}, outputs, weights(named, seed))
    graph = ir.from_proto(model)
    MergeProjections().run(graph)
    feeds = {"x": np.random.default_rng(seed + 1).standard_normal((rows, K)).astype(np.float32)}
    for found, expected in zip(run(graph, feeds), run(model, feeds), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
