"""RotaryQueryKV's ONNX body against its torch reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.custom_ops.harness import OnnxOp, spec, to_torch
from v4c.custom_ops.rotary_query_kv import ROTARY_QUERY_KV as OP

EPS = {"q_eps": 1e-6, "kv_eps": 1e-2}
SPECS = {
    "q": spec("batch", "chunk", "heads", 10),
    "kv": spec("batch", "chunk", 10),
    "kv_norm": spec(10),
    "positions": spec("batch", dtype="int64"),
    "inv_freq": spec("pairs"),
}
ONNX = OnnxOp(OP, SPECS, **EPS)


def make(seed: int, batch: int, chunk: int, heads: int, pairs: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "q": rng.standard_normal((batch, chunk, heads, 10), dtype=np.float32),
        "kv": rng.standard_normal((batch, chunk, 10), dtype=np.float32),
        "kv_norm": rng.standard_normal(10, dtype=np.float32),
        "positions": rng.integers(0, 50, batch),
        "inv_freq": rng.uniform(1e-4, 1.0, pairs).astype(np.float32),
    }


cases = st.builds(
    make, st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 6), st.integers(1, 3), st.integers(1, 5)
)


@settings(deadline=None, max_examples=30)
@given(cases)
def test_onnx_body_equals_reference(inputs: dict[str, np.ndarray]) -> None:
    expected = OP.torch_op(*to_torch(inputs, OP), *EPS.values())
    for array, tensor in zip(ONNX(inputs), expected, strict=True):
        np.testing.assert_allclose(array, tensor, rtol=1e-5, atol=2e-5)


def test_each_epsilon_belongs_to_its_norm() -> None:
    inputs = make(1, 2, 3, 2, 2)
    for name, eps in (("q", "q_eps"), ("kv", "kv_eps")):
        small = {**inputs, name: inputs[name] * np.float32(1e-4)}
        outputs = [OnnxOp(OP, SPECS, **{**EPS, eps: value})(small) for value in (1e-12, 1.0)]
        index = ("q", "kv").index(name)
        assert np.abs(outputs[1][index]).max() < 0.01 < np.abs(outputs[0][index]).max()
        np.testing.assert_array_equal(outputs[0][1 - index], outputs[1][1 - index])


@pytest.mark.parametrize("heads", [1, 3])
def test_torch_op_is_pure_and_its_fake_agrees(heads: int) -> None:
    arguments = [torch.from_numpy(a) for a in make(2, 2, 4, heads, 3).values()]
    torch.library.opcheck(OP.torch_op, (*arguments, *EPS.values()), test_utils=("test_schema", "test_faketensor"))
