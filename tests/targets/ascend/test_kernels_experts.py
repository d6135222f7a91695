"""Routing and grouped experts with ragged tails, against the ops' references."""

import numpy as np
import pytest

from tests.targets.ascend.chain import EACH_DEVICE, Draw, error, gate, limits, reference, run
from tests.targets.ascend.requirements import needs_compiler, needs_mlir
from v4c.custom_ops.grouped_experts import grouped_experts as experts_reference
from v4c.custom_ops.hash_route import hash_route as hash_reference
from v4c.custom_ops.topk_route import topk_route as topk_reference
from v4c.targets.ascend.kernels.experts import ExpertSizes, grouped_experts
from v4c.targets.ascend.kernels.routes import hash_route, topk_route

pytestmark = [needs_mlir]


def draw_logits(rows, experts):
    logits = Draw(experts)(rows, experts, scale=3)
    logits[1::2] = np.round(logits[1::2])  # equal scores
    return logits


@pytest.mark.parametrize(("experts", "top_k"), [(256, 6), (7, 2)])
def test_topk_route(experts, top_k):
    bias = np.where(np.arange(experts) % 2, Draw(1)(experts, scale=0.1), 0).astype(np.float32)
    buffers = {"logits": draw_logits(6, experts), "bias": bias}
    after = run([topk_route(experts, top_k, 1.5, limits())], {"rows": 6}, buffers)
    weights, indices = topk_reference(reference(buffers["logits"])[None], reference(bias), top_k, 1.5)
    assert np.array_equal(after["indices"], indices[0])
    assert error(after["weights"], weights[0]) < 1e-5


def test_hash_route():
    draw, logits = Draw(), draw_logits(6, 16)
    buffers = {"logits": logits, "input_ids": draw.whole(0, 50, 6), "table": draw.whole(0, 16, 50, 4)}
    after = run([hash_route(16, 4, 1.5, limits())], {"rows": 6, "vocabulary": 50}, buffers)
    logits, ids, table = (reference(buffers[n]) for n in ("logits", "input_ids", "table"))
    weights, indices = hash_reference(logits[None], ids[None], table, 1.5)
    assert np.array_equal(after["indices"], indices[0])
    assert error(after["weights"], weights[0]) < 1e-5


def draw_experts(sizes, rows, missing=0.1):
    s, draw = sizes, Draw(rows)
    indices = np.stack([draw.generator.permutation(s.experts)[: s.top_k] for _ in range(rows)]).astype(np.int32)
    indices[draw.generator.random(indices.shape) < missing] = -1
    return {
        "x": draw(rows, s.hidden, dtype=s.dtype),
        "weights": draw.generator.random((rows, s.top_k)).astype(np.float32),
        "indices": indices,
        "gate_up": draw(s.experts, 2 * s.width, s.hidden, dtype=s.dtype, scale=2 * s.hidden**-0.5),
        "down": draw(s.experts, s.hidden, s.width, dtype=s.dtype, scale=s.width**-0.5),
    }


def expected_of(sizes, buffers):
    x, weights, indices, *matrices = (reference(a) for a in buffers.values())
    return experts_reference(x[None], weights[None], indices[None], *matrices, sizes.limit)[0]


@pytest.mark.parametrize(("shape", "tiles_for", "rows"), [
    ((16, 128, 64, 4), 1, 1), ((16, 128, 64, 4), 1, 40), ((5, 48, 40, 2), None, 33),
    pytest.param((16, 128, 64, 4), None, 19, marks=pytest.mark.slow),
    pytest.param((16, 128, 64, 4), 4, 4, marks=pytest.mark.slow),
    pytest.param((2, 64, 32, 2), 64, 70, marks=pytest.mark.slow),
])  # fmt: skip
def test_grouped_experts(shape, tiles_for, rows):
    sizes = ExpertSizes(*shape, limit=10.0, rows=tiles_for)
    buffers = draw_experts(sizes, rows)
    after = run(grouped_experts(sizes, limits()), {"rows": rows}, buffers)
    assert error(after["y"], expected_of(sizes, buffers)) < 2e-3


@pytest.mark.parametrize("one", [True, False], ids=["all choose one expert", "none chooses any"])
def test_the_ends_of_raggedness(one):
    sizes = ExpertSizes(5, 48, 40, 2, 10.0)
    buffers = draw_experts(sizes, 150)
    buffers["indices"][:] = 4 if one else -1
    after = run(grouped_experts(sizes, limits()), {"rows": 150}, buffers)
    assert error(after["y"], expected_of(sizes, buffers)) < 2e-3


@needs_compiler
@pytest.mark.parametrize("device", EACH_DEVICE)
def test_gates(device):
    at, draw = limits(device), Draw()
    sizes = ExpertSizes(8, 64, 32, 2, 10.0, rows=1)
    gate(grouped_experts(sizes, at), device, {"rows": 3}, draw_experts(sizes, 3))
    logits = {"logits": draw_logits(2, 16)}
    gate([topk_route(16, 4, 1.5, at)], device, {"rows": 2}, logits | {"bias": draw(16)})
    ids = {"input_ids": draw.whole(0, 50, 2), "table": draw.whole(0, 16, 50, 4)}
    gate([hash_route(16, 4, 1.5, at)], device, {"rows": 2, "vocabulary": 50}, logits | ids)
