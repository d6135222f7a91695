"""The three mHC ops against transformers (float32) and plain numpy (float64), and their ONNX bodies against torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection, DeepseekV4HyperHead

from tests.custom_ops.harness import OnnxOp, spec
from v4c.custom_ops.mhc_head import MHC_HEAD, mhc_head
from v4c.custom_ops.mhc_post import MHC_POST, mhc_post
from v4c.custom_ops.mhc_pre import MHC_PRE, mhc_pre

NORM_EPS = 1e-6
seeds = st.integers(0, 2**32 - 1)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 24))
iteration_counts = st.sampled_from([1, 2, 5, 20])
hc_epsilons = st.sampled_from([1e-6, 1e-3])


def make_pre(seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Streams of mixed magnitude, fn, base and scale."""
    g = torch.Generator().manual_seed(seed)
    b, s, m, d = shape
    z = (2 + m) * m
    streams = torch.randn(b, s, m, d, generator=g, dtype=dtype) * 10 ** (2 * torch.rand(b, s, 1, 1, generator=g) - 1)
    fn = torch.randn(z, m * d, generator=g, dtype=dtype) / (m * d) ** 0.5
    base = torch.randn(z, generator=g, dtype=dtype)
    return [streams.to(dtype), fn, base, torch.rand(3, generator=g, dtype=dtype) + 0.5]


