"""The two expert routers against transformers' routers, their tie rule, and their ONNX bodies."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HashRouter, DeepseekV4TopKRouter

from tests.custom_ops.harness import OnnxOp, spec
from v4c.custom_ops.hash_route import HASH_ROUTE, hash_route
from v4c.custom_ops.topk_route import TOPK_ROUTE, topk_route

SCALING = 2.5
seeds = st.integers(0, 2**32 - 1)
batches = st.tuples(st.integers(1, 3), st.integers(1, 5))


@cache
def onnx_topk(top_k: int) -> OnnxOp:
    return OnnxOp(TOPK_ROUTE, {"logits": spec("B", "S", "E"), "bias": spec("E")}, top_k=top_k, scaling=SCALING)


@cache
def onnx_hash() -> OnnxOp:
    ids, table = spec("B", "S", dtype="int64"), spec("V", "K", dtype="int64")
    return OnnxOp(HASH_ROUTE, {"logits": spec("B", "S", "E"), "input_ids": ids, "table": table}, scaling=SCALING)


def config(experts: int, top_k: int) -> Any:
    """What transformers' routers read; the hidden size is E and the gate the identity, so that logits are the input."""
    return SimpleNamespace(
        num_experts_per_tok=top_k,
        num_local_experts=experts,
        hidden_size=experts,
        scoring_func="sqrtsoftplus",
        routed_scaling_factor=SCALING,
        vocab_size=11,
    )


def per_expert(weights: np.ndarray | torch.Tensor, indices: np.ndarray | torch.Tensor, experts: int) -> np.ndarray:
    """Weight of every expert ``[B, S, E]``: routes compared without regard to order."""
    dense = np.zeros((*weights.shape[:2], experts))
    np.put_along_axis(dense, np.asarray(indices), np.asarray(weights), -1)
    return dense


@settings(deadline=None, max_examples=100)
@given(seeds, batches, st.integers(1, 20), st.data())
def test_topk_matches_transformers(seed: int, batch: tuple[int, int], experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts), "top_k")
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(*batch, experts, generator=g) * 3
    bias = torch.randn(experts, generator=g)
    theirs = DeepseekV4TopKRouter(config(experts, top_k))
    theirs.load_state_dict({"weight": torch.eye(experts), "e_score_correction_bias": bias})
    with torch.no_grad():
        _, weights, indices = theirs(logits)
    expected = per_expert(weights.view(*batch, -1), indices.view(*batch, -1), experts)

    for got in (topk_route(logits, bias, top_k, SCALING), onnx_topk(top_k)({"logits": logits, "bias": bias})):
        np.testing.assert_allclose(per_expert(got[0], got[1], experts), expected, rtol=1e-5, atol=1e-6)
        biased = torch.nn.functional.softplus(logits).sqrt() + bias
        chosen = np.take_along_axis(biased.numpy(), np.asarray(got[1]), -1)
        assert (np.diff(chosen, axis=-1) <= 1e-6).all()


@settings(deadline=None, max_examples=100)
@given(seeds, batches, st.sampled_from([2, 5, 16, 64, 384]), st.data())
def test_ties_go_to_the_smaller_index(seed: int, batch: tuple[int, int], experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.sampled_from([k for k in (1, 2, 6, 16) if k <= experts]), "top_k")
    levels = data.draw(st.integers(1, 4), "levels")
    rng = np.random.default_rng(seed)
    # Few distinct logits and one bias for all: scores tie exactly where logits do, and are ordered as they are.
    logits = rng.integers(-levels, levels, (*batch, experts)).astype(np.float32)
    bias = np.full(experts, 0.25, np.float32)
    expected = np.argsort(-logits, axis=-1, kind="stable")[..., :top_k]
    _, in_torch = topk_route(torch.from_numpy(logits), torch.from_numpy(bias), top_k, SCALING)
    np.testing.assert_array_equal(in_torch.numpy(), expected)
    np.testing.assert_array_equal(onnx_topk(top_k)({"logits": logits, "bias": bias})[1], expected)


@settings(deadline=None, max_examples=60)
@given(seeds, batches, st.integers(1, 12), st.data())
def test_hash_matches_transformers(seed: int, batch: tuple[int, int], experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts), "top_k")
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(*batch, experts, generator=g) * 3
    input_ids = torch.randint(0, 11, batch, generator=g)
    table = torch.stack([torch.randperm(experts, generator=g)[:top_k] for _ in range(11)])
    theirs = DeepseekV4HashRouter(config(experts, top_k))
    theirs.load_state_dict({"weight": torch.eye(experts), "tid2eid": table})
    with torch.no_grad():
        _, weights, indices = theirs(logits, input_ids)
    in_onnx = onnx_hash()({"logits": logits, "input_ids": input_ids, "table": table})
    for got_weights, got_indices in (hash_route(logits, input_ids, table, SCALING), in_onnx):
        np.testing.assert_array_equal(np.asarray(got_indices), indices.view(*batch, -1).numpy())
        np.testing.assert_allclose(np.asarray(got_weights), weights.view(*batch, -1).numpy(), rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=50)
@given(seeds, st.floats(-300, 300, width=32))
def test_far_logits_give_finite_weights(seed: int, offset: float) -> None:
    logits = (torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(seed)) + offset).contiguous()
    exact = np.sqrt(np.logaddexp(0, logits.double().numpy()))
    weights, indices = topk_route(logits, torch.zeros(6), 3, SCALING)
    in_onnx, _ = onnx_topk(3)({"logits": logits, "bias": torch.zeros(6)})
    chosen = np.take_along_axis(exact, indices.numpy(), -1)
    expected = chosen / chosen.sum(-1, keepdims=True) * SCALING
    if offset > -40:
        np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-4)
        np.testing.assert_allclose(in_onnx, expected, rtol=1e-4)
    else:  # scores leave float32's range: they may be lost, but never divide by zero
        assert weights.isfinite().all()
        assert np.isfinite(in_onnx).all()


def test_float64_is_kept() -> None:
    logits = torch.randn(1, 2, 5, dtype=torch.float64)
    assert topk_route(logits, torch.zeros(5, dtype=torch.float64), 2, 1.0)[0].dtype == torch.float64


def test_torch_ops_are_pure_and_declare_their_shapes() -> None:
    checks = ("test_schema", "test_faketensor")
    logits = torch.randn(2, 3, 8)
    torch.library.opcheck(TOPK_ROUTE.torch_op, (logits, torch.randn(8), 4, SCALING), test_utils=checks)
    ids, table = torch.randint(0, 5, (2, 3)), torch.randint(0, 8, (5, 2))
    torch.library.opcheck(HASH_ROUTE.torch_op, (logits, ids, table, SCALING), test_utils=checks)
