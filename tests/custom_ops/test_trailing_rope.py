"""Trailing interleaved RoPE against complex rotation of each pair, and its ONNX body against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.custom_ops.harness import OnnxOp, spec, to_torch
from v4c.custom_ops import OPS

OP = OPS["TrailingRope"]
SPECS = {
    "x": spec("batch", "chunk", "heads", 10),
    "positions": spec("batch", dtype="int64"),
    "inv_freq": spec("pairs"),
}
ONNX = {sign: OnnxOp(OP, SPECS, sign=sign) for sign in (1.0, -1.0)}


def make(seed: int, batch: int, chunk: int, heads: int, pairs: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((batch, chunk, heads, 10), dtype=np.float32),
        "positions": rng.integers(0, 5000, batch),
        "inv_freq": rng.uniform(1e-4, 1.0, pairs).astype(np.float32),
    }


def naive(x: np.ndarray, positions: np.ndarray, inv_freq: np.ndarray, sign: float) -> np.ndarray:
    out = x.copy()
    first = x.shape[3] - 2 * len(inv_freq)
    for b, j, h, i in np.ndindex(*x.shape[:3], len(inv_freq)):
        a = first + 2 * i
        turned = complex(x[b, j, h, a], x[b, j, h, a + 1]) * np.exp(1j * sign * (positions[b] + j) * inv_freq[i])
        out[b, j, h, a], out[b, j, h, a + 1] = turned.real, turned.imag
    return out


cases = st.builds(
    make, st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 6), st.integers(1, 3), st.integers(1, 5)
)


@settings(deadline=None, max_examples=30)
@given(cases, st.sampled_from([1.0, -1.0]))
def test_rotates_each_trailing_pair(inputs: dict[str, np.ndarray], sign: float) -> None:
    arguments = to_torch(inputs, OP)
    x, positions, inv_freq = (t.numpy() for t in arguments)
    expected = naive(x, positions, inv_freq, sign)
    np.testing.assert_allclose(OP.torch_op(*arguments, sign), expected, atol=1e-12)
    # The angle itself is float32 in the model: at position 5000 its spacing is 5e-4.
    np.testing.assert_allclose(ONNX[sign](inputs)[0], expected, atol=2e-3)


@settings(deadline=None, max_examples=20)
@given(cases, st.sampled_from([1.0, -1.0]))
def test_onnx_body_equals_reference_in_float32(inputs: dict[str, np.ndarray], sign: float) -> None:
    reference = OP.torch_op(*(torch.from_numpy(inputs[n]) for n in OP.inputs), sign)
    np.testing.assert_allclose(ONNX[sign](inputs)[0], reference, atol=2e-6)


def test_back_rotation_undoes_the_forward_one() -> None:
    arguments = to_torch(make(0, 2, 5, 3, 4), OP)
    forward = OP.torch_op(*arguments, 1.0)
    assert not torch.allclose(forward, arguments[0], atol=0.1)
    torch.testing.assert_close(OP.torch_op(forward, *arguments[1:], -1.0), arguments[0])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_torch_op_is_pure_and_its_fake_agrees(sign: float) -> None:
    arguments = [torch.from_numpy(a) for a in make(1, 2, 3, 2, 3).values()]
    torch.library.opcheck(OP.torch_op, (*arguments, sign), test_utils=("test_schema", "test_faketensor"))
