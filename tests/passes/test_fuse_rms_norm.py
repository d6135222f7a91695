"""``fuse-rms-norm`` before and after on small graphs: every accepted spelling, and what is refused."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.passes.graphs import graph, left_alone, only, rewritten, same_numbers
from tests.passes.onnx_graphs import operators
from v4c.passes.onnx.fuse_rms_norm import FuseRMSNorm

SQUARES = {"pow": "two = Constant<value_float = 2.0>() square = Pow(x, two)", "mul": "square = Mul(x, x)"}
RECIPROCALS = {
    "reciprocal": "root = Sqrt(v) r = Reciprocal(root) y = Mul(x, r)",
    "reciprocal first": "root = Sqrt(v) r = Reciprocal(root) y = Mul(r, x)",
    "one by root": "one = Constant<value_float = 1.0>() root = Sqrt(v) r = Div(one, root) y = Mul(x, r)",
    "power": "half = Constant<value_float = -0.5>() r = Pow(v, half) y = Mul(x, r)",
    "division": "root = Sqrt(v) y = Div(x, root)",
}
WEIGHTS = {"none": "out = Identity(y)", "right": "out = Mul(y, w)", "left": "out = Mul(w, y)"}
INPUTS = "float[b, s, 12] x, float[12] w"


def spelled(square: str, reciprocal: str, weight: str, axis: int = -1, epsilon: float = 1e-6) -> str:
    return f"""
        axes = Constant<value_ints = [{axis}]>()
        eps = Constant<value_float = {epsilon}>()
        {SQUARES[square]}
        mean = ReduceMean(square, axes)
        v = Add(mean, eps)
        {RECIPROCALS[reciprocal]}
        {WEIGHTS[weight]}
    """


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("reciprocal", RECIPROCALS)
@pytest.mark.parametrize("square", SQUARES)
def test_before_and_after(square: str, reciprocal: str, weight: str) -> None:
    proto = graph(INPUTS, "float[b, s, 12] out", spelled(square, reciprocal, weight))
    model, report = rewritten(proto, FuseRMSNorm())
    assert (report.rewritten, report.refusals) == (1, [])
    assert operators(model.graph) == ["RMSNormalization"] + ["Identity"] * (weight == "none")
    norm = only(model, "RMSNormalization")
    x, scale = norm.inputs
    assert x is not None
    assert scale is not None
    assert (x.name, norm.attributes["axis"].value) == ("x", -1)
    assert norm.attributes["epsilon"].value == pytest.approx(1e-6)
    if weight == "none":
        np.testing.assert_array_equal(ir.convenience.get_const_tensor(scale).numpy(), np.ones(12, np.float32))  # type: ignore[union-attr]
    else:
        assert scale.name == "w"
    assert model.graph.outputs[0].name == "out"


@settings(deadline=None, max_examples=20)
@given(
    square=st.sampled_from(list(SQUARES)),
    reciprocal=st.sampled_from(list(RECIPROCALS)),
    weight=st.sampled_from(list(WEIGHTS)),
    axis=st.sampled_from([-1, 2]),
    epsilon=st.sampled_from([1e-6, 1e-5, 0.5]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5)),
    seed=st.integers(0, 2**32),
)
def test_same_numbers_with_and_without(
    square: str, reciprocal: str, weight: str, axis: int, epsilon: float, shape: tuple[int, int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    proto = graph(INPUTS, "float[b, s, 12] out", spelled(square, reciprocal, weight, axis, epsilon))
    x = (rng.standard_normal((*shape, 12)) * 10 ** rng.uniform(-2, 2)).astype(np.float32)
    same_numbers(proto, FuseRMSNorm(), {"x": x, "w": rng.standard_normal(12).astype(np.float32)})


def test_casts_around_stay_outside() -> None:
    body = spelled("pow", "reciprocal", "right").replace("out =", "normed =")
    proto = graph(
        "float16[b, s, 12] half, float[12] w",
        "float16[b, s, 12] out",
        f"x = Cast<to = 1>(half) {body} out = Cast<to = 10>(normed)",
    )
    model, report = rewritten(proto, FuseRMSNorm())
    assert (report.rewritten, report.refusals) == (1, [])
    assert operators(model.graph) == ["Cast", "RMSNormalization", "Cast"]


def test_casts_to_what_it_is_are_seen_through() -> None:
    body = spelled("pow", "reciprocal", "none").replace(
        "mean = ReduceMean(square", "wide = Cast<to = 1>(square) mean = ReduceMean(wide"
    )
    body = body.replace("y = Mul(x, r)", "same = Cast<to = 1>(r) y = Mul(x, same)")
    model, report = rewritten(graph(INPUTS, "float[b, s, 12] out", body), FuseRMSNorm())
    assert (report.rewritten, report.refusals) == (1, [])
    assert operators(model.graph) == ["RMSNormalization", "Identity"]


def test_a_norm_read_twice_keeps_its_product() -> None:
    body = spelled("pow", "reciprocal", "right")
    model, report = rewritten(graph(INPUTS, "float[b, s, 12] out, float[b, s, 12] y", body), FuseRMSNorm())
    assert (report.rewritten, report.refusals) == (1, [])
    assert operators(model.graph) == ["RMSNormalization", "Mul"]


def test_a_factor_that_is_no_weight_stays_a_product_and_is_told() -> None:
    body = spelled("pow", "reciprocal", "right")
    proto = graph("float[b, s, 12] x, float[4, 12] w", "float[b, 4, 12] out", body)
    model, report = rewritten(proto, FuseRMSNorm())
    assert report.rewritten == 1
    assert report.refusals == ["make_out: expected a weight [12], found [4, 12]: the norm is fused alone"]
    assert operators(model.graph) == ["RMSNormalization", "Mul"]


BODY = spelled("pow", "reciprocal", "right")
NEAR_MISSES = {
    "a constant epsilon": (f"{INPUTS}, float eps", BODY.replace("eps = Constant<value_float = 1e-06>()", "")),
    "a mean over the last axis": (INPUTS, spelled("pow", "reciprocal", "right", axis=1)),
    "found all axes": (INPUTS, BODY.replace("ReduceMean(square, axes)", "ReduceMean(square)")),
    "a mean that keeps its axis": (
        "float[12, 12] x, float[12] w", BODY.replace("ReduceMean", "ReduceMean<keepdims = 0>")),
    "found DOUBLE": ("double[b, s, 12] x, double[12] w", BODY.replace("eps = Constant<value_float = 1e-06>()",
                     "low = Constant<value_float = 1e-06>() eps = Cast<to = 11>(low)")),
    "a known width": ("float[b, s, d] x, float[12] w", BODY),
}  # fmt: skip


@pytest.mark.parametrize("reason", NEAR_MISSES)
def test_near_misses_are_left_alone_with_a_reason(reason: str) -> None:
    inputs, body = NEAR_MISSES[reason]
    kind = "double" if "double" in inputs else "float"
    shape = "[12, 12]" if "[12, 12] x" in inputs else "[b, s, d]" if "[b, s, d]" in inputs else "[b, s, 12]"
    (refusal,) = left_alone(graph(inputs, f"{kind}{shape} out", body), FuseRMSNorm())
    assert reason in refusal


def test_what_is_read_elsewhere_is_left_alone_with_a_reason() -> None:
    (refusal,) = left_alone(graph(INPUTS, "float[b, s, 12] out, float[b, s, 1] r", BODY), FuseRMSNorm())
    assert "expected r to be read here only" in refusal


@pytest.mark.parametrize(
    "body",
    [
        BODY.replace("y = Mul(x, r)", "y = Mul(w, r)"),  # scales something else by the norm of x
        BODY.replace("Pow(x, two)", "Pow(x, three)").replace("two =", "three =").replace("2.0", "3.0"),
        BODY.replace("Sqrt(v)", "Exp(v)"),
    ],
)
def test_other_graphs_are_no_norms(body: str) -> None:
    assert left_alone(graph(INPUTS, "float[b, s, 12] out", body), FuseRMSNorm()) == []