def numpy_pre(inputs: Sequence[torch.Tensor], iterations: int, eps: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token by token, stream by stream."""
    streams, fn, base, scale = (t.numpy() for t in inputs)
    b, s, m, d = streams.shape
    collapsed, post, comb = np.zeros((b, s, d)), np.zeros((b, s, m)), np.zeros((b, s, m, m))
    for i, j in np.ndindex(b, s):
        flat = streams[i, j].reshape(-1)
        logits = fn @ (flat / np.sqrt(np.dot(flat, flat) / flat.size + NORM_EPS))
        for k in range(m):
            collapsed[i, j] += (1 / (1 + np.exp(-(logits[k] * scale[0] + base[k]))) + eps) * streams[i, j, k]
            post[i, j, k] = 2 / (1 + np.exp(-(logits[m + k] * scale[1] + base[m + k])))
        c = np.exp((logits[2 * m :] * scale[2] + base[2 * m :]).reshape(m, m))
        c = c / c.sum(1)[:, None] + eps
        c = c / (c.sum(0)[None, :] + eps)
        for _ in range(iterations - 1):
            c = c / (c.sum(1)[:, None] + eps)
            c = c / (c.sum(0)[None, :] + eps)
        comb[i, j] = c
    return collapsed, post, comb


@cache
def onnx_pre(iterations: int, hc_eps: float) -> OnnxOp:
    specs = {"streams": spec("B", "S", "M", "D"), "fn": spec("Z", "MD"), "base": spec("Z"), "scale": spec(3)}
    return OnnxOp(MHC_PRE, specs, iterations=iterations, hc_eps=hc_eps, norm_eps=NORM_EPS)


@cache
def onnx_post() -> OnnxOp:
    shapes = {"x": "BSD", "streams": "BSMD", "post": "BSM", "comb": "BSMM"}
    return OnnxOp(MHC_POST, {name: spec(*dims) for name, dims in shapes.items()})


@cache
def onnx_head(hc_eps: float) -> OnnxOp:
    specs = {"streams": spec("B", "S", "M", "D"), "fn": spec("M", "MD"), "base": spec("M"), "scale": spec(1)}
    return OnnxOp(MHC_HEAD, specs, hc_eps=hc_eps, norm_eps=NORM_EPS)


@settings(deadline=None, max_examples=100)
@given(seeds, shapes, iteration_counts, hc_epsilons)
def test_pre_matches_transformers(seed: int, shape: tuple[int, ...], iterations: int, hc_eps: float) -> None:
    streams, fn, base, scale = make_pre(seed, shape)
    config: Any = SimpleNamespace(
        hc_mult=shape[2],
        hidden_size=shape[3],
        hc_sinkhorn_iters=iterations,
        hc_eps=hc_eps,
        rms_norm_eps=NORM_EPS,
    )
    theirs = DeepseekV4HyperConnection(config)
    theirs.load_state_dict({"fn": fn, "base": base, "scale": scale})
    with torch.no_grad():
        post, comb, collapsed = theirs(streams)
    ours = mhc_pre(streams, fn, base, scale, iterations, hc_eps, NORM_EPS)
    for got, expected in zip(ours, (collapsed, post, comb), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=100)
@given(seeds, shapes, iteration_counts, hc_epsilons)
def test_pre_matches_numpy_in_float64(seed: int, shape: tuple[int, ...], iterations: int, hc_eps: float) -> None:
    inputs = make_pre(seed, shape, torch.float64)
    ours = mhc_pre(*inputs, iterations, hc_eps, NORM_EPS)
    expected = numpy_pre(inputs, iterations, hc_eps)
    for got, want in zip(ours, expected, strict=True):
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-11, atol=1e-12)


@settings(deadline=None, max_examples=100)
@given(seeds, shapes, iteration_counts, hc_epsilons)
def test_pre_in_onnx_matches_torch(seed: int, shape: tuple[int, ...], iterations: int, hc_eps: float) -> None:
    inputs = make_pre(seed, shape)
    got = onnx_pre(iterations, hc_eps)(dict(zip(MHC_PRE.inputs, inputs, strict=True)))
    for found, want in zip(got, mhc_pre(*inputs, iterations, hc_eps, NORM_EPS), strict=True):
        np.testing.assert_allclose(found, want.numpy(), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(seeds, shapes)
def test_comb_is_doubly_stochastic(seed: int, shape: tuple[int, ...]) -> None:
    _, _, comb = mhc_pre(*make_pre(seed, shape, torch.float64), 500, 1e-9, NORM_EPS)
    assert (comb > 0).all()
    for axis in (-1, -2):
        sums = comb.sum(axis)
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-6)


def test_number_of_iterations_matters() -> None:
    inputs = make_pre(0, (1, 2, 4, 8))
    combs = [mhc_pre(*inputs, n, 1e-6, NORM_EPS)[2] for n in (1, 2, 3)]
    in_onnx = [onnx_pre(n, 1e-6)(dict(zip(MHC_PRE.inputs, inputs, strict=True)))[2] for n in (1, 2, 3)]
    for few, more in pairwise(combs):
        assert (few - more).abs().max() > 1e-3
    for few, more in pairwise(in_onnx):
        assert np.abs(few - more).max() > 1e-3


@settings(deadline=None, max_examples=60)
@given(seeds, shapes)
def test_post_matches_its_formula(seed: int, shape: tuple[int, ...]) -> None:
    b, s, m, d = shape
    rng = np.random.default_rng(seed)
    x, streams = rng.normal(size=(b, s, d)), rng.normal(size=shape)
    post, comb = rng.normal(size=(b, s, m)), rng.normal(size=(b, s, m, m))
    expected = np.zeros(shape)
    for k in range(m):
        expected[:, :, k] = post[:, :, k, None] * x
        for j in range(m):
            expected[:, :, k] += comb[:, :, j, k, None] * streams[:, :, j]
    arrays = (x, streams, post, comb)
    np.testing.assert_allclose(mhc_post(*map(torch.from_numpy, arrays)).numpy(), expected, rtol=1e-12, atol=1e-12)
    feeds = {n: a.astype(np.float32) for n, a in zip(MHC_POST.inputs, arrays, strict=True)}
    np.testing.assert_allclose(onnx_post()(feeds)[0], expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(seeds, shapes, hc_epsilons)
def test_head_matches_transformers(seed: int, shape: tuple[int, ...], hc_eps: float) -> None:
    m = shape[2]
    streams, fn, base, scale = make_pre(seed, shape)
    inputs = [streams, fn[:m].contiguous(), base[:m].contiguous(), scale[:1].contiguous()]
    config: Any = SimpleNamespace(hc_mult=m, hidden_size=shape[3], hc_eps=hc_eps, rms_norm_eps=NORM_EPS)
    theirs = DeepseekV4HyperHead(config)
    theirs.load_state_dict(dict(zip(("hc_fn", "hc_base", "hc_scale"), inputs[1:], strict=True)))
    with torch.no_grad():
        expected = theirs(streams)
    torch.testing.assert_close(mhc_head(*inputs, hc_eps, NORM_EPS), expected, rtol=1e-5, atol=1e-5)
    in_onnx = onnx_head(hc_eps)(dict(zip(MHC_HEAD.inputs, inputs, strict=True)))[0]
    np.testing.assert_allclose(in_onnx, expected.numpy(), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=50)
@given(seeds, shapes, hc_epsilons)
def test_head_is_the_collapse_of_pre_in_float64(seed: int, shape: tuple[int, ...], hc_eps: float) -> None:
    m = shape[2]
    inputs = make_pre(seed, shape, torch.float64)
    streams, fn, base, scale = inputs
    expected, _, _ = numpy_pre(inputs, 1, hc_eps)
    got = mhc_head(streams, fn[:m], base[:m], scale[:1], hc_eps, NORM_EPS)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("m", [1, 4])
def test_torch_ops_are_pure_and_declare_their_shapes(m: int) -> None:
    inputs = make_pre(1, (2, 3, m, 6))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(MHC_PRE.torch_op, (*inputs, 3, 1e-6, NORM_EPS), test_utils=checks)
    collapsed, post, comb = MHC_PRE.torch_op(*inputs, 3, 1e-6, NORM_EPS)
    torch.library.opcheck(MHC_POST.torch_op, (collapsed, inputs[0], post, comb), test_utils=checks)
    head = (inputs[0], inputs[1][:m], inputs[2][:m], inputs[3][:1])
    torch.library.opcheck(MHC_HEAD.torch_op, (*head, 1e-6, NORM_EPS), test_utils=checks)
