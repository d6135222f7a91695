"""Products with published FP8 and FP4 weights, against float64 with what their codes and scales stand for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.targets.cpu_harness import compiled, run
from tests.targets.quantised_reference import VNNI, rounded
from tests.targets.test_cpu_quant_experts import LIMIT, swiglu
from v4c.frontend.block_formats import E2M1, E4M3, E8M0
from v4c.targets.cpu.kernels.experts import grouped_experts, mixture_of_experts
from v4c.targets.cpu.kernels.grouped_linear import grouped_linear
from v4c.targets.cpu.kernels.linear import linear, merged_linear
from v4c.targets.cpu.kernels.native_packing import (
    native_pack_gate_up,
    native_pack_rows,
    native_packed_gate_up_shape,
    native_packed_shape,
)
from v4c.targets.native_rows import NATIVE_GROUPS, NativeRows

SEEDS = st.integers(0, 2**32 - 1)
DTYPES = ["fp8", "fp4"]


def random_weight(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> tuple[NativeRows, np.ndarray]:
    """Rows of random codes and scales, and their values in float64."""
    *lead, n, k = shape
    group = NATIVE_GROUPS[dtype]
    if dtype == "fp8":
        codes = rng.integers(0, 256, shape, np.uint8)
        codes[codes & 0x7F == 0x7F] = 0x7E
        values = E4M3[codes].astype(np.float64) / 256
    else:
        codes = rng.integers(0, 16, (*lead, n, k + k % 2), np.uint8)
        codes[..., k:] = 0
        values = E2M1[codes[..., :k]].astype(np.float64) / 4
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    exponent = {"fp8": 127 - 8, "fp4": 127 - 2}[dtype]
    scales = rng.integers(exponent - 5, exponent, (*lead, n, -(-k // group))).astype(np.uint8)
    values = values * np.repeat(E8M0[scales].astype(np.float64) / 2.0 ** (exponent - 127), group, -1)[..., :k]
    return NativeRows(codes, scales), values


def bound(x: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows as the kernels read them, and how far an element may be off."""
    if dtype == "fp8":
        return x.astype(np.float64), np.zeros(x.shape)
    return rounded(x)


def check(y: np.ndarray, x: np.ndarray, values: np.ndarray, dtype: str) -> None:
    read, slack = bound(x, dtype)
    assert np.all(np.abs(y - read @ values.T) <= (3e-6 * np.abs(read) + slack) @ np.abs(values).T + 1e-30)


