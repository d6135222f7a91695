"""The KV compressor against a reference that keeps every token: windows, overlap, ring state, padding, idle rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.custom_ops.harness import OnnxOp, plans, spec, to_torch
from v4c.custom_ops import OPS
from v4c.errors import InputError

OP = OPS["KVCompress"]
WIDTH, PAIRS, ROWS, EPS = 6, 2, 48, 1e-5
STATE = ("state_kv", "state_gate", "rows")
KINDS = [(1, 4), (2, 4), (2, 1), (1, 5), (2, 3)]
"""(halves, ratio): one half is HCA, two halves with overlap are CSA and the indexer."""

Inputs = dict[str, np.ndarray]
Run = Callable[[Inputs], list[np.ndarray]]


def onnx_op(halves: int, ratio: int) -> OnnxOp:
    wide, ring = halves * WIDTH, halves * ratio
    specs = {
        "kv": spec("batch", "chunk", wide),
        "gate": spec("batch", "chunk", wide),
        "bias": spec(ratio, wide),
        "norm": spec(WIDTH),
        "inv_freq": spec(PAIRS),
        "state_kv": spec("batch", ring, wide),
        "state_gate": spec("batch", ring, wide),
        "rows": spec("batch", "capacity", WIDTH),
        "positions": spec("batch", dtype="int64"),
        "lengths": spec("batch", dtype="int64"),
    }
    return OnnxOp(OP, specs, ratio=ratio, eps=EPS)


ONNX = {kind: onnx_op(*kind) for kind in KINDS}


def torch_run(ratio: int) -> Run:
    return lambda inputs: [t.numpy() for t in OP.torch_op(*to_torch(inputs, OP), ratio, EPS)]


def weights(rng: np.random.Generator, halves: int, ratio: int) -> Inputs:
    return {
        "bias": rng.standard_normal((ratio, halves * WIDTH), dtype=np.float32),
        "norm": rng.uniform(0.5, 2.0, WIDTH).astype(np.float32),
        "inv_freq": rng.uniform(0.01, 1.0, PAIRS).astype(np.float32),
    }


def chunk_inputs(rng: np.random.Generator, batch: int, chunk: int, halves: int) -> Inputs:
    shape = (batch, chunk, halves * WIDTH)
    return {n: rng.standard_normal(shape, dtype=np.float32) for n in ("kv", "gate")}


def garbage_state(batch: int, halves: int, ratio: int) -> Inputs:
    """State as a fresh allocation may be: NaN everywhere."""
    ring = np.full((batch, halves * ratio, halves * WIDTH), np.nan, np.float32)
    return {"state_kv": ring, "state_gate": ring.copy(), "rows": np.full((batch, ROWS, WIDTH), np.nan, np.float32)}


def naive_row(kv: list[np.ndarray], gate: list[np.ndarray], window: int, params: Inputs, halves: int) -> np.ndarray:
    """Compressed row `window` of one sequence, from all of its tokens."""
    ratio = len(params["bias"])
    slots = []
    for part in range(halves):
        for i in range(ratio):
            t = (window - (halves - 1) + part) * ratio + i
            if t >= 0:
                columns = slice(part * WIDTH, (part + 1) * WIDTH)
                slots.append(
                    (kv[t][columns].astype(float), gate[t][columns].astype(float) + params["bias"][i, columns])
                )
    y = np.zeros(WIDTH)
    for c in range(WIDTH):
        share = np.exp([g[c] for _, g in slots])
        y[c] = sum(v[c] * s for (v, _), s in zip(slots, share / share.sum(), strict=True))
    y = y / np.sqrt((y**2).mean() + EPS) * params["norm"]
    for i, frequency in enumerate(params["inv_freq"].astype(float)):
        a = WIDTH - 2 * PAIRS + 2 * i
        turned = complex(y[a], y[a + 1]) * np.exp(1j * window * ratio * frequency)
        y[a], y[a + 1] = turned.real, turned.imag
    return y


def check_stream(run: Run, plan: list[tuple[int, np.ndarray]], halves: int, ratio: int, seed: int, tol: float) -> None:
    """Feed the plan's calls and compare the whole state after each with one rebuilt from all tokens so far."""
    rng = np.random.default_rng(seed)
    batch, ring = len(plan[0][1]), halves * ratio
    params = weights(rng, halves, ratio)
    state = garbage_state(batch, halves, ratio)
    tokens: dict[str, list[list[np.ndarray]]] = {n: [[] for _ in range(batch)] for n in ("kv", "gate")}
    for chunk, lengths in plan:
        positions = np.array([len(row) for row in tokens["kv"]])
        new = chunk_inputs(rng, batch, chunk, halves)
        state = dict(
            zip(STATE, run({**params, **new, **state, "positions": positions, "lengths": lengths}), strict=True)
        )
        expected = garbage_state(batch, halves, ratio)
        for b in range(batch):
            for name in ("kv", "gate"):
                tokens[name][b].extend(new[name][b, : lengths[b]])
                for t in range(len(tokens[name][b])):
                    expected[f"state_{name}"][b, t % ring] = tokens[name][b][t]
            for window in range(len(tokens["kv"][b]) // ratio):
                expected["rows"][b, window] = naive_row(tokens["kv"][b], tokens["gate"][b], window, params, halves)
        for name in ("state_kv", "state_gate"):
            np.testing.assert_array_equal(state[name], expected[name], err_msg=name)
        np.testing.assert_allclose(state["rows"], expected["rows"], atol=tol, rtol=tol)  # NaN must meet NaN


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(KINDS), plans(max_chunk=11), st.integers(0, 2**32))
def test_reference_equals_recomputation_from_all_tokens(
    kind: tuple[int, int], plan: list[tuple[int, np.ndarray]], seed: int
) -> None:
    # 1e-6: the expected rows are stored as float32.
    check_stream(torch_run(kind[1]), plan, *kind, seed, tol=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(KINDS), plans(max_chunk=11), st.integers(0, 2**32))
