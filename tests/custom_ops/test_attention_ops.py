"""The three attention ops against a loop over tokens and keys that keeps the whole history of raw rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.custom_ops.harness import OnnxOp, plans, spec, to_torch
from v4c.custom_ops import OPS

HEADS, WIDTH, WINDOW, RATIO, CHOSEN, CAPACITY, SCALE = 2, 5, 4, 3, 3, 16, 0.4
ATTRIBUTES: dict[str, dict[str, int | float]] = {
    "SlidingWindowAttention": {"scale": SCALE},
    "HeavilyCompressedAttention": {"ratio": RATIO, "scale": SCALE},
    "CompressedSparseAttention": {"scale": SCALE},
}
NAMES = sorted(ATTRIBUTES)
SPECS = {
    "q": spec("batch", "chunk", HEADS, WIDTH),
    "kv": spec("batch", "chunk", WIDTH),
    "window": spec("batch", WINDOW, WIDTH),
    "rows": spec("batch", "capacity", WIDTH),
    "indices": spec("batch", "chunk", CHOSEN, dtype="int64"),
    "sinks": spec(HEADS),
    "positions": spec("batch", dtype="int64"),
    "lengths": spec("batch", dtype="int64"),
}
ONNX = {name: OnnxOp(OPS[name], SPECS, **ATTRIBUTES[name]) for name in NAMES}

Inputs = dict[str, np.ndarray]
Run = Callable[[Inputs], list[np.ndarray]]


def torch_run(name: str) -> Run:
    op = OPS[name]
    return lambda inputs: [t.numpy() for t in op.torch_op(*to_torch(inputs, op), *ATTRIBUTES[name].values())]


def ready_of(inputs: Inputs, b: int, j: int) -> int:
    position, length = int(inputs["positions"][b]), int(inputs["lengths"][b])
    return min(position + j + 1, position + length) // RATIO


def call_inputs(rng: np.random.Generator, chunk: int, positions: np.ndarray, lengths: np.ndarray) -> Inputs:
    """One call's inputs but the window: rows that are not ready hold NaN, indices are distinct ready rows or -1."""
    batch = len(positions)
    inputs = {
        "q": rng.standard_normal((batch, chunk, HEADS, WIDTH), dtype=np.float32),
        "kv": rng.standard_normal((batch, chunk, WIDTH), dtype=np.float32),
        "rows": rng.standard_normal((batch, CAPACITY, WIDTH), dtype=np.float32),
        "indices": np.full((batch, chunk, CHOSEN), -1),
        "sinks": rng.standard_normal(HEADS, dtype=np.float32),
        "positions": positions,
        "lengths": lengths,
    }
    for b in range(batch):
        inputs["rows"][b, (positions[b] + lengths[b]) // RATIO :] = np.nan
        for j in range(chunk):
            known = rng.permutation(ready_of(inputs, b, j))[: rng.integers(0, CHOSEN + 1)]
            inputs["indices"][b, j, : len(known)] = known
            rng.shuffle(inputs["indices"][b, j])
    return inputs


def naive_token(name: str, inputs: Inputs, history: list[np.ndarray], b: int, j: int) -> np.ndarray:
    """Output of live token j, ``[H, C]``; `history` holds all raw rows up to and including its own."""
    keys = history[-WINDOW:]
    if name == "HeavilyCompressedAttention":
        keys = keys + [inputs["rows"][b, n] for n in range(ready_of(inputs, b, j))]
    if name == "CompressedSparseAttention":
        keys = keys + [inputs["rows"][b, n] for n in inputs["indices"][b, j] if n >= 0]
    out = np.zeros((HEADS, WIDTH))
    for h in range(HEADS):
        shares = [np.exp(SCALE * np.dot(inputs["q"][b, j, h].astype(float), key)) for key in keys]
        total = sum(shares) + np.exp(float(inputs["sinks"][h]))
        for share, key in zip(shares, keys, strict=True):
            out[h] += share / total * key
    return out


def check_stream(name: str, run: Run, plan: list[tuple[int, np.ndarray]], seed: int, tol: float) -> None:
    rng = np.random.default_rng(seed)
    batch = len(plan[0][1])
    window = np.full((batch, WINDOW, WIDTH), np.nan, np.float32)
    expected_window = window.copy()
    history: list[list[np.ndarray]] = [[] for _ in range(batch)]
    for chunk, lengths in plan:
        inputs = call_inputs(rng, chunk, np.array([len(row) for row in history]), lengths)
        out, window = run({**inputs, "window": window})
        assert np.isfinite(out).all()  # padding too
        for b in range(batch):
            for j in range(lengths[b]):
                expected_window[b, len(history[b]) % WINDOW] = inputs["kv"][b, j]
                history[b].append(inputs["kv"][b, j])
                expected = naive_token(name, inputs, history[b], b, j)
                np.testing.assert_allclose(out[b, j], expected, atol=tol, rtol=tol)
        np.testing.assert_array_equal(window, expected_window)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=30)