@settings(deadline=None, max_examples=4)
@given(st.integers(1, 100), st.integers(1, 300), st.integers(1, 20), st.sampled_from(DTYPES), SEEDS)
@pytest.mark.parametrize("vnni", VNNI)
def test_linear_of_any_width(vnni: bool, n: int, k: int, rows: int, dtype: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight, values = random_weight(rng, (n, k), dtype)
    packed = native_pack_rows(weight, dtype)
    assert packed.shape == native_packed_shape((n, k), dtype)
    x = rng.standard_normal((rows, k), dtype=np.float32)
    y = run(compiled(linear, n, k, dtype, vnni), [x, packed], [((rows, n), "float32")]).outputs[0]
    check(y, x, values, dtype)


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 40), st.sampled_from(DTYPES), SEEDS)
@pytest.mark.parametrize("vnni", VNNI)
def test_linear_of_any_row_count(vnni: bool, rows: int, dtype: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight, values = random_weight(rng, (70, 330), dtype)
    x = rng.standard_normal((rows, 330), dtype=np.float32)
    kernel = compiled(linear, 70, 330, dtype, vnni)
    y = run(kernel, [x, native_pack_rows(weight, dtype)], [((rows, 70), "float32")]).outputs[0]
    check(y, x, values, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vnni", VNNI)
def test_every_code_and_a_wide_range_of_scales(vnni: bool, dtype: str) -> None:
    rng = np.random.default_rng(0)
    group = NATIVE_GROUPS[dtype]
    codes = np.array([c for c in range(256) if dtype == "fp4" or c & 0x7F != 0x7F], np.uint8)
    table = np.stack([E2M1[codes & 15], E2M1[codes >> 4]], 1).reshape(-1) if dtype == "fp4" else E4M3[codes]
    k = len(table)
    scales = np.linspace(60, 200, 40 * -(-k // group)).astype(np.uint8).reshape(40, -1)
    weight = NativeRows(np.tile(codes, (40, 1)), scales)
    values = table.astype(np.float64) * np.repeat(E8M0[scales].astype(np.float64), group, 1)[:, :k]
    x = rng.standard_normal((3, k), dtype=np.float32)
    kernel = compiled(linear, 40, k, dtype, vnni)
    y = run(kernel, [x, native_pack_rows(weight, dtype)], [((3, 40), "float32")]).outputs[0]
    check(y, x, values, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vnni", VNNI)
def test_merged_parts_and_groups(vnni: bool, dtype: str) -> None:
    rng = np.random.default_rng(1)
    sizes, k, rows = (40, 9), 160, 5
    parts = [random_weight(rng, (n, k), dtype) for n in sizes]
    packed = np.concatenate([native_pack_rows(rows, dtype) for rows, _ in parts])
    x = rng.standard_normal((rows, k), dtype=np.float32)
    outputs = [((rows, n), "float32") for n in sizes]
    for y, (_, values) in zip(
        run(compiled(merged_linear, sizes, k, dtype, None, vnni), [x, packed], outputs).outputs, parts, strict=True
    ):
        check(y, x, values, dtype)
    weight, values = random_weight(rng, (3, 40, k), dtype)
    x = rng.standard_normal((rows, 3, k), dtype=np.float32)
    kernel = compiled(grouped_linear, 3, 40, k, dtype, vnni)
    y = run(kernel, [x, native_pack_rows(weight, dtype)], [((rows, 3, 40), "float32")]).outputs[0]
    for g in range(3):
        check(y[:, g], x[:, g], values[g], dtype)


@settings(deadline=None, max_examples=8)
@given(count=st.integers(1, 30), seed=SEEDS)
@pytest.mark.parametrize("vnni", VNNI)
@pytest.mark.parametrize(
    "kinds",
    [
        ("fp4", "fp8"),
        ("fp4", ""),
        pytest.param(("fp4", "fp4"), marks=pytest.mark.slow),
        pytest.param(("fp8", "fp4"), marks=pytest.mark.slow),
    ],
)
def test_experts_of_both_formats(vnni: bool, kinds: tuple[str, str], count: int, seed: int) -> None:
    """Routed FP4 experts beside an FP8 shared one, as published, and the other way round."""
    rng = np.random.default_rng(seed)
    experts, d, f, g, top_k = 5, 72, 40, 24, 2
    routed, shared = kinds
    stacks = [random_weight(rng, (experts, 2 * f, d), routed), random_weight(rng, (experts, d, f), routed)]
    x = rng.standard_normal((1, count, d), dtype=np.float32)
    weights, indices = rng.random((1, count, top_k), dtype=np.float32), rng.integers(-1, experts, (1, count, top_k))
    gate_up, down = native_pack_gate_up(stacks[0][0], routed), native_pack_rows(stacks[1][0], routed)
    assert gate_up.shape == native_packed_gate_up_shape((experts, 2 * f, d), routed)
    arguments, uses = [x, weights, indices, gate_up, down], []
    if shared:
        own = [random_weight(rng, (2 * g, d), shared), random_weight(rng, (d, g), shared)]
        arguments += [native_pack_gate_up(own[0][0], shared), native_pack_rows(own[1][0], shared)]
        kernel = compiled(mixture_of_experts, experts, d, f, top_k, LIMIT, routed, g, vnni, shared)
        uses.append((np.arange(count), np.ones(count), own[0][1], own[1][1], shared))
    else:
        kernel = compiled(grouped_experts, experts, d, f, top_k, LIMIT, routed, vnni)
    made = run(kernel, arguments, [(x.shape, "float32")]).outputs[0][0]
    for e in range(experts):
        tokens, choices = np.nonzero(indices[0] == e)
        uses.append((tokens, weights[0][tokens, choices], stacks[0][1][e], stacks[1][1][e], routed))
    y, slack = np.zeros((count, d)), np.zeros((count, d))
    for tokens, scale, first, second, dtype in uses:
        if len(tokens):
            row, undecided = bound(x[0, tokens], dtype)
            hidden = swiglu(row, first)
            share = 4 * LIMIT * (undecided @ np.abs(first).T).max(-1, keepdims=True)
            read, steps = rounded(hidden, accuracy=1e-5) if dtype == "fp4" else (hidden, 0 * hidden)
            np.add.at(y, tokens, scale[:, None] * (read @ second.T))
            off = (2e-5 * np.abs(read).max(-1, keepdims=True) + steps + share) @ np.abs(second).T
            np.add.at(slack, tokens, scale[:, None] * off)
    assert np.all(np.abs(made - y) <= slack + 1e-6)
