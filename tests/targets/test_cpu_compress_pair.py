"""The kernel of two compressors against the op's reference in float64, in one call and in many."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.targets.cpu_harness import compiled, run
from v4c.custom_ops.kv_compress_pair import KV_COMPRESS_PAIR
from v4c.targets.cpu.kernels.compress import kv_compress_pair

EPS = 1e-6
CONFIGS = [
    (48, 24, 16, 8, 8, 4),
    (128, 64, 64, 32, 16, 4),
    (14, 7, 24, 24, 6, 3),
    (40, 40, 12, 6, 2, 1),
]
"""Width, row width, the indexer's two, rotary width, ratio."""
STATES = list(KV_COMPRESS_PAIR.writes)
Config = tuple[int, int, int, int, int, int]
Inputs = dict[str, np.ndarray]


def make(config: Config, rng: np.random.Generator, positions: np.ndarray, lengths: np.ndarray, chunk: int) -> Inputs:
    """Random inputs in the order of the op. The two hold different numbers of rows; padding tokens are NaN."""
    *widths, rotary_width, ratio = config
    batch = len(positions)
    capacity = int((positions + lengths).max()) // ratio + 1
    made: Inputs = {}
    for prefix, wide, width, extra in zip(("", "index_"), widths[::2], widths[1::2], (0, 3), strict=True):
        shapes = {
            "kv": (batch, chunk, wide),
            "gate": (batch, chunk, wide),
            "bias": (ratio, wide),
            "norm": (width,),
            "state_kv": (batch, wide // width * ratio, wide),
            "state_gate": (batch, wide // width * ratio, wide),
            "rows": (batch, capacity + extra, width),
        }
        made |= {prefix + n: rng.standard_normal(shape, dtype=np.float32) for n, shape in shapes.items()}
        for i, n in enumerate(lengths):
            made[f"{prefix}kv"][i, n:], made[f"{prefix}gate"][i, n:] = np.nan, np.nan
    made["inv_freq"] = (100.0 ** -np.linspace(0, 1, rotary_width // 2)).astype(np.float32)
    return made | {"positions": positions, "lengths": lengths}


def call(config: Config, inputs: Inputs) -> Inputs:
    """The states after the kernel."""
    after = run(compiled(kv_compress_pair, *config, EPS), list(inputs.values()), []).inputs
    return {n: a for n, a in zip(inputs, after, strict=True) if n in STATES}


@settings(deadline=None, max_examples=25)
@given(
    config=st.sampled_from(CONFIGS),
    batch=st.integers(1, 3),
    chunk=st.integers(1, 20),
    windows=st.integers(0, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_agrees_with_the_reference(config: Config, batch: int, chunk: int, windows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    positions = np.maximum(windows * config[-1] + rng.integers(-1, 2, batch), 0)
    lengths = rng.integers(0, chunk + 1, batch)
    inputs = make(config, rng, positions, lengths, chunk)
    found = call(config, inputs)
    tensors = [torch.from_numpy(np.nan_to_num(inputs[n])) for n in KV_COMPRESS_PAIR.inputs]
    doubles = [t.double() if t.is_floating_point() else t for t in tensors]
    expected = KV_COMPRESS_PAIR.reference(*doubles, config[-1], EPS)
    for name, reference in zip(KV_COMPRESS_PAIR.outputs, expected, strict=True):
        np.testing.assert_allclose(found[name], reference.numpy(), rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("config", CONFIGS[:2])
def test_chunks_give_the_bits_of_one_call(config: Config) -> None:
    rng = np.random.default_rng()
    total = 4 * config[-1]
    whole = make(config, rng, np.array([0]), np.array([total]), total)
    expected = call(config, whole)
    for size in (1, config[-1] + 1):
        state = {n: whole[n] for n in STATES}
        for at in range(0, total, size):
            part = {n: a[:, at : at + size] if n.endswith(("kv", "gate")) else a for n, a in whole.items()}
            part |= state | {"positions": np.array([at]), "lengths": np.array([min(size, total - at)])}
            state = call(config, part)
        for name in STATES:
            np.testing.assert_array_equal(state[name], expected[name], err_msg=f"{name}, {size} tokens a call")
