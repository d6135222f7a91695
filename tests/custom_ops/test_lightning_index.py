"""The lightning indexer against a sort of exact scores: order, ties, rows not ready, padding, fewer rows than top_k.

All numbers are small integers, so every sum is exact in float32 and the indices must agree exactly.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.custom_ops.harness import OnnxOp, spec, to_torch
from v4c.custom_ops import OPS

OP = OPS["LightningIndex"]
HEADS, WIDTH = 2, 3
SPECS = {
    "q": spec("batch", "chunk", HEADS, WIDTH),
    "weights": spec("batch", "chunk", HEADS),
    "index_rows": spec("batch", "capacity", WIDTH),
    "positions": spec("batch", dtype="int64"),
    "lengths": spec("batch", dtype="int64"),
}
KINDS = [(4, 3), (4, 1), (1, 5), (3, 40)]
"""(ratio, top_k); 40 is more than there are rows."""
ONNX = {kind: OnnxOp(OP, SPECS, ratio=kind[0], top_k=kind[1]) for kind in KINDS}


def make(seed: int, batch: int, chunk: int, ratio: int, spread: int) -> dict[str, np.ndarray]:
    """Random inputs; a small `spread` of values makes many ties. Rows that are not ready hold NaN."""
    rng = np.random.default_rng(seed)
    positions = rng.integers(0, 20, batch)
    lengths = rng.integers(0, chunk + 1, batch)
    capacity = (20 + chunk) // ratio + 1
    index_rows = rng.integers(-spread, spread + 1, (batch, capacity, WIDTH)).astype(np.float32)
    for b in range(batch):
        index_rows[b, (positions[b] + lengths[b]) // ratio :] = np.nan
    return {
        "q": rng.integers(-spread, spread + 1, (batch, chunk, HEADS, WIDTH)).astype(np.float32),
        "weights": rng.integers(-spread, spread + 1, (batch, chunk, HEADS)).astype(np.float32),
        "index_rows": index_rows,
        "positions": positions,
        "lengths": lengths,
    }


def naive(inputs: dict[str, np.ndarray], ratio: int, top_k: int) -> np.ndarray:
    batch, chunk = inputs["q"].shape[:2]
    out = np.full((batch, chunk, top_k), -1)
    for b, j in np.ndindex(batch, chunk):
        position, length = inputs["positions"][b], inputs["lengths"][b]
        ready = min((position + j + 1) // ratio, (position + length) // ratio)
        scores = []
        for n in range(ready):
            products = inputs["q"][b, j] @ inputs["index_rows"][b, n]
            scores.append(sum(w * max(p, 0.0) for w, p in zip(inputs["weights"][b, j], products, strict=True)))
        best = sorted(range(ready), key=lambda n: (-scores[n], n))[:top_k]
        out[b, j, : len(best)] = best
    return out


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(KINDS), st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 9), st.sampled_from([1, 2, 50]))
def test_equals_sorted_scores(kind: tuple[int, int], seed: int, batch: int, chunk: int, spread: int) -> None:
    inputs = make(seed, batch, chunk, kind[0], spread)
    expected = naive(inputs, *kind)
    np.testing.assert_array_equal(OP.torch_op(*to_torch(inputs, OP), *kind), expected)
    np.testing.assert_array_equal(ONNX[kind](inputs)[0], expected)


def test_all_scores_equal_gives_the_first_rows_in_order() -> None:
    inputs = make(0, 1, 2, 1, 3) | {"positions": np.array([18]), "lengths": np.array([2])}
    inputs["index_rows"] = np.ones_like(inputs["index_rows"])
    inputs["weights"] *= 0
    for out in (OP.torch_op(*to_torch(inputs, OP), 1, 5).numpy(), ONNX[1, 5](inputs)[0]):
        assert out.tolist() == [[[0, 1, 2, 3, 4]] * 2]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_ready_before_the_first_window_ends(kind: tuple[int, int]) -> None:
    inputs = make(0, 2, 1, kind[0], 3) | {
        "positions": np.array([0, 0]),
        "lengths": np.array([0, 1 if kind[0] > 1 else 0]),
    }
    inputs["index_rows"][:] = np.nan
    for out in (OP.torch_op(*to_torch(inputs, OP), *kind).numpy(), ONNX[kind](inputs)[0]):
        assert (out == -1).all()
        assert out.shape == (2, 1, kind[1])


def test_blocks_of_tokens_do_not_change_the_result() -> None:
    rng = np.random.default_rng(3)
    tokens, rows = 700, 4000  # 700 * 2 * 4000 scores are more than one block
    q, weights, keys = (
        torch.from_numpy(rng.integers(-9, 10, shape).astype(np.float32))
        for shape in ((1, tokens, HEADS, WIDTH), (1, tokens, HEADS), (1, rows + tokens // 4, WIDTH))
    )
    start = torch.tensor([4 * rows])
    whole = OP.torch_op(q, weights, keys, start, torch.tensor([tokens]), 4, 6)
    for token in (0, 262, 263, 524, 525, 699):
        one = slice(token, token + 1)
        alone = OP.torch_op(q[:, one], weights[:, one], keys, start + token, torch.tensor([1]), 4, 6)
        assert torch.equal(whole[:, one], alone)


def test_torch_op_is_pure_and_its_fake_agrees() -> None:
    arguments = [torch.from_numpy(np.nan_to_num(make(2, 2, 5, 4, 3)[n])) for n in OP.inputs]
    torch.library.opcheck(OP.torch_op, (*arguments, 4, 3), test_utils=("test_schema", "test_faketensor"))
