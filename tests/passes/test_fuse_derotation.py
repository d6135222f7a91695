"""``fuse-derotation`` before and after on small graphs of each attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from tests.passes.attention_graph import (
    ATTRIBUTES,
    KINDS,
    SIZES,
    SPECS,
    attention,
    evaluate,
    model_of,
    names,
    node_of,
    operators,
    random_feeds,
    rope,
)
from v4c.custom_ops import OPS
from v4c.passes.onnx.fuse_derotation import FuseDerotation

DEROTATED = {
    "CompressedSparseAttention": "DerotatedCSA",
    "HeavilyCompressedAttention": "DerotatedHCA",
    "SlidingWindowAttention": "DerotatedSlidingAttention",
}
OUTPUTS = {"y": SPECS["out"], "window_out": SPECS["window_out"]}


def derotation_graph(kind: str, extra: Any = (), outputs: Any = OUTPUTS, **changes: Any) -> ir.Model:
    """An attention and the `TrailingRope` of its outputs; `changes` are those of the rotation."""
    turned = rope("out", "y", **{"sign": -1.0, **changes})
    return model_of([attention(kind), turned, *extra], outputs, {})


@pytest.mark.parametrize("in_function", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_before_and_after(kind: str, in_function: bool) -> None:
    model = model_of([attention(kind), rope("out", "y", -1.0)], OUTPUTS, {}, in_function)
    assert operators(model) == [kind, "TrailingRope"]
    report = FuseDerotation().run(model)
    assert (report.rewritten, report.refusals) == (1, [])
    assert operators(model) == [DEROTATED[kind]]
    node = node_of(model, DEROTATED[kind])
    assert node.domain == "v4c"
    assert {n: a.value for n, a in node.attributes.items()} == pytest.approx(ATTRIBUTES[kind])
    assert names(node.inputs) == [*OPS[kind].inputs, "inv_freq"]
    assert names(node.outputs) == ["y", "window_out"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sign": 1.0}, "y: expected a rotation back, found sign 1.0"),
        ({"positions": "other_positions"}, "y: expected the attention's positions positions, found other_positions"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_other_rotations_are_left_alone_with_a_reason(kind: str, changes: dict[str, Any], reason: str) -> None:
    model = derotation_graph(kind, **changes)
    report = FuseDerotation().run(model)
    assert (report.rewritten, report.refusals) == (0, [reason])
    assert operators(model) == [kind, "TrailingRope"]


@pytest.mark.parametrize("as_output", [False, True])
def test_outputs_that_are_also_read_unrotated_are_left_alone(as_output: bool) -> None:
    extra = [] if as_output else [helper.make_node("Neg", ["out"], ["other"], name="reader")]
    outputs = {**OUTPUTS, "out" if as_output else "other": SPECS["out"]}
    model = derotation_graph(KINDS[0], extra, outputs)
    before = operators(model)
    report = FuseDerotation().run(model)
    assert report.rewritten == 0
    assert "expected out to be read here only" in report.refusals[0]
    assert operators(model) == before


def test_rotations_of_anything_else_are_no_business_of_it() -> None:
    model = model_of([attention(KINDS[0], q="turned"), rope("q", "turned", 1.0)][::-1], {"out": SPECS["out"]}, {})
    report = FuseDerotation().run(model)
    assert (report.rewritten, report.refusals) == (0, [])


def test_a_reader_of_the_window_between_the_two_stays_in_order() -> None:
    reader = helper.make_node("Neg", ["window_out"], ["negative"])
    outputs = {"y": SPECS["out"], "negative": SPECS["window_out"]}
    model = model_of([attention(KINDS[2]), reader, rope("out", "y", -1.0)], outputs, {})
    feeds = random_feeds(2, 3, seed=5)
    expected = evaluate(model, feeds)
    assert FuseDerotation().run(model).rewritten == 1
    assert operators(model) == [DEROTATED[KINDS[2]], "Neg"]
    for array, other in zip(evaluate(model, feeds), expected, strict=True):
        np.testing.assert_allclose(array, other, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(kind=st.sampled_from(KINDS), sizes=SIZES)
def test_same_numbers_with_and_without(kind: str, sizes: tuple[int, int, int]) -> None:
    model, feeds = derotation_graph(kind), random_feeds(*sizes)
    expected = evaluate(model, feeds)
    assert FuseDerotation().run(model).rewritten == 1
    for array, other in zip(evaluate(model, feeds), expected, strict=True):
        np.testing.assert_allclose(array, other, rtol=1e-5, atol=1e-5)
