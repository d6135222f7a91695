"""``fuse-norm-projection`` before and after, its refusals, and the numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.passes.onnx_graphs import model_of, node, operators, run
from v4c.passes.onnx.fuse_norm_projection import FuseNormProjection


def graph(
    axis: int = -1, perm: tuple[int, int] = (1, 0), extra: bool = False, k: int = 6, n: int = 5, seed: int = 0
) -> Any:
    rng = np.random.default_rng(seed)
    nodes = [
        node("RMSNormalization", ["x", "norm"], "normed", axis=axis, epsilon=1e-4),
        node("Transpose", ["w"], "t", perm=list(perm)),
        node("MatMul", ["normed", "t"], "y"),
    ]
    outputs: dict[str, list[int | str]] = {"y": ["b", "s", n]}
    if extra:
        outputs["normed"] = ["b", "s", k]
    shape = (k,) if axis == -1 else (4, k)
    rows = (n, k) if perm == (1, 0) else (k, n)
    weights = {"norm": 1 + 0.3 * rng.standard_normal(shape), "w": rng.standard_normal(rows)}
    inputs: dict[str, list[int | str]] = {"x": ["b", "s" if axis == -1 else 4, k]}
    return model_of(nodes, inputs, outputs, {n: a.astype(np.float32) for n, a in weights.items()})


def test_before_and_after() -> None:
    model = ir.from_proto(graph())
    report = FuseNormProjection().run(model)
    assert (report.rewritten, report.refusals) == (1, [])
    (fused,) = model.graph
    assert (fused.domain, fused.op_type) == ("v4c", "RMSNormLinear")
    assert [v.name for v in fused.inputs] == ["x", "norm", "w"]
    assert fused.attributes["eps"].value == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"axis": 1}, "expected a norm over the last axis, found axis 1"),
        ({"perm": (0, 1)}, "expected a weight [N, K], transposed, found [0, 1]"),
    ],
)
def test_refusals(changes: dict[str, Any], reason: str) -> None:
    model = ir.from_proto(graph(**changes))
    before = operators(model.graph)
    report = FuseNormProjection().run(model)
    assert operators(model.graph) == before
    assert any(reason in r for r in report.refusals)


def test_a_norm_that_is_read_elsewhere_stays() -> None:
    model = ir.from_proto(graph(extra=True))
    assert FuseNormProjection().run(model).rewritten == 0
    assert operators(model.graph) == ["RMSNormalization", "Transpose", "MatMul"]


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_same_numbers(k: int, n: int, batch: int, chunk: int, seed: int) -> None:
    proto = graph(k=k, n=n, seed=seed)
    model = ir.from_proto(proto)
    assert FuseNormProjection().run(model).rewritten == 1
    feeds = {"x": np.random.default_rng(seed + 1).standard_normal((batch, chunk, k)).astype(np.float32)}
    np.testing.assert_allclose(run(model, feeds)[0], run(proto, feeds)[0], rtol=1e-5, atol=1e-5)
