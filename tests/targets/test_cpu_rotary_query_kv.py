"""The RotaryQueryKV kernel against the torch reference in float64."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.targets.cpu_harness import compiled, run
from v4c.custom_ops.rotary_query_kv import rotary_query_kv as torch_reference
from v4c.targets.cpu.kernels.rotary_query_kv import rotary_query_kv

SPLIT = (32, 512, 64)  # large enough that a lone token is cut in halves
SHAPES = [(1, 8, 8), (3, 24, 8), (5, 7, 6), (16, 40, 2), (17, 33, 32), SPLIT]  # heads, width, rotary width
EPS = (1e-6, 1e-3)


def make(shape: tuple[int, int, int], batch: int, chunk: int, start: int, rng: np.random.Generator) -> list[np.ndarray]:
    """The kernel's inputs; every angle is exact in float32, so that float64 can be compared with at any position."""
    heads, width, rotary_width = shape
    inv_freq = rng.integers(1, 16, rotary_width // 2) / 2.0 ** rng.integers(4, 12, rotary_width // 2)
    return [
        rng.standard_normal((batch, chunk, heads, width), dtype=np.float32),
        rng.standard_normal((batch, chunk, width), dtype=np.float32),
        rng.standard_normal(width, dtype=np.float32),
        start + rng.integers(0, 9, batch),
        inv_freq.astype(np.float32),
    ]


def call(shape: tuple[int, int, int], inputs: list[np.ndarray]) -> list[np.ndarray]:
    outputs = [(inputs[0].shape, "float32"), (inputs[1].shape, "float32")]
    return run(compiled(rotary_query_kv, *shape, *EPS), inputs, outputs).outputs


@settings(deadline=None, max_examples=30)
@given(
    shape=st.sampled_from(SHAPES),
    batch=st.integers(1, 3),
    chunk=st.integers(1, 5),
    start=st.one_of(st.just(0), st.integers(0, 1_048_560)),
    seed=st.integers(0, 2**32 - 1),
)
def test_normalises_and_rotates(shape: tuple[int, int, int], batch: int, chunk: int, start: int, seed: int) -> None:
    inputs = make(shape, batch, chunk, start, np.random.default_rng(seed))
    tensors = [torch.from_numpy(a) for a in inputs]
    expected = torch_reference(*[t.double() if t.is_floating_point() else t for t in tensors], *EPS)
    for array, tensor in zip(call(shape, inputs), expected, strict=True):
        np.testing.assert_allclose(array, tensor.numpy(), rtol=1e-5, atol=1e-5)


def test_halves_of_a_token_give_the_bits_of_a_whole_one() -> None:
    inputs = make(SPLIT, 1, 3, 12_345, np.random.default_rng())
    together = call(SPLIT, inputs)
    for j in range(3):
        alone = call(SPLIT, [inputs[0][:, j : j + 1], inputs[1][:, j : j + 1], inputs[2], inputs[3] + j, inputs[4]])
        for array, whole in zip(alone, together, strict=True):
            np.testing.assert_array_equal(array[:, 0], whole[:, j])
