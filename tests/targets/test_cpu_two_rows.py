"""Two rows give the same bits as each alone: what speculative decoding's exactness rests on, kernel by kernel.

How a sum is ordered may depend on the kernel and its schedule, but not on whether one row is multiplied or two.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from tests.targets.cpu_harness import compiled, run
from v4c.errors import UnsupportedError
from v4c.targets.cpu.kernels.experts import grouped_experts
from v4c.targets.cpu.kernels.linear import linear
from v4c.targets.cpu.kernels.packing import PANEL, pack_gate_up, pack_rows
from v4c.targets.cpu.kernels.quant_packing import quant_pack_gate_up, quant_pack_rows
from v4c.targets.cpu.schedule import AttentionSchedule, ExpertSchedule, PanelSchedule, ProductSchedule

BITS = {"int8": 8, "int4": 4}
DTYPES = ["float32", "bfloat16", "int8", "int4"]
LEVELS = ["x86-64", "x86-64-v3", "x86-64-v4"]


def packed(weight: np.ndarray, dtype: str) -> np.ndarray:
    if dtype in BITS:
        return quant_pack_rows(weight, BITS[dtype])
    return pack_rows(weight.astype(ml_dtypes.bfloat16) if dtype == "bfloat16" else weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_a_product(level: str, dtype: str) -> None:
    """At the widths of a panel and more, a sum in several blocks, and the schedule of each level."""
    schedule = ProductSchedule.of(level)
    n, k = PANEL + 3, schedule.block_bytes // (4 * PANEL) + 36
    rng = np.random.default_rng(k)
    x = rng.standard_normal((2, k), dtype=np.float32)
    weight = packed(rng.standard_normal((n, k), dtype=np.float32), dtype)
    kernel = compiled(linear, n, k, dtype, False, schedule)
    (both,) = run(kernel, [x, weight], [((2, n), "float32")]).outputs
    for row in (0, 1):
        (alone,) = run(kernel, [x[row : row + 1].copy(), weight], [((1, n), "float32")]).outputs
        np.testing.assert_array_equal(both[row : row + 1], alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts(dtype: str) -> None:
    """Some experts are chosen by both tokens, some by one."""
    experts, d, f, top_k = 4, 100, 70, 2
    rng = np.random.default_rng(0)
    gate_up = rng.standard_normal((experts, 2 * f, d), dtype=np.float32)
    down = rng.standard_normal((experts, d, f), dtype=np.float32)
    if dtype in BITS:
        stored = [quant_pack_gate_up(gate_up, BITS[dtype]), quant_pack_rows(down, BITS[dtype])]
    else:
        cast = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
        stored = [pack_gate_up(gate_up.astype(cast)), pack_rows(down.astype(cast))]
    x = rng.standard_normal((1, 2, d), dtype=np.float32)
    weights = rng.random((1, 2, top_k), dtype=np.float32)
    indices = np.array([[[1, 3], [0, 1]]])
    kernel = compiled(grouped_experts, experts, d, f, top_k, 7.0, dtype, False, ExpertSchedule())
    (both,) = run(kernel, [x, weights, indices, *stored], [((1, 2, d), "float32")]).outputs
    for token in (0, 1):
        given = [array[:, token : token + 1].copy() for array in (x, weights, indices)]
        (alone,) = run(kernel, [*given, *stored], [((1, 1, d), "float32")]).outputs
        np.testing.assert_array_equal(both[:, token], alone[:, 0])


@pytest.mark.parametrize("accumulators", PanelSchedule.choices()["accumulators"])
@pytest.mark.parametrize("chains", PanelSchedule.choices()["chains"])
@pytest.mark.parametrize("k", [1, 2, 6, 4096])
def test_every_schedule_sums_two_rows_as_one(accumulators: int, chains: int, k: int) -> None:
    schedule = PanelSchedule(1, accumulators, chains)
    assert schedule.partial_sums(1, k) == schedule.partial_sums(2, k)
    for rows in (1, 2):
        assert rows * schedule.columns(rows) * schedule.partial_sums(rows, k) <= accumulators


def test_no_schedule_cuts_the_rows_of_two_tokens_otherwise() -> None:
    assert min(AttentionSchedule.choices()["enough_tokens"]) > 2
    with pytest.raises(UnsupportedError, match="enough_tokens: expected at least 3, found 2"):
        AttentionSchedule(enough_tokens=2)
