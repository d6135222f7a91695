"""The indexer that rotates its queries: its choices are judged by scores in float64, and it equals the two ops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.custom_ops.harness import OnnxOp, spec, to_torch
from v4c.custom_ops import OPS
from v4c.custom_ops.rotary_lightning_index import ROTARY_LIGHTNING_INDEX as OP

HEADS, WIDTH, PAIRS = 3, 7, 2
SPECS = {
    "q": spec("batch", "chunk", HEADS, WIDTH),
    "weights": spec("batch", "chunk", HEADS),
    "index_rows": spec("batch", "capacity", WIDTH),
    "positions": spec("batch", dtype="int64"),
    "lengths": spec("batch", dtype="int64"),
    "inv_freq": spec(PAIRS),
}
KINDS = [(4, 3), (1, 5), (3, 40)]
"""(ratio, top_k); 40 is more than there are rows."""
ONNX = {kind: OnnxOp(OP, SPECS, ratio=kind[0], top_k=kind[1]) for kind in KINDS}


def make(seed: int, batch: int, chunk: int, ratio: int) -> dict[str, np.ndarray]:
    """Random inputs; rows that are not ready hold NaN."""
    rng = np.random.default_rng(seed)
    positions = rng.integers(0, 40, batch)
    lengths = rng.integers(0, chunk + 1, batch)
    rows = rng.standard_normal((batch, (40 + chunk) // ratio + 1, WIDTH), dtype=np.float32)
    for b in range(batch):
        rows[b, (positions[b] + lengths[b]) // ratio :] = np.nan
    return {
        "q": rng.standard_normal((batch, chunk, HEADS, WIDTH), dtype=np.float32),
        "weights": rng.standard_normal((batch, chunk, HEADS), dtype=np.float32),
        "index_rows": rows,
        "positions": positions,
        "lengths": lengths,
        "inv_freq": rng.uniform(0.01, 3.0, PAIRS).astype(np.float32),
    }


def scores_of(inputs: dict[str, np.ndarray], b: int, j: int) -> np.ndarray:
    """Scores of every row for one token, its queries rotated as complex numbers, in float64."""
    q = inputs["q"][b, j].astype(float)
    first = WIDTH - 2 * PAIRS
    angles = (inputs["positions"][b] + j) * inputs["inv_freq"].astype(float)
    turned = (q[:, first::2] + 1j * q[:, first + 1 :: 2]) * np.exp(1j * angles)
    q[:, first::2], q[:, first + 1 :: 2] = turned.real, turned.imag
    return inputs["weights"][b, j].astype(float) @ np.maximum(q @ inputs["index_rows"][b].astype(float).T, 0.0)


@settings(deadline=None, max_examples=40)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**32), batch=st.integers(1, 3), chunk=st.integers(1, 9))
def test_best_rows_of_the_rotated_queries(kind: tuple[int, int], seed: int, batch: int, chunk: int) -> None:
    inputs = make(seed, batch, chunk, kind[0])
    reference = OP.torch_op(*to_torch(inputs, OP), *kind).numpy()
    for found in (reference, ONNX[kind](inputs)[0]):
        for b, j in np.ndindex(batch, chunk):
            position, length = inputs["positions"][b], inputs["lengths"][b]
            ready = min((position + j + 1) // kind[0], (position + length) // kind[0])
            chosen = found[b, j][: min(kind[1], ready)]
            assert len(set(chosen)) == len(chosen)
            assert (found[b, j][len(chosen) :] == -1).all()
            # Rounding may exchange rows whose scores are as good as equal, so places are compared by their scores.
            scores = scores_of(inputs, b, j)[:ready]
            best = np.sort(scores)[::-1][: len(chosen)]
            np.testing.assert_allclose(scores[chosen], best, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_the_two_ops(kind: tuple[int, int]) -> None:
    inputs = to_torch(make(5, 3, 8, kind[0]), OP)
    q, weights, rows, positions, lengths, inv_freq = inputs
    rotated = OPS["TrailingRope"].torch_op(q, positions, inv_freq, 1.0)
    expected = OPS["LightningIndex"].torch_op(rotated, weights, rows, positions, lengths, *kind)
    assert torch.equal(OP.torch_op(*inputs, *kind), expected)


def test_torch_op_is_pure_and_its_fake_agrees() -> None:
    arguments = [torch.from_numpy(np.nan_to_num(make(2, 2, 5, 4)[n])) for n in OP.inputs]
    torch.library.opcheck(OP.torch_op, (*arguments, 4, 3), test_utils=("test_schema", "test_faketensor"))