def test_onnx_body_equals_recomputation_from_all_tokens(
    kind: tuple[int, int], plan: list[tuple[int, np.ndarray]], seed: int
) -> None:
    check_stream(ONNX[kind], plan, *kind, seed, tol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [1, 2, 3, 4, 7])
def test_chunked_equals_one_shot(kind: tuple[int, int], step: int) -> None:
    halves, ratio = kind
    rng = np.random.default_rng(step)
    params, tokens = weights(rng, halves, ratio), chunk_inputs(rng, 1, 17, halves)
    once = {
        **params,
        **tokens,
        **garbage_state(1, halves, ratio),
        "positions": np.array([0]),
        "lengths": np.array([17]),
    }
    expected = torch_run(ratio)(once)
    state = garbage_state(1, halves, ratio)
    for start in range(0, 17, step):
        part = {n: a[:, start : start + step] for n, a in tokens.items()}
        span = {"positions": np.array([start]), "lengths": np.array([part["kv"].shape[1]])}
        state = dict(zip(STATE, torch_run(ratio)({**params, **part, **state, **span}), strict=True))
    for name, array in zip(STATE, expected, strict=True):
        np.testing.assert_allclose(state[name], array, rtol=1e-12, atol=1e-12)


def test_capacity_may_end_inside_a_window_and_a_full_row_may_idle() -> None:
    rng = np.random.default_rng(0)
    state = garbage_state(2, 2, 4)
    state["rows"] = state["rows"][:, :2]
    ring = [rng.standard_normal((2, 8, 12), dtype=np.float32) for _ in range(2)]
    inputs = {**weights(rng, 2, 4), **chunk_inputs(rng, 2, 3, 2), **state, "state_kv": ring[0], "state_gate": ring[1]}
    inputs |= {"positions": np.array([8, 8]), "lengths": np.array([0, 2])}
    for run in (torch_run(4), ONNX[2, 4]):
        state_kv, _, rows = run(inputs)
        assert np.isnan(rows).all()
        np.testing.assert_array_equal(state_kv[0], ring[0][0])
        np.testing.assert_array_equal(state_kv[1, :2], inputs["kv"][1, :2])


def test_state_of_the_wrong_size_is_refused() -> None:
    rng = np.random.default_rng(0)
    inputs = {**weights(rng, 1, 4), **chunk_inputs(rng, 1, 3, 1), **garbage_state(1, 1, 3)}
    inputs |= {"positions": np.array([0]), "lengths": np.array([3])}
    with pytest.raises(InputError, match="expected state of 4 slots for ratio 4, found 3"):
        torch_run(4)(inputs)


def test_torch_op_is_pure_and_its_fake_agrees() -> None:
    rng = np.random.default_rng(1)
    inputs = {**weights(rng, 2, 4), **chunk_inputs(rng, 2, 9, 2), **garbage_state(2, 2, 4)}
    inputs |= {"positions": np.array([0, 0]), "lengths": np.array([9, 4])}
    arguments = [torch.from_numpy(np.nan_to_num(inputs[n])) for n in OP.inputs]
    torch.library.opcheck(OP.torch_op, (*arguments, 4, EPS), test_utils=("test_schema", "test_faketensor"))
