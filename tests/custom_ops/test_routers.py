"""The two routers: their ONNX bodies and torch references against the route of a product in float64."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.custom_ops.harness import OnnxOp, spec
from v4c.custom_ops.hash_route import hash_route
from v4c.custom_ops.hash_router import HASH_ROUTER, hash_router
from v4c.custom_ops.topk_route import route_weights
from v4c.custom_ops.topk_router import TOPK_ROUTER, topk_router

SCALING = 2.5
seeds = st.integers(0, 2**32 - 1)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 12), st.integers(1, 20))  # B, S, D, E


@cache
def onnx_topk(top_k: int) -> OnnxOp:
    specs = {"x": spec("B", "S", "D"), "weight": spec("E", "D"), "bias": spec("E")}
    return OnnxOp(TOPK_ROUTER, specs, top_k=top_k, scaling=SCALING)


@cache
def onnx_hash() -> OnnxOp:
    specs = {"x": spec("B", "S", "D"), "weight": spec("E", "D"), "indices": spec("B", "S", "K", dtype="int64")}
    return OnnxOp(HASH_ROUTER, specs, scaling=SCALING)


def make(seed: int, shape: tuple[int, ...]) -> tuple[torch.Generator, torch.Tensor, torch.Tensor]:
    """A generator to go on with, x and the router matrix."""
    b, s, d, e = shape
    g = torch.Generator().manual_seed(seed)
    return g, torch.randn(b, s, d, generator=g), torch.randn(e, d, generator=g) * 2 / d**0.5


@settings(deadline=None, max_examples=60)
@given(seeds, shapes, st.data())
def test_topk_router(seed: int, shape: tuple[int, ...], data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, shape[3]), "top_k")
    g, x, weight = make(seed, shape)
    bias = torch.randn(shape[3], generator=g)
    logits = x.double() @ weight.double().T
    scores = torch.nn.functional.softplus(logits).sqrt()
    biased = scores + bias
    ranked = biased.sort(dim=-1, descending=True).values[..., :top_k].numpy()

    in_onnx = onnx_topk(top_k)({"x": x, "weight": weight, "bias": bias})
    for got in (topk_router(x, weight, bias, top_k, SCALING), in_onnx):
        weights, indices = (np.asarray(g) for g in got)
        # Experts may change places with float64's only where their scores are equal to float32's precision.
        np.testing.assert_allclose(np.take_along_axis(biased.numpy(), indices, -1), ranked, rtol=0, atol=5e-6)
        expected = route_weights(scores, torch.from_numpy(indices), SCALING).numpy()
        np.testing.assert_allclose(weights, expected, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(seeds, shapes, st.integers(1, 6))
def test_hash_router_gives_the_weights_of_hash_route(seed: int, shape: tuple[int, ...], top_k: int) -> None:
    b, s, _, experts = shape
    g, x, weight = make(seed, shape)
    table = torch.randint(0, experts, (11, top_k), generator=g)
    ids = torch.randint(0, 11, (b, s), generator=g)
    logits = x.double() @ weight.double().T
    expected, indices = hash_route(logits, ids, table, SCALING)
    for got in (
        hash_router(x, weight, indices, SCALING).numpy(),
        onnx_hash()({"x": x, "weight": weight, "indices": indices})[0],
    ):
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(seeds, shapes, st.data())
def test_unchosen_rows_do_not_matter_to_the_hash_router(seed: int, shape: tuple[int, ...], data: st.DataObject) -> None:
    g, x, weight = make(seed, shape)
    allowed = torch.tensor(sorted(data.draw(st.sets(st.integers(0, shape[3] - 1), min_size=1), "experts in use")))
    indices = allowed[torch.randint(0, len(allowed), (*shape[:2], 3), generator=g)]
    expected = hash_router(x.double(), weight.double(), indices, SCALING)
    for expert in range(shape[3]):
        if expert not in indices:
            weight[expert] = torch.nan
    got = hash_router(x, weight, indices, SCALING)
    in_onnx = onnx_hash()({"x": x, "weight": weight, "indices": indices})[0]
    np.testing.assert_allclose(got.numpy(), expected.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(in_onnx, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_ties_go_to_the_smaller_index() -> None:
    x, weight, bias = torch.ones(1, 1, 4), torch.zeros(9, 4), torch.zeros(9)
    weight[[3, 7]] = 1.0
    in_onnx = onnx_topk(4)({"x": x, "weight": weight, "bias": bias})[1]
    for indices in (topk_router(x, weight, bias, 4, SCALING)[1].numpy(), in_onnx):
        assert indices.tolist() == [[[3, 7, 0, 1]]]


def test_torch_ops_are_pure_and_declare_their_shapes() -> None:
    checks = ("test_schema", "test_faketensor")
    _, x, weight = make(0, (2, 3, 6, 8))
    torch.library.opcheck(TOPK_ROUTER.torch_op, (x, weight, torch.randn(8), 4, SCALING), test_utils=checks)
    indices = torch.randint(0, 8, (2, 3, 2))
    torch.library.opcheck(HASH_ROUTER.torch_op, (x, weight, indices, SCALING), test_utils=checks)
