"""The ONNX helper functions of `custom_ops/onnx_common.py` against plain Python, position by position."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from v4c.custom_ops import onnx_common


def run(name: str, feeds: dict[str, np.ndarray], outputs: int, **attributes: int) -> list[np.ndarray]:
    """One helper function as a one-node model."""
    functions = [f.to_function_proto() for f in (getattr(onnx_common, name), onnx_common.TokenPositions)]
    node = helper.make_node(name, list(feeds), [f"o{i}" for i in range(outputs)], domain="v4c", **attributes)
    kinds = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int64): TensorProto.INT64}
    inputs = [helper.make_tensor_value_info(n, kinds[a.dtype], [None] * a.ndim) for n, a in feeds.items()]
    values = [helper.make_tensor_value_info(f"o{i}", TensorProto.INT64, None) for i in range(outputs)]
    unique = {f.name: f for f in functions}
    model = helper.make_model(
        helper.make_graph([node], "g", inputs, values),
        opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("v4c", 1)],
        functions=list(unique.values()),
        ir_version=11,
    )
    return ort.InferenceSession(model.SerializeToString()).run(None, feeds)


@settings(deadline=None, max_examples=25)
@given(
    rows=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), min_size=1, max_size=3),
    ratio=st.sampled_from([1, 4, 16]),
)
def test_positions_and_ready_rows(rows: list[tuple[int, int]], ratio: int) -> None:
    positions, lengths = (np.array(column) for column in zip(*rows, strict=True))
    feeds = {"x": np.zeros((len(rows), 9, 2), np.float32), "positions": positions}
    (found,) = run("TokenPositions", feeds, 1)
    assert found.tolist() == [[p + j for j in range(9)] for p, _ in rows]
    ready, most = run("ReadyRows", {**feeds, "lengths": lengths}, 2, ratio=ratio)
    expected = [[min(p + j + 1, p + n) // ratio for j in range(9)] for p, n in rows]
    assert ready.tolist() == expected
    assert most.reshape(-1).tolist() == [np.max(expected)]


@settings(deadline=None, max_examples=25)
@given(
    rows=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), min_size=1, max_size=3),
    size=st.integers(1, 12),
)
def test_ring_indices(rows: list[tuple[int, int]], size: int) -> None:
    positions, lengths = (np.array(column) for column in zip(*rows, strict=True))
    ring, new = np.zeros((len(rows), size, 2), np.float32), np.zeros((len(rows), 9, 2), np.float32)
    feeds = {"ring": ring, "new": new, "positions": positions, "lengths": lengths}
    slots, history, source, target = run("RingIndices", feeds, 4)
    assert history.tolist() == [list(range(p - size, p + 9)) for p, _ in rows]
    assert slots[..., 0].tolist() == [[t % size for t in range(p - size, p)] for p, _ in rows]
    writes = {(b, history[b, column]): tuple(to) for (b, column), to in zip(source, target, strict=True)}
    live = [(b, t) for b, (p, n) in enumerate(rows) for t in range(max(p, p + n - size), p + n)]
    assert writes == {(b, t): (b, t % size) for b, t in live}