@given(plan=plans(max_chunk=10), seed=st.integers(0, 2**32))
def test_reference_equals_loop_over_history(name: str, plan: list[tuple[int, np.ndarray]], seed: int) -> None:
    check_stream(name, torch_run(name), plan, seed, tol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=30)
@given(plan=plans(max_chunk=10), seed=st.integers(0, 2**32))
def test_onnx_body_equals_loop_over_history(name: str, plan: list[tuple[int, np.ndarray]], seed: int) -> None:
    check_stream(name, ONNX[name], plan, seed, tol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("step", [1, 3, 4, 5])
def test_chunked_equals_one_shot(name: str, step: int) -> None:
    total = 14
    rng = np.random.default_rng(step)
    once = call_inputs(rng, total, np.array([0]), np.array([total]))
    window = np.full((1, WINDOW, WIDTH), np.nan, np.float32)
    run = torch_run(name)
    expected, expected_window = run({**once, "window": window})
    for start in range(0, total, step):
        part = dict(once)
        for key in ("q", "kv", "indices"):
            part[key] = once[key][:, start : start + step]
        part |= {"positions": np.array([start]), "lengths": np.array([part["kv"].shape[1]])}
        out, window = run({**part, "window": window})
        np.testing.assert_allclose(out, expected[:, start : start + step], rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(window, expected_window)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_of_tokens_do_not_change_the_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    inputs = call_inputs(rng, 23, np.array([6, 0]), np.array([23, 11]))
    inputs["window"] = rng.standard_normal((2, WINDOW, WIDTH), dtype=np.float32)
    expected = torch_run(name)(inputs)

    def blocks_of_three(chunk: int, per_token: int, limit: int | None = None) -> list[slice]:
        return [slice(start, min(start + 3, chunk)) for start in range(0, chunk, 3)]

    for module in ("attention_common", "csa_attention"):
        monkeypatch.setattr(f"v4c.custom_ops.{module}.blocks", blocks_of_three)
    for array, other in zip(torch_run(name)(inputs), expected, strict=True):
        np.testing.assert_allclose(array, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_huge_logits_do_not_overflow(name: str) -> None:
    inputs = call_inputs(np.random.default_rng(6), 9, np.array([0]), np.array([9]))
    inputs["q"] *= 1e4
    inputs["window"] = np.full((1, WINDOW, WIDTH), np.nan, np.float32)
    # The first token sees itself and the sink alone: it takes its own row, or nothing.
    own = inputs["kv"][0, 0]
    taken = (inputs["q"][0, 0] @ own > 0)[:, None] * own
    for out in (torch_run(name)(inputs)[0], ONNX[name](inputs)[0]):
        assert np.isfinite(out).all()
        np.testing.assert_allclose(out[0, 0], taken, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_torch_op_is_pure_and_its_fake_agrees(name: str) -> None:
    op = OPS[name]
    inputs = call_inputs(np.random.default_rng(7), 6, np.array([3, 0]), np.array([6, 2]))
    inputs["window"] = np.ones((2, WINDOW, WIDTH), np.float32)
    arguments = [torch.from_numpy(np.nan_to_num(inputs[n])) for n in op.inputs]
    attributes = ATTRIBUTES[name].values()
    torch.library.opcheck(op.torch_op, (*arguments, *attributes), test_utils=("test_schema", "test_faketensor"))
