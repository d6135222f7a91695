"""A clamped SwiGLU is recognised in every spelling, our own body among them; others are told with a reason."""

from __future__ import annotations

import onnx.inliner
import onnx_ir as ir
import pytest

from tests.custom_ops.harness import build_model, spec
from tests.passes.graphs import graph
from v4c.custom_ops.clamped_swiglu import CLAMPED_SWIGLU
from v4c.passes.onnx.matching import Mismatch
from v4c.passes.onnx.swiglu_spelling import SwiGLU, clamped_swiglu

INPUTS = "float[b, s, 4] gate, float[b, s, 4] up"
CLAMPS = {
    "clip": "g = Clip(gate, , high) u = Clip(up, low, high)",
    "two clips": "g = Clip(gate, , high) v = Clip(up, , high) u = Clip(v, low)",
    "min and max": "g = Min(high, gate) v = Max(up, low) u = Min(v, high)",
    "twice": "f = Clip(gate, , higher) g = Min(f, high) u = Clip(up, low, high)",
}
PRODUCTS = {
    "silu first": "silu = Mul(g, s) y = Mul(silu, u)",
    "up first": "silu = Mul(s, g) y = Mul(u, silu)",
    "gate last": "part = Mul(s, u) y = Mul(part, g)",
    "sigmoid last": "part = Mul(u, g) y = Mul(s, part)",
}


def read(body: str) -> SwiGLU | None:
    limits = " ".join(
        f"{n} = Constant<value_float = {v}>()" for n, v in {"high": 2.0, "low": -2.0, "higher": 3.0}.items()
    )
    model = ir.from_proto(graph(INPUTS, "float[b, s, 4] y", f"{limits} {body}"))
    return clamped_swiglu(model.graph.outputs[0])


@pytest.mark.parametrize("product", PRODUCTS.values())
@pytest.mark.parametrize("clamp", CLAMPS.values())
def test_every_spelling(clamp: str, product: str) -> None:
    found = read(f"{clamp} s = Sigmoid(g) {product}")
    assert found is not None
    assert (found.gate.name, found.up.name, found.limit) == ("gate", "up", 2.0)


def test_our_own_body() -> None:
    specs = dict.fromkeys(("gate", "up"), spec("b", "s", 4))
    proto = onnx.inliner.inline_local_functions(build_model(CLAMPED_SWIGLU, specs, {"limit": 2.5}))
    found = clamped_swiglu(ir.from_proto(proto).graph.outputs[0])
    assert found is not None
    assert (found.gate.name, found.up.name, found.limit) == ("gate", "up", 2.5)


def test_the_op_itself() -> None:
    found = read("y = v4c.ClampedSwiGLU<limit = 1.5>(gate, up)")
    assert found is not None
    assert (found.gate.name, found.up.name, found.limit) == ("gate", "up", 1.5)


@pytest.mark.parametrize(
    ("clamps", "reason"),
    [
        ("g = Identity(gate) u = Identity(up)", "constant limits"),
        ("g = Clip(gate, , high) u = Clip(up, low)", "constant limits"),
        ("g = Clip(gate, low, high) u = Clip(up, low, high)", "none below the gate"),
        ("g = Clip(gate, , higher) u = Clip(up, low, high)", "one limit on all sides"),
    ],
)
def test_other_clamps_are_told(clamps: str, reason: str) -> None:
    with pytest.raises(Mismatch, match=reason):
        read(f"{clamps} s = Sigmoid(g) {PRODUCTS['silu first']}")


@pytest.mark.parametrize(
    "body",
    [
        "y = Mul(gate, up)",
        "s = Sigmoid(gate) y = Mul(s, gate)",
        "s = Sigmoid(gate) part = Mul(s, up) y = Mul(part, up)",  # the sigmoid of something else
        "g = Clip(gate, , high) u = Clip(up, low, high) s = Tanh(g) silu = Mul(g, s) y = Mul(silu, u)",
    ],
)
def test_other_products_are_none(body: str) -> None:
    assert read(body) is None
