"""The derotated attentions' ONNX bodies against their references, over streams of calls that keep their window."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.custom_ops.harness import OnnxOp, plans, spec, to_torch
from v4c.custom_ops.derotated_attention import DEROTATED_CSA, DEROTATED_HCA, DEROTATED_SLIDING_ATTENTION

HEADS, WIDTH, WINDOW, RATIO, CHOSEN, CAPACITY, PAIRS = 2, 6, 4, 3, 3, 16, 2
OPS = {op.name: op for op in (DEROTATED_CSA, DEROTATED_HCA, DEROTATED_SLIDING_ATTENTION)}
NAMES = sorted(OPS)
VALUES: dict[str, int | float] = {"ratio": RATIO, "scale": 0.4}
ATTRIBUTES = {name: {a: VALUES[a] for a in op.attributes} for name, op in OPS.items()}
SPECS = {
    "q": spec("batch", "chunk", HEADS, WIDTH),
    "kv": spec("batch", "chunk", WIDTH),
    "window": spec("batch", WINDOW, WIDTH),
    "rows": spec("batch", "capacity", WIDTH),
    "indices": spec("batch", "chunk", CHOSEN, dtype="int64"),
    "sinks": spec(HEADS),
    "positions": spec("batch", dtype="int64"),
    "lengths": spec("batch", dtype="int64"),
    "inv_freq": spec(PAIRS),
}
ONNX = {name: OnnxOp(op, SPECS, **ATTRIBUTES[name]) for name, op in OPS.items()}

Inputs = dict[str, np.ndarray]


def call_inputs(rng: np.random.Generator, chunk: int, positions: np.ndarray, lengths: np.ndarray) -> Inputs:
    """One call's inputs but the window."""
    batch = len(positions)
    ready = np.maximum((positions + lengths) // RATIO, 1)[:, None, None]
    return {
        "q": rng.standard_normal((batch, chunk, HEADS, WIDTH), dtype=np.float32),
        "kv": rng.standard_normal((batch, chunk, WIDTH), dtype=np.float32),
        "rows": rng.standard_normal((batch, CAPACITY, WIDTH), dtype=np.float32),
        "indices": rng.integers(-1, ready, (batch, chunk, CHOSEN)),
        "sinks": rng.standard_normal(HEADS, dtype=np.float32),
        "positions": positions,
        "lengths": lengths,
        "inv_freq": rng.uniform(1e-4, 1.0, PAIRS).astype(np.float32),
    }


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=20)
@given(plan=plans(max_chunk=10), seed=st.integers(0, 2**32))
def test_onnx_body_equals_reference(name: str, plan: list[tuple[int, np.ndarray]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    positions = np.zeros(len(plan[0][1]), np.int64)
    window = np.full((len(positions), WINDOW, WIDTH), np.nan, np.float32)
    for chunk, lengths in plan:
        inputs = {**call_inputs(rng, chunk, positions, lengths), "window": window}
        expected, expected_window = OPS[name].torch_op(*to_torch(inputs, OPS[name]), *ATTRIBUTES[name].values())
        out, window = ONNX[name](inputs)
        for i, n in enumerate(lengths):
            np.testing.assert_allclose(out[i, :n], expected[i, :n], rtol=1e-5, atol=2e-5)
        np.testing.assert_array_equal(window, expected_window)
        positions = positions + lengths


@pytest.mark.parametrize("name", NAMES)
def test_no_position_is_no_rotation(name: str) -> None:
    """A first token alone sees itself, so its output is a share of its own row; the second one's is turned."""
    inputs = call_inputs(np.random.default_rng(3), 1, np.array([0]), np.array([1]))
    inputs |= {"window": np.full((1, WINDOW, WIDTH), np.nan, np.float32), "indices": np.full((1, 1, CHOSEN), -1)}
    first, window = ONNX[name](inputs)
    own = inputs["kv"][0, 0]
    for share in first[0, 0] / own:
        np.testing.assert_allclose(share, share[0], rtol=1e-5)
    # The same row again, one position on: the same sum of rows, so turning it forward gives multiples of the row.
    second, _ = ONNX[name]({**inputs, "positions": np.array([1]), "window": window})
    kept = WIDTH - 2 * PAIRS
    pairs = second[0, 0, :, kept:].reshape(HEADS, PAIRS, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * inputs["inv_freq"])
    row = own[kept:].reshape(PAIRS, 2)
    factor = turned / (row[:, 0] + 1j * row[:, 1])
    share = second[0, 0, :, 0] / own[0]
    np.testing.assert_allclose(factor, np.broadcast_to(share[:, None], factor.shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_torch_op_is_pure_and_its_fake_agrees(name: str) -> None:
    op = OPS[name]
    inputs = call_inputs(np.random.default_rng(7), 6, np.array([3, 0]), np.array([6, 2]))
    inputs["window"] = np.ones((2, WINDOW, WIDTH), np.float32)
    arguments = [torch.from_numpy(inputs[n]) for n in op.inputs]
    attributes = ATTRIBUTES[name].values()
    torch.library.opcheck(op.torch_op, (*arguments, *attributes), test_utils=("test_schema", "test_faketensor"))
