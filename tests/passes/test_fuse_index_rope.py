"""``fuse-index-rope`` before and after on small graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from v4c.custom_ops import OPS
from v4c.custom_ops.rotary_lightning_index import ROTARY_LIGHTNING_INDEX
from v4c.passes.onnx.fuse_index_rope import FuseIndexRope

HEADS, WIDTH, PAIRS = 2, 6, 2
SHAPES: dict[str, list[Any]] = {
    "q": ["batch", "chunk", HEADS, WIDTH],
    "inv_freq": [PAIRS],
    "weights": ["batch", "chunk", HEADS],
    "index_rows": ["batch", "capacity", WIDTH],
    "positions": ["batch"],
    "other_positions": ["batch"],
    "lengths": ["batch"],
}


def graph(sign: float = 1.0, turned_at: str = "positions", ratio: int = 4, top_k: int = 3, second: str = "") -> Any:
    """Rotation and indexer; `second` names another reader of the rotated queries: an operator, or ``output``."""
    nodes = [
        helper.make_node("TrailingRope", ["q", turned_at, "inv_freq"], ["r"], domain="v4c", sign=sign),
        helper.make_node(
            "LightningIndex", ["r", "weights", "index_rows", "positions", "lengths"], ["indices"],
            name="indexer", domain="v4c", ratio=ratio, top_k=top_k,
        ),
    ]  # fmt: skip
    integers = {"positions", "other_positions", "lengths"}
    inputs = [
        helper.make_tensor_value_info(n, TensorProto.INT64 if n in integers else TensorProto.FLOAT, shape)
        for n, shape in SHAPES.items()
    ]
    outputs = [helper.make_tensor_value_info("indices", TensorProto.INT64, ["batch", "chunk", top_k])]
    if second:
        name = "r" if second == "output" else "y"
        if second != "output":
            nodes.append(helper.make_node(second, ["r"], ["y"]))
        outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPES["q"]))
    functions = [f.to_function_proto() for n in ("TrailingRope", "LightningIndex") for f in OPS[n].functions]
    return helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs),
        opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("v4c", 1)],
        ir_version=11,
        functions=list({f.name: f for f in functions}.values()),
    )


def operators(model: ir.Model) -> list[str]:
    return [n.op_type for n in model.graph]


def test_before_and_after() -> None:
    model = ir.from_proto(graph(ratio=4, top_k=3))
    assert operators(model) == ["TrailingRope", "LightningIndex"]
    report = FuseIndexRope().run(model)
    assert (report.rewritten, report.refusals) == (1, [])
    (node,) = model.graph
    assert (node.domain, node.op_type) == ("v4c", "RotaryLightningIndex")
    assert {n: a.value for n, a in node.attributes.items()} == {"ratio": 4, "top_k": 3}
    assert [v.name for v in node.inputs if v] == ["q", "weights", "index_rows", "positions", "lengths", "inv_freq"]
    assert [v.name for v in model.graph.outputs] == ["indices"]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"sign": -1.0}, "indexer: expected queries rotated forward, found sign -1.0"),
        ({"turned_at": "other_positions"}, "indexer: expected queries rotated by positions, found other_positions"),
    ],
)
def test_other_rotations_are_left_alone_with_a_reason(changed: dict[str, Any], reason: str) -> None:
    model = ir.from_proto(graph(**changed))
    report = FuseIndexRope().run(model)
    assert (report.rewritten, report.refusals) == (0, [reason])
    assert operators(model) == ["TrailingRope", "LightningIndex"]


@pytest.mark.parametrize("second", ["Relu", "output"])
def test_rotated_queries_that_are_read_elsewhere_stay(second: str) -> None:
    model = ir.from_proto(graph(second=second))
    before = operators(model)
    assert FuseIndexRope().run(model).rewritten == 0
    assert operators(model) == before


@settings(deadline=None, max_examples=15)
@given(
    ratio=st.integers(1, 5),
    top_k=st.integers(1, 12),
    batch=st.integers(1, 3),
    chunk=st.integers(1, 6),
    seed=st.integers(0, 2**32),
)
def test_same_numbers_with_and_without(ratio: int, top_k: int, batch: int, chunk: int, seed: int) -> None:
    proto = graph(ratio=ratio, top_k=top_k)
    model = ir.from_proto(proto)
    assert FuseIndexRope().run(model).rewritten == 1
    for function in ROTARY_LIGHTNING_INDEX.functions:
        made = ir.from_proto(function.to_function_proto())
        model.functions[made.identifier()] = made
    rng = np.random.default_rng(seed)
    sizes = {"batch": batch, "chunk": chunk, "capacity": 40}
    feeds: dict[str, Any] = {
        n: rng.standard_normal([sizes.get(d, d) for d in SHAPES[n]], dtype=np.float32)
        for n in ("q", "inv_freq", "weights", "index_rows")
    }
    feeds |= {"positions": rng.integers(0, 30, batch), "other_positions": np.zeros(batch, np.int64)}
    feeds["lengths"] = rng.integers(0, chunk + 1, batch)
    before = ort.InferenceSession(proto.SerializeToString()).run(None, feeds)[0]
    after = ort.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, feeds)[0]
    np.testing.assert_array_equal(after, before)
