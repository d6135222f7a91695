"""``fuse-rotary-query-kv`` before and after on small graphs of each attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from tests.custom_ops.harness import spec
from tests.passes.attention_graph import (
    KINDS,
    SIZES,
    SPECS,
    WIDTH,
    attention,
    evaluate,
    model_of,
    names,
    node_of,
    operators,
    random_feeds,
    rope,
)
from v4c.custom_ops import TensorSpec
from v4c.passes.onnx.fuse_derotation import FuseDerotation
from v4c.passes.onnx.fuse_rotary_query_kv import FuseRotaryQueryKV

OUTPUTS = {"out": SPECS["out"], "window_out": SPECS["window_out"]}
ONES = np.ones(WIDTH, np.float32)
CHAIN = ["RMSNormalization", "TrailingRope", "RMSNormalization", "Unsqueeze", "TrailingRope", "Squeeze"]


def norm(x: str, weight: str, y: str, epsilon: float, axis: int = -1) -> onnx.NodeProto:
    return helper.make_node("RMSNormalization", [x, weight], [y], name=y, epsilon=epsilon, axis=axis)


def chain(
    *,
    q_sign: float = 1.0,
    kv_sign: float = 1.0,
    kv_positions: str = "positions",
    kv_freq: str = "inv_freq",
    q_axis: int = -1,
    axes: str = "axis",
    q_weight: str = "ones",
    q_eps: float = 1e-5,
    kv_eps: float = 1e-3,
) -> list[onnx.NodeProto]:
    """Norms and rotations as the exporter leaves them, with one thing or another changed."""
    return [
        norm("q", q_weight, "q_normal", q_eps, q_axis),
        rope("q_normal", "q_rotated", q_sign),
        norm("kv", "kv_norm", "kv_normal", kv_eps),
        helper.make_node("Unsqueeze", ["kv_normal", axes], ["as_head"], name="as_head"),
        rope("as_head", "head_rotated", kv_sign, kv_positions, kv_freq),
        helper.make_node("Squeeze", ["head_rotated", axes], ["kv_rotated"], name="kv_rotated"),
    ]


def rotary_graph(
    kind: str = "SlidingWindowAttention",
    extra: Any = (),
    outputs: Any = OUTPUTS,
    in_function: bool = False,
    ones: np.ndarray = ONES,
    **changes: Any,
) -> ir.Model:
    constants = {"ones": ones, "axis": np.array([2]), "last_but_one": np.array([-2])}
    nodes = [*chain(**changes), attention(kind, q="q_rotated", kv="kv_rotated"), *extra]
    return model_of(nodes, outputs, constants, in_function)


@pytest.mark.parametrize("in_function", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_before_and_after(kind: str, in_function: bool) -> None:
    model = rotary_graph(kind, in_function=in_function)
    assert operators(model) == [*CHAIN, kind]
    report = FuseRotaryQueryKV().run(model)
    assert (report.rewritten, report.refusals) == (1, [])
    assert operators(model) == ["RotaryQueryKV", kind]
    node = node_of(model, "RotaryQueryKV")
    assert node.domain == "v4c"
    assert {n: a.value for n, a in node.attributes.items()} == pytest.approx({"q_eps": 1e-5, "kv_eps": 1e-3})
    assert names(node.inputs) == ["q", "kv", "kv_norm", "positions", "inv_freq"]
    assert names(node.outputs) == names(node_of(model, kind).inputs[:2]) == ["q_rotated", "kv_rotated"]


@pytest.mark.parametrize("derotation_first", [False, True])
def test_either_order_with_derotation_gives_one_graph(derotation_first: bool) -> None:
    model = rotary_graph(extra=[rope("out", "y", -1.0)], outputs={"y": SPECS["out"]})
    passes = [FuseDerotation(), FuseRotaryQueryKV()] if derotation_first else [FuseRotaryQueryKV(), FuseDerotation()]
    assert [p.run(model).rewritten for p in passes] == [1, 1]
    assert operators(model) == ["RotaryQueryKV", "DerotatedSlidingAttention"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"q_sign": -1.0}, "q_rotated: expected a forward rotation, found sign -1.0"),
        ({"kv_sign": -1.0}, "head_rotated: expected a forward rotation, found sign -1.0"),
        (
            {"kv_positions": "other_positions"},
            "attention: expected q and kv rotated with the same positions, found positions and other_positions",
        ),
        (
            {"kv_freq": "other_freq"},
            "attention: expected q and kv rotated with the same inv_freq, found inv_freq and other_freq",
        ),
        ({"q_axis": 2}, "q_normal: expected a norm over the last axis, found axis 2"),
        ({"q_weight": "kv_norm"}, "q_normal: expected a norm of q without a weight, found weight kv_norm"),
    ],
)
def test_other_chains_are_left_alone_with_a_reason(changes: dict[str, Any], reason: str) -> None:
    model = rotary_graph(**changes)
    report = FuseRotaryQueryKV().run(model)
    assert (report.rewritten, report.refusals) == (0, [reason])
    assert operators(model) == [*CHAIN, "SlidingWindowAttention"]


def test_a_constant_weight_on_q_that_is_not_one_is_left_alone() -> None:
    report = FuseRotaryQueryKV().run(rotary_graph(ones=np.full(WIDTH, 1.5, np.float32)))
    assert (report.rewritten, report.refusals) == (
        0, ["q_normal: expected a norm of q without a weight, found weight ones"]
    )  # fmt: skip


def test_rows_with_another_axis_added_are_left_alone() -> None:
    """With one token per row, the row could be given the heads' axis before the chunk's."""
    nodes = chain()
    for node in (nodes[3], nodes[5]):
        node.input[1] = "first"
    constants = {"ones": ONES, "first": np.array([1])}
    model = model_of([*nodes, attention(KINDS[2], q="q_rotated", kv="kv_rotated")], OUTPUTS, constants)
    report = FuseRotaryQueryKV().run(model)
    assert (report.rewritten, report.refusals) == (0, ["kv_rotated: expected axis 2, the heads, found [1]"])


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        ("q_normal", SPECS["q"]),
        ("kv_normal", SPECS["kv"]),
        ("as_head", spec("batch", "chunk", 1, WIDTH)),
        ("head_rotated", spec("batch", "chunk", 1, WIDTH)),
    ],
)
def test_values_inside_that_are_read_elsewhere_are_left_alone(value: str, shape: TensorSpec) -> None:
    outputs = {**OUTPUTS, "other": shape}
    model = rotary_graph(extra=[helper.make_node("Neg", [value], ["other"], name="reader")], outputs=outputs)
    before = operators(model)
    report = FuseRotaryQueryKV().run(model)
    assert report.rewritten == 0
    assert f"expected {value} to be read here only" in report.refusals[0]
    assert operators(model) == before


@settings(deadline=None, max_examples=20)
@given(
    kind=st.sampled_from(KINDS), sizes=SIZES, axes=st.sampled_from(["axis", "last_but_one"]),
    epsilons=st.tuples(st.floats(1e-6, 1), st.floats(1e-6, 1)), read_twice=st.booleans(),
)  # fmt: skip
def test_same_numbers_with_and_without(
    kind: str, sizes: tuple[int, int, int], axes: str, epsilons: tuple[float, float], read_twice: bool
) -> None:
    # What the op yields may be read by others too.
    extra = [helper.make_node("Neg", ["kv_rotated"], ["other"])] if read_twice else []
    outputs = {**OUTPUTS, "other": SPECS["kv"]} if read_twice else OUTPUTS
    model = rotary_graph(kind, extra, outputs, axes=axes, q_eps=epsilons[0], kv_eps=epsilons[1])
    feeds = random_feeds(*sizes)
    expected = evaluate(model, feeds)
    assert FuseRotaryQueryKV().run(model).rewritten == 1
    for array, other in zip(evaluate(model, feeds), expected, strict=True):
        np.testing.assert_allclose(array, other, rtol=1e-5, atol=1e-5)
