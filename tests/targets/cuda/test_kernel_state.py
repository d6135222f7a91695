"""Kernels that read or write caches, against the references of their ops: rows anywhere, idle rows, padding, one call
after another on the same state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.custom_ops.harness import plans
from tests.targets.cuda.ops import KERNELS, ROUNDED, check, results
from v4c.custom_ops import OPS
from v4c.targets.cuda.lowering import CUDAKernels
from v4c.targets.cuda.schedule import AttentionSchedule, IndexSchedule

Plan = list[tuple[int, np.ndarray]]
SEEDS = st.integers(0, 2**31)


def normal(rng: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=rng)


def frequencies(rotary: int) -> torch.Tensor:
    return 10000.0 ** -(torch.arange(rotary // 2) / (rotary // 2))


def live(chunk: int, lengths: np.ndarray) -> np.ndarray:
    return np.arange(chunk) < lengths[:, None]


def follow(name: str, plan: Plan, inputs: Any, state: dict[str, torch.Tensor], bound: float, schedule: Any = None,
           start: int = 0, **attributes: Any) -> None:  # fmt: skip
    """Check every call of `plan`; the state that the kernel leaves goes into the next call of both."""
    op, positions = OPS[name], torch.full((len(plan[0][1]),), start)
    for chunk, lengths in plan:
        given_inputs = {**inputs(chunk, positions), **state, "positions": positions, "lengths": torch.tensor(lengths)}
        check(name, given_inputs, bound, schedule, live(chunk, lengths), **attributes)
        found, _ = results(name, given_inputs, schedule, **attributes)
        for output, written in op.writes.items():
            state[written] = torch.from_numpy(found[output])
        positions = positions + torch.tensor(lengths)


ATTENTION = [(2, 32, 5, 8), (9, 64, 7, 16), (3, 40, 4, 8)]
SCHEDULES = [AttentionSchedule(split_tokens=4, splits=4, warps=2), AttentionSchedule(split_tokens=8, splits=8)]


@settings(max_examples=8, deadline=None)
@given(
    plan=plans(12), config=st.sampled_from(ATTENTION), kind=st.sampled_from(["Sliding", "CSA", "HCA"]),
    derotated=st.booleans(), schedule=st.sampled_from(SCHEDULES), seed=SEEDS,
)  # fmt: skip
def test_attention(
    plan: Plan, config: tuple[int, int, int, int], kind: str, derotated: bool, schedule: Any, seed: int
) -> None:
    heads, width, window, rotary = config
    rng, batch = torch.Generator().manual_seed(seed), len(plan[0][1])
    capacity = sum(chunk for chunk, _ in plan) // 4 + 1
    rows, sinks = normal(rng, batch, capacity, width), normal(rng, heads)

    def inputs(chunk: int, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        indices = torch.full((batch, chunk, 6), -1)
        for b in range(batch):
            for j in range(chunk):
                ready = min(int(positions[b] + j + 1) // 4, capacity)
                chosen = torch.randperm(ready, generator=rng)[:6] if ready else torch.zeros(0, dtype=torch.int64)
                indices[b, j, : len(chosen)] = chosen
        return {
            "q": normal(rng, batch, chunk, heads, width), "kv": normal(rng, batch, chunk, width), "rows": rows,
            "indices": indices, "sinks": sinks, "inv_freq": frequencies(rotary),
        }  # fmt: skip

    plain = {
        "Sliding": "SlidingWindowAttention",
        "CSA": "CompressedSparseAttention",
        "HCA": "HeavilyCompressedAttention",
    }
    fused = {"Sliding": "DerotatedSlidingAttention", "CSA": "DerotatedCSA", "HCA": "DerotatedHCA"}
    name = (fused if derotated else plain)[kind]
    attributes: dict[str, Any] = {"ratio": 4} if kind == "HCA" else {}
    state = {"window": torch.full((batch, window, width), torch.nan)}
    follow(name, plan, inputs, state, 2e-5, schedule, **attributes, scale=width**-0.5)


def test_attention_of_published_width() -> None:
    rng = torch.Generator().manual_seed(1)
    inputs = {
        "q": normal(rng, 1, 1, 18, 512), "kv": normal(rng, 1, 1, 512), "window": normal(rng, 1, 128, 512),
        "rows": normal(rng, 1, 90, 512), "indices": torch.randperm(90, generator=rng)[:64][None, None],
        "sinks": normal(rng, 18), "positions": torch.tensor([400]), "lengths": torch.tensor([1]),
        "inv_freq": frequencies(64),
    }  # fmt: skip
    check("DerotatedCSA", inputs, 1e-5, scale=512**-0.5)


@settings(max_examples=8, deadline=None)
@given(plan=plans(14), wide=st.booleans(), seed=SEEDS, start=st.sampled_from([0, 3, 4, 11]))
def test_compressors(plan: Plan, wide: bool, seed: int, start: int) -> None:
    rng, batch = torch.Generator().manual_seed(seed), len(plan[0][1])
    capacity = (start + sum(chunk for chunk, _ in plan)) // 4 + 1
    weights: dict[str, torch.Tensor] = {"inv_freq": frequencies(8)}
    state: dict[str, torch.Tensor] = {}
    sizes = {"": (48, 24), "index_": (80, 40)} if wide else {"": (24, 24), "index_": (40, 40)}
    for prefix, (z, c) in sizes.items():
        weights |= {f"{prefix}bias": normal(rng, 4, z), f"{prefix}norm": normal(rng, c)}
        ring = (batch, 4 * (z // c), z)
        state |= {f"{prefix}state_kv": normal(rng, *ring), f"{prefix}state_gate": normal(rng, *ring)}
        state[f"{prefix}rows"] = normal(rng, batch, capacity, c)

    def inputs(chunk: int, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        made = {p + n: normal(rng, batch, chunk, z) for p, (z, _) in sizes.items() for n in ("kv", "gate")}
        return made | weights

    follow("KVCompressPair", plan, inputs, dict(state), 2e-5, start=start, ratio=4, eps=1e-6)
    follow("KVCompress", plan, inputs, dict(state), 2e-5, start=start, ratio=4, eps=1e-6)


@settings(max_examples=8, deadline=None)
@given(chunk=st.integers(1, 9), seed=SEEDS, rotary=st.booleans(), top_k=st.sampled_from([1, 6, 64]), far=st.booleans(),
       rounded=st.booleans())  # fmt: skip
def test_index(chunk: int, seed: int, rotary: bool, top_k: int, far: bool, rounded: bool) -> None:
    rng = torch.Generator().manual_seed(seed)
    positions = torch.tensor([600 if far else 0, 17])
    lengths = torch.tensor([chunk, max(chunk - 2, 0)])
    # Small integers: sums are exact in any order, rounded or not, and many are equal.
    inputs = {
        "q": torch.randint(-2, 3, (2, chunk, 16, 32), generator=rng).float(),
        "weights": torch.randint(-1, 3, (2, chunk, 16), generator=rng).float(),
        "index_rows": torch.randint(-2, 3, (2, 160, 32), generator=rng).float(),
        "positions": positions, "lengths": lengths, "inv_freq": torch.zeros(4),
    }  # fmt: skip
    name = "RotaryLightningIndex" if rotary else "LightningIndex"
    mask = live(chunk, lengths.numpy())
    kernels = ROUNDED if rounded else KERNELS
    check(name, inputs, 0, IndexSchedule(8), mask, kernels, ratio=4, top_k=top_k)


@pytest.mark.parametrize("kernels", [KERNELS, ROUNDED], ids=["float32", "rounded"])
@pytest.mark.parametrize(("rows", "top_k"), [(3000, 512), (3000, 1024), (700, 1024), (1024, 1024)])
def test_index_of_many_rows(rows: int, top_k: int, kernels: CUDAKernels) -> None:
    rng = torch.Generator().manual_seed(rows)
    inputs = {
        "q": torch.randint(-2, 3, (1, 1, 3, 32), generator=rng).float(),
        "weights": torch.ones(1, 1, 3), "index_rows": torch.randint(-2, 3, (1, rows, 32), generator=rng).float(),
        "positions": torch.tensor([4 * rows - 1]), "lengths": torch.tensor([1]),
    }  # fmt: skip
    check("LightningIndex", inputs, 0, kernels=kernels, ratio=4, top_k=top_k)


@settings(max_examples=8, deadline=None)
@given(plan=plans(6), seed=SEEDS)
def test_engram(plan: Plan, seed: int) -> None:
    rng, batch = torch.Generator().manual_seed(seed), len(plan[0][1])
    hashing = {
        "lookup": torch.randint(0, 60, (80,), generator=rng),
        "multipliers": torch.randint(2**61, 2**62, (3,), generator=rng) | 1,
        "primes": torch.tensor([97, 101, 103, 107]), "offsets": torch.tensor([0, 97, 198, 301]),
    }  # fmt: skip

    def tokens(chunk: int, _: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.randint(0, 80, (batch, chunk), generator=rng), **hashing}

    follow("EngramHash", plan, tokens, {"history": torch.zeros(batch, 2, dtype=torch.int64)}, 0, pad_id=2)
    m, d, taps, dilation = 4, 50, 4, 3
    weights = {n: normal(rng, m, d) for n in ("key_norm", "stream_norm", "conv_norm")}
    weights["conv_weight"] = normal(rng, m * d, taps)

    def inputs(chunk: int, _: torch.Tensor) -> dict[str, torch.Tensor]:
        streams = {n: normal(rng, batch, chunk, m, d) for n in ("keys", "streams")}
        return {**weights, **streams, "value": normal(rng, batch, chunk, d)}

    state = {"conv_state": torch.full((batch, (taps - 1) * dilation, m * d), torch.nan)}
    follow("EngramGateConv", plan, inputs, state, 5e-5, dilation=dilation, eps=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "chunk"), [(1, 1), (6, 130), (8, 1), (40, 9), (64, 37)])
def test_engram_lookup(dtype: torch.dtype, width: int, chunk: int) -> None:
    """Rows that begin at multiples of 16 bytes and others, of part of a block and of several; the table on the host."""
    rng = torch.Generator().manual_seed(width)
    table = normal(rng, 300, width).to(dtype)
    addresses = torch.randint(0, 300, (2, chunk, 5), generator=rng)
    addresses[0, 0] = torch.tensor([0, 299, 299, 1, 0])
    check("EngramLookup", {"table": table, "addresses": addresses}, 0, on_host=("table",))
