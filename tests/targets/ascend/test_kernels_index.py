"""The lightning indexer: scores, and the best rows found without a sort, against the op's reference."""

import numpy as np
import pytest

from tests.targets.ascend.chain import EACH_DEVICE, Draw, error, gate, limits, reference, run
from tests.targets.ascend.requirements import needs_compiler, needs_mlir
from v4c.custom_ops.lightning_index import lightning_index
from v4c.targets.ascend.kernels.index import index_scores
from v4c.targets.ascend.kernels.top_k import index_top_k

pytestmark = [needs_mlir]
HEADS, WIDTH, RATIO = 16, 32, 4


def draw_call(chunk, capacity, positions, lengths):
    draw, batch = Draw(chunk), len(positions)
    buffers = {
        "q": draw(batch, chunk, HEADS, WIDTH, dtype="float16"), "weights": draw(batch, chunk, HEADS),
        "index_rows": draw(batch, capacity, WIDTH, dtype="float16"),
        "positions": np.array(positions, np.int32), "lengths": np.array(lengths, np.int32),
    }  # fmt: skip
    for row, (position, length) in enumerate(zip(positions, lengths, strict=True)):
        buffers["index_rows"][row, (position + length) // RATIO :] = np.nan
    return {"batch": batch, "chunk": chunk, "capacity": capacity}, buffers


def ready(positions, lengths, row, token):
    return max(0, min(positions[row] + token + 1, positions[row] + lengths[row]) // RATIO)


@pytest.mark.parametrize("splits", [1, 3])
def test_scores_of_ready_rows(splits):
    positions, lengths, capacity = [1, 2400], [3, 2], 700
    scalars, buffers = draw_call(3, capacity, positions, lengths)
    program = index_scores(HEADS, WIDTH, RATIO, limits(), splits=splits)
    scores = run([program], scalars, buffers)["scores"]
    wide = {n: np.nan_to_num(buffers[n].astype(np.float64)) for n in ("q", "weights", "index_rows")}
    each = np.maximum(np.einsum("bsji,bni->bsjn", wide["q"], wide["index_rows"]), 0)
    expected = np.einsum("bsj,bsjn->bsn", wide["weights"], each)
    for row in range(2):
        for token in range(3):
            count = ready(positions, lengths, row, token)
            assert error(scores[row, token, :count], expected[row, token, :count]) < 1e-5
            assert np.isnan(scores[row, token, count:]).all()  # not touched


def draw_scores(kind, shape):
    draw = Draw(len(kind))
    scores = draw(*shape)
    if kind == "ties":
        return np.round(scores)
    if kind == "zeros of both signs":
        return np.where(draw.generator.random(shape) < 0.8, scores * 0, scores).astype(np.float32)
    if kind == "wide range":
        return (scores * np.exp2(draw.whole(-120, 120, *shape))).astype(np.float32)
    return scores


@pytest.mark.parametrize("kind", ["plain", "ties", "zeros of both signs", "wide range"])
@pytest.mark.parametrize(("capacity", "top_k", "positions", "lengths", "chunk"), [
    (700, 64, [9, 2400], [3, 2], 3), (3000, 512, [11000], [1], 1), (300, 64, [252], [3], 3), (5, 64, [0], [1], 1),
], ids=["many", "512 of 2750", "about k", "none"])  # fmt: skip
def test_top_k(kind, capacity, top_k, positions, lengths, chunk):
    scores = draw_scores(kind, (len(positions), chunk, capacity))
    expected = np.full((*scores.shape[:2], top_k), -1, np.int32)
    for row, token in np.ndindex(*scores.shape[:2]):
        count = ready(positions, lengths, row, token)
        scores[row, token, count:] = np.nan
        best = np.argsort(-scores[row, token, :count], kind="stable")[:top_k]
        expected[row, token, : len(best)] = best
    scalars = {"batch": len(positions), "chunk": chunk, "capacity": capacity}
    where = {"positions": np.array(positions, np.int32), "lengths": np.array(lengths, np.int32)}
    after = run(index_top_k(top_k, RATIO, limits()), scalars, {"scores": scores} | where)
    assert np.array_equal(after["indices"], expected)


def test_the_op():
    """Both together give the op's rows, but for scores that float16 queries bring closer than rounding."""
    scalars, buffers = draw_call(2, 100, [300, 40], [2, 2])
    programs = [index_scores(HEADS, WIDTH, RATIO, limits()), *index_top_k(16, RATIO, limits())]
    found = run(programs, scalars, buffers)["indices"]
    expected = lightning_index(*(reference(a) for a in buffers.values()), RATIO, 16)
    assert np.array_equal(found, expected)


@needs_compiler
@pytest.mark.parametrize("device", EACH_DEVICE)
def test_gates(device):
    at = limits(device)
    scalars, buffers = draw_call(2, 100, [300, 3], [2, 2])
    gate([index_scores(HEADS, WIDTH, RATIO, at), *index_top_k(16, RATIO, at)], device, scalars, buffers)
