"""The two compressors in one: the ONNX body against the reference, and the reference against two single ops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.custom_ops.harness import OnnxOp, plans, spec, to_torch
from v4c.custom_ops import OPS
from v4c.custom_ops.kv_compress_pair import KV_COMPRESS_PAIR as OP
from v4c.errors import InputError

WIDTHS, ROWS, HALVES, PAIRS, EPS = (6, 4), (44, 50), (2, 2), 2, 1e-5
KINDS = [((2, 2), 4), ((2, 1), 3), ((1, 2), 1)]
"""(halves of the two, ratio): two halves with overlap, one half without."""
PREFIXES = ("", "index_")

Inputs = dict[str, np.ndarray]


def onnx_op(halves: tuple[int, int], ratio: int) -> OnnxOp:
    specs = {
        "inv_freq": spec(PAIRS),
        "positions": spec("batch", dtype="int64"),
        "lengths": spec("batch", dtype="int64"),
    }
    for prefix, width, half in zip(PREFIXES, WIDTHS, halves, strict=True):
        wide, ring = half * width, half * ratio
        specs |= {
            f"{prefix}kv": spec("batch", "chunk", wide),
            f"{prefix}gate": spec("batch", "chunk", wide),
            f"{prefix}bias": spec(ratio, wide),
            f"{prefix}norm": spec(width),
            f"{prefix}state_kv": spec("batch", ring, wide),
            f"{prefix}state_gate": spec("batch", ring, wide),
            f"{prefix}rows": spec("batch", f"{prefix}capacity", width),
        }
    return OnnxOp(OP, specs, ratio=ratio, eps=EPS)


ONNX = {kind: onnx_op(*kind) for kind in KINDS}


def parameters(rng: np.random.Generator, halves: tuple[int, int], ratio: int) -> Inputs:
    made: Inputs = {"inv_freq": rng.uniform(0.01, 1.0, PAIRS).astype(np.float32)}
    for prefix, width, half in zip(PREFIXES, WIDTHS, halves, strict=True):
        made[f"{prefix}bias"] = rng.standard_normal((ratio, half * width), dtype=np.float32)
        made[f"{prefix}norm"] = rng.uniform(0.5, 2.0, width).astype(np.float32)
    return made


def chunk_inputs(rng: np.random.Generator, batch: int, chunk: int, halves: tuple[int, int]) -> Inputs:
    return {
        f"{prefix}{name}": rng.standard_normal((batch, chunk, half * width), dtype=np.float32)
        for prefix, width, half in zip(PREFIXES, WIDTHS, halves, strict=True)
        for name in ("kv", "gate")
    }


def fresh_state(batch: int, halves: tuple[int, int], ratio: int) -> Inputs:
    """State as a fresh allocation may be: NaN everywhere."""
    made: Inputs = {}
    for prefix, width, rows, half in zip(PREFIXES, WIDTHS, ROWS, halves, strict=True):
        ring = np.full((batch, half * ratio, half * width), np.nan, np.float32)
        made |= {f"{prefix}state_kv": ring, f"{prefix}state_gate": ring.copy()}
        made[f"{prefix}rows"] = np.full((batch, rows, width), np.nan, np.float32)
    return made


def single(inputs: Inputs, prefix: str, ratio: int) -> list[np.ndarray]:
    """State after one of the two compressors alone."""
    op = OPS["KVCompress"]
    shared = ("inv_freq", "positions", "lengths")
    own = {n: inputs[n if n in shared else prefix + n] for n in op.inputs}
    return [t.numpy() for t in op.torch_op(*to_torch(own, op), ratio, EPS)]


@settings(deadline=None, max_examples=30)
@given(kind=st.sampled_from(KINDS), plan=plans(max_chunk=11), seed=st.integers(0, 2**32))
def test_a_stream_of_calls_equals_two_single_ops(
    kind: tuple[tuple[int, int], int], plan: list[tuple[int, np.ndarray]], seed: int
) -> None:
    halves, ratio = kind
    rng = np.random.default_rng(seed)
    batch = len(plan[0][1])
    params, state = parameters(rng, halves, ratio), fresh_state(batch, halves, ratio)
    positions = np.zeros(batch, np.int64)
    for chunk, lengths in plan:
        inputs = {**params, **state, **chunk_inputs(rng, batch, chunk, halves)}
        inputs |= {"positions": positions, "lengths": lengths}
        expected = [array for prefix in PREFIXES for array in single(inputs, prefix, ratio)]
        for ours, alone in zip(OP.torch_op(*to_torch(inputs, OP), ratio, EPS), expected, strict=True):
            np.testing.assert_array_equal(ours.numpy(), alone)
        found = ONNX[kind](inputs)
        for name, ours, reference in zip(OP.outputs, found, expected, strict=True):
            np.testing.assert_allclose(ours, reference, rtol=2e-5, atol=2e-5, err_msg=name)  # NaN must meet NaN
        state = dict(zip(OP.outputs, found, strict=True))
        positions = positions + lengths


@pytest.mark.parametrize("prefix", PREFIXES)
def test_state_of_the_wrong_size_is_refused(prefix: str) -> None:
    rng = np.random.default_rng(0)
    inputs = {**parameters(rng, HALVES, 4), **chunk_inputs(rng, 1, 3, HALVES), **fresh_state(1, HALVES, 4)}
    inputs |= {"positions": np.array([0]), "lengths": np.array([3])}
    inputs |= {f"{prefix}state_{n}": inputs[f"{prefix}state_{n}"][:, :7] for n in ("kv", "gate")}
    with pytest.raises(InputError, match="expected state of 8 slots for ratio 4, found 7"):
        OP.torch_op(*to_torch(inputs, OP), 4, EPS)


def test_torch_op_is_pure_and_its_fake_agrees() -> None:
    rng = np.random.default_rng(1)
    inputs = {**parameters(rng, HALVES, 4), **chunk_inputs(rng, 2, 9, HALVES), **fresh_state(2, HALVES, 4)}
    inputs |= {"positions": np.array([0, 0]), "lengths": np.array([9, 4])}
    arguments = [torch.from_numpy(np.nan_to_num(inputs[n])) for n in OP.inputs]
    torch.library.opcheck(OP.torch_op, (*arguments, 4, EPS), test_utils=("test_schema", "test_faketensor"))
