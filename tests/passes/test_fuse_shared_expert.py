"""``fuse-shared-expert`` before and after on small graphs, in the main graph and in a layer function."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.passes.onnx_graphs import Shape, function_of, model_of, node, operators, run
from v4c.passes.onnx.fuse_shared_expert import FuseSharedExpert
from v4c.passes.onnx.hoisting import type_inputs

E, K, D, F, G = 4, 2, 6, 5, 3
ROW: Shape = ["B", "S", D]
INPUTS: dict[str, Shape] = {
    "x": ROW, "other_x": ROW, "weights": ["B", "S", K], "indices": ["B", "S", K], "gate_up": [E, 2 * F, D],
    "down": [E, D, F], "gate": [G, D], "up": [G, D], "shared_down": [D, G],
}  # fmt: skip
BEFORE = ["GroupedExperts", *["Transpose"] * 3, *["MatMul"] * 2, "ClampedSwiGLU", "MatMul", "Add"]
FUSED = ["x", "weights", "indices", "gate_up", "down", "y.shared_gate_up", "shared_down"]


def nodes(
    limit: float = 2.0, shared_limit: float | None = None, gate_x: str = "x", up_x: str = "x", swapped: bool = False
) -> list[onnx.NodeProto]:
    """Routed and shared experts as the exporter and ``fuse-swiglu`` leave them."""
    ends = ["routed", "shared"]
    return [
        node("GroupedExperts", ["x", "weights", "indices", "gate_up", "down"], "routed", "v4c", limit=limit),
        *(node("Transpose", [n], f"{n}_t", perm=[1, 0]) for n in ("gate", "up", "shared_down")),
        node("MatMul", [gate_x, "gate_t"], "g"),
        node("MatMul", [up_x, "up_t"], "u"),
        node("ClampedSwiGLU", ["g", "u"], "hidden", "v4c", limit=limit if shared_limit is None else shared_limit),
        node("MatMul", ["hidden", "shared_down_t"], "shared"),
        node("Add", ends[::-1] if swapped else ends, "y"),
    ]


def graph(extra: list[Any] | None = None, outputs: dict[str, Shape] | None = None, **options: Any) -> onnx.ModelProto:
    return model_of([*nodes(**options), *(extra or [])], INPUTS, {"y": ROW, **(outputs or {})}, integers=("indices",))


def fused(model: ir.Model) -> ir.Node:
    (found,) = (n for n in model.graph if n.op_type == "MixtureOfExperts")
    return found


@pytest.mark.parametrize("swapped", [False, True])
def test_before_and_after(swapped: bool) -> None:
    model = ir.from_proto(graph(limit=3.0, swapped=swapped))
    assert operators(model.graph) == BEFORE
    report = FuseSharedExpert().run(model)
    assert (report.rewritten, report.refusals) == (1, [])
    assert operators(model.graph) == ["Concat", "MixtureOfExperts"]
    mixture = fused(model)
    assert mixture.domain == "v4c"
    assert {n: a.value for n, a in mixture.attributes.items()} == {"limit": 3.0}
    assert [v.name for v in mixture.inputs if v] == FUSED
    (join,) = (n for n in model.graph if n.op_type == "Concat")
    assert [v.name for v in join.inputs if v] == ["gate", "up"]
    assert join.attributes["axis"].value == 0
    assert join.outputs[0].shape == ir.Shape([2 * G, D])
    assert [v.name for v in model.graph.outputs] == ["y"]


def test_in_a_function_the_weights_are_joined_at_every_call() -> None:
    layer = function_of("Layer", list(INPUTS), ["y"], nodes())
    renamed = [n if n != "gate" else "gate2" for n in INPUTS]
    calls = [node("Layer", list(INPUTS), "y1", "local"), node("Layer", renamed, "y2", "local")]
    proto = model_of(
        calls, INPUTS | {"gate2": [G, D]}, {"y1": ROW, "y2": ROW}, functions=[layer], integers=("indices",)
    )
    model = ir.from_proto(proto)
    type_inputs(model)
    report = FuseSharedExpert().run(model)
    assert (report.rewritten, report.refusals) == (1, [])
    (function,) = (f for f in model.functions.values() if f.domain == "local")
    assert operators(function) == ["MixtureOfExperts"]
    assert operators(model.graph) == ["Concat", "Layer", "Concat", "Layer"]
    joined = [[v.name for v in n.inputs if v] for n in model.graph if n.op_type == "Concat"]
    assert joined == [["gate", "up"], ["gate2", "up"]]
    feeds = numbers(INPUTS | {"gate2": [G, D]}, 2, 3, 0)
    for before, after in zip(run(proto, feeds), run(model, feeds), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"shared_limit": 1.0},
            "y: expected one limit, found 2.0 of the routed experts, 1.0 of the shared one",
        ),
        ({"gate_x": "other_x"}, "y: expected all experts to read x, found the shared one reads other_x"),
        ({"up_x": "other_x"}, "y: expected all experts to read x, found the shared one reads other_x"),
        (
            {"extra": [node("Neg", ["gate"], "n")], "outputs": {"n": [G, D]}},
            "y: expected gate to be read by the shared expert only, found other readers",
        ),
        (
            {"extra": [node("Neg", ["up_t"], "n")], "outputs": {"n": [D, G]}},
            "y: expected up to be read by the shared expert only, found other readers",
        ),
    ],
)
def test_other_sums_are_left_alone_with_a_reason(options: dict[str, Any], reason: str) -> None:
    model = ir.from_proto(graph(**options))
    before = operators(model.graph)
    report = FuseSharedExpert().run(model)
    assert (report.rewritten, report.refusals) == (0, [reason])
    assert operators(model.graph) == before


@pytest.mark.parametrize("value", ["routed", "g", "u", "hidden", "shared"])
@pytest.mark.parametrize("as_output", [False, True])
def test_intermediate_values_with_other_readers_stay_with_a_reason(value: str, as_output: bool) -> None:
    shape: Shape = ["B", "S", G] if value in ("g", "u", "hidden") else ROW
    if as_output:
        model = ir.from_proto(graph(outputs={value: shape}))
    else:
        model = ir.from_proto(graph([node("Neg", [value], "n")], {"n": shape}))
    before = operators(model.graph)
    report = FuseSharedExpert().run(model)
    reader = "an output" if as_output else "['n']"
    assert report.rewritten == 0
    assert report.refusals == [f"{value}: expected {value} to be read here only, found it is read by {reader}"]
    assert operators(model.graph) == before


def test_a_sum_of_something_else_is_left_alone() -> None:
    changed = [n for n in nodes() if n.op_type != "ClampedSwiGLU"]
    changed.insert(-2, node("Mul", ["g", "u"], "hidden"))
    model = ir.from_proto(model_of(changed, INPUTS, {"y": ROW}, integers=("indices",)))
    report = FuseSharedExpert().run(model)
    assert (report.rewritten, report.refusals) == (0, [])


def numbers(shapes: dict[str, Shape], batch: int, chunk: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes: dict[Any, Any] = {"B": batch, "S": chunk}
    feeds = {n: rng.standard_normal([sizes.get(d, d) for d in s], dtype=np.float32) for n, s in shapes.items()}
    return feeds | {"indices": rng.integers(-1, E, (batch, chunk, K))}


@settings(deadline=None, max_examples=15)
@given(
    limit=st.floats(0.25, 20, width=32),
    swapped=st.booleans(),
    batch=st.integers(1, 3),
    chunk=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
def test_same_numbers_with_and_without(limit: float, swapped: bool, batch: int, chunk: int, seed: int) -> None:
    proto = graph(limit=limit, swapped=swapped)
    model = ir.from_proto(proto)
    assert FuseSharedExpert().run(model).rewritten == 1
    feeds = numbers(INPUTS, batch, chunk, seed)
    (before,), (after,) = run(proto, feeds), run(model, feeds)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5 * max(1.0, float(np.abs(before).max())))
