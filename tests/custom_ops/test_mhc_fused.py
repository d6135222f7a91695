"""The fused mHC ops: their ONNX bodies against torch, and torch against transformers' layer code."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection, DeepseekV4RMSNorm

from tests.custom_ops.harness import OnnxOp, spec
from v4c.custom_ops.base import OPS, CustomOp
from v4c.custom_ops.mhc_post_pre_norm import MHC_POST_PRE_NORM, mhc_post_pre_norm
from v4c.custom_ops.mhc_pre_norm import MHC_PRE_NORM, mhc_pre_norm

NORM_EPS, EPS = 1e-6, 1e-5
DIMS: dict[str, tuple[Any, ...]] = {
    "x": ("B", "S", "D"), "streams": ("B", "S", "M", "D"), "post": ("B", "S", "M"), "comb": ("B", "S", "M", "M"),
    "fn": ("Z", "MD"), "base": ("Z",), "scale": (3,), "norm": ("D",),
}  # fmt: skip
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 24))
SEEDS = st.integers(0, 2**32 - 1)


def make(op: CustomOp, shape: tuple[int, ...], seed: int) -> dict[str, torch.Tensor]:
    """Random inputs of `op`, tokens of mixed magnitude.

    What is added up over the streams has one sign per column, and pre weights are not small: the norm would make the
    few correct digits that are left of a sum that cancels, or of ONNX Runtime's small sigmoids, as large as the others.
    """
    g = torch.Generator().manual_seed(seed)
    b, s, m, d = shape
    sizes: dict[Any, int] = {"B": b, "S": s, "M": m, "D": d, "Z": (2 + m) * m, "MD": m * d}
    inputs = {n: torch.randn([sizes.get(k, k) for k in DIMS[n]], generator=g) for n in op.inputs}
    signs = torch.randn(b, s, d, generator=g).sign() * 10 ** (2 * torch.rand(b, s, 1, generator=g) - 1)
    for name in {"x", "streams", "post", "comb"} & set(op.inputs):
        inputs[name] = inputs[name].abs()
    for name in {"x", "streams"} & set(op.inputs):
        inputs[name] *= signs if name == "x" else signs[:, :, None]
    inputs["fn"] /= 2 * (m * d) ** 0.5
    inputs["base"], inputs["scale"] = inputs["base"].abs(), inputs["scale"].abs().clamp(max=1.5)
    return inputs


def attributes(iterations: int, hc_eps: float) -> dict[str, Any]:
    return {"iterations": iterations, "hc_eps": hc_eps, "norm_eps": NORM_EPS, "eps": EPS}


@cache
def in_onnx(name: str, iterations: int, hc_eps: float) -> OnnxOp:
    op = OPS[name]
    return OnnxOp(op, {n: spec(*DIMS[n]) for n in op.inputs}, **attributes(iterations, hc_eps))


@pytest.mark.parametrize("op", [MHC_PRE_NORM, MHC_POST_PRE_NORM], ids=lambda op: op.name)
@settings(deadline=None, max_examples=40)
@given(shape=SHAPES, iterations=st.sampled_from([1, 2, 20]), hc_eps=st.sampled_from([1e-6, 1e-3]), seed=SEEDS)
def test_onnx_matches_torch(op: CustomOp, shape: tuple[int, ...], iterations: int, hc_eps: float, seed: int) -> None:
    inputs = make(op, shape, seed)
    got = in_onnx(op.name, iterations, hc_eps)(inputs)
    expected = op.reference(*inputs.values(), **attributes(iterations, hc_eps))
    for found, want in zip(got, expected, strict=True):
        np.testing.assert_allclose(found, want.numpy(), rtol=1e-5, atol=1e-5 * max(1.0, float(want.abs().max())))


@settings(deadline=None, max_examples=30)
@given(SHAPES, st.sampled_from([1, 3]), SEEDS)
def test_torch_is_what_a_layer_does(shape: tuple[int, ...], iterations: int, seed: int) -> None:
    inputs = make(MHC_POST_PRE_NORM, shape, seed)
    m, d = shape[2:]
    config: Any = SimpleNamespace(
        hc_mult=m, hidden_size=d, hc_sinkhorn_iters=iterations, hc_eps=1e-6, rms_norm_eps=NORM_EPS
    )
    connection, norm = DeepseekV4HyperConnection(config), DeepseekV4RMSNorm(d, eps=EPS)
    connection.load_state_dict({n: inputs[n] for n in ("fn", "base", "scale")})
    norm.load_state_dict({"weight": inputs["norm"]})
    x, streams, post, comb = (inputs[n] for n in ("x", "streams", "post", "comb"))
    with torch.no_grad():
        mixed = post[..., None] * x[..., None, :] + torch.einsum("bsjk,bsjd->bskd", comb, streams)
        next_post, next_comb, collapsed = connection(mixed)
        expected = mixed, norm(collapsed), next_post, next_comb
    found = mhc_post_pre_norm(*inputs.values(), **attributes(iterations, 1e-6))
    scale = max(1.0, float(mixed.abs().max()))
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * scale)
    weights = (inputs[n] for n in ("fn", "base", "scale", "norm"))
    entry = mhc_pre_norm(mixed, *weights, **attributes(iterations, 1e-6))
    for got, want in zip(entry, expected[1:], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("op", [MHC_PRE_NORM, MHC_POST_PRE_NORM], ids=lambda op: op.name)
@pytest.mark.parametrize("m", [1, 4])
def test_torch_ops_are_pure_and_declare_their_shapes(op: CustomOp, m: int) -> None:
    arguments = (*make(op, (2, 3, m, 6), 1).values(), *attributes(3, 1e-6).values())
    torch.library.opcheck(op.torch_op, arguments, test_utils=("test_schema", "test_faketensor"))
