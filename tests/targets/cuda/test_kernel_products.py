"""Products and experts against float64, for one, few and many rows, in both storage dtypes and by every path."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from tests.targets.cuda.harness import run
from tests.targets.cuda.ops import check
from v4c.custom_ops import OPS
from v4c.targets.cuda.coded_rows import pack_published, pack_quantised
from v4c.targets.cuda.kernels.experts import grouped_experts, mixture_of_experts
from v4c.targets.cuda.kernels.products import grouped_linear, merged_linear
from v4c.targets.cuda.schedule import ExpertSchedule, ProductSchedule
from v4c.targets.native_rows import NATIVE_GROUPS, NativeRows
from v4c.targets.quantisation import dequantised

DTYPES = {"float32": (torch.float32, 2e-6), "bfloat16": (torch.bfloat16, 6e-3)}
"""The weight's dtype, and the error to expect relative to the terms' sizes: on tensor cores inputs are rounded too."""
CODED = ("fp8", "fp4", "int8", "int4")
ROUNDED = 9e-3
"""As above of coded weights on tensor cores, where an integer times its scale is rounded too."""


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def normal(rng: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=rng)


def close(y: np.ndarray, x: torch.Tensor, w: torch.Tensor, bound: float) -> None:
    expected = x.double() @ w.double().T
    size = (x.double() ** 2).sum(-1, keepdim=True).sqrt() * (w.double() ** 2).sum(-1).sqrt()
    assert (np.abs(y - expected.numpy()) / size.numpy()).max() <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 9, 65, 130])
def test_merged_linear(rows: int, dtype: str, rng: torch.Generator) -> None:
    kind, bound = DTYPES[dtype]
    x, w = normal(rng, rows, 96), normal(rng, 150, 96).to(kind)
    arguments = ((70, 48, 32), 96, dtype, None, ProductSchedule(warp_outputs=4, fill=2))
    outputs = run(merged_linear, arguments, [x, w], [((rows, n), "float32") for n in (70, 48, 32)]).outputs
    close(np.concatenate(outputs, 1), x, w, bound)


def coded(rng: torch.Generator, dtype: str, *shape: int, size: float = 1.0) -> tuple[np.ndarray, torch.Tensor]:
    """Random weights ``[..., N, K]`` of about `size` as the kernels have them, and their values by another decoder."""
    if dtype in ("int8", "int4"):
        weights = normal(rng, *shape).numpy() * np.float32(size)
        return pack_quantised(weights, dtype), torch.from_numpy(dequantised(weights, int(dtype[3:])))
    *lead, k = shape
    group = NATIVE_GROUPS[dtype]
    usual = round(math.log2(size)) - (6 if dtype == "fp8" else 1)
    exponents = torch.randint(usual - 2, usual + 2, (*lead, -(-k // group)), generator=rng).numpy()
    factors = np.repeat(2.0**exponents, group, -1)[..., :k]
    if dtype == "fp8":
        codes = torch.randint(0, 256, shape, generator=rng).numpy().astype(np.uint8)
        codes[codes % 128 == 127] = 1  # no NaN, and more of the smallest number
        values, stored = codes.view(ml_dtypes.float8_e4m3fn), codes
    else:
        codes = torch.randint(0, 16, shape, generator=rng).numpy().astype(np.uint8)
        values, even = codes.view(ml_dtypes.float4_e2m1fn), np.pad(codes, [(0, 0)] * len(lead) + [(0, k % 2)])
        stored = even[..., ::2] | even[..., 1::2] << 4
    rows = NativeRows(stored, (exponents + 127).astype(np.uint8))
    return pack_published(rows, k, dtype), torch.from_numpy(values.astype(np.float64) * factors)


@pytest.mark.parametrize("dtype", CODED)
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 70])
@pytest.mark.parametrize("k", [96, 320])
def test_coded_weights(rows: int, k: int, dtype: str, rng: torch.Generator) -> None:
    x, (stored, w) = normal(rng, rows, k), coded(rng, dtype, 150, k)
    arguments = ((70, 48, 32), k, dtype, None, ProductSchedule(warp_outputs=4, fill=2, small_tile_rows=64))
    outputs = run(merged_linear, arguments, [x, stored], [((rows, n), "float32") for n in (70, 48, 32)]).outputs
    close(np.concatenate(outputs, 1), x, w, 2e-6 if rows <= 8 else ROUNDED)


@pytest.mark.parametrize("dtype", CODED)
@pytest.mark.parametrize("rows", [2, 12])
def test_coded_rows_that_are_no_whole_copies(rows: int, dtype: str, rng: torch.Generator) -> None:
    x, (stored, w) = normal(rng, rows, 45), coded(rng, dtype, 20, 45)
    (y,) = run(
        merged_linear, ((20,), 45, dtype, None, ProductSchedule()), [x, stored], [((rows, 20), "float32")]
    ).outputs
    close(y, x, w, 2e-6)


@pytest.mark.parametrize("dtype", CODED)
def test_edge_scales(dtype: str, rng: torch.Generator) -> None:
    """The smallest scales that are no zero, and large ones: codes are decoded exactly before they are scaled."""
    x, w = torch.eye(3, 64), torch.zeros(32, 64)
    if dtype in NATIVE_GROUPS:
        stored, w = coded(rng, dtype, 32, 64)
        start = stored.shape[1] - 16
        for code in (0, 1, 10, 240):
            stored[:, start : start + 2] = code
            exact = coded_values(stored, dtype)[:, :3] * 2.0 ** (code - 127)
            for rows in (3, 9) if code > 1 else (3,):  # a bfloat16 ends at 2^-133
                inputs = torch.cat([x, torch.zeros(rows - 3, 64)])
                (y,) = run(
                    merged_linear, ((32,), 64, dtype, None, ProductSchedule()), [inputs, stored],
                    [((rows, 32), "float32")],
                ).outputs  # fmt: skip
                np.testing.assert_array_equal(y[:3].T, exact.astype(np.float32))
    else:
        w[:, 0], w[:, 1] = 2.0**-24 * 7, -60000.0
        stored = pack_quantised(w.numpy(), dtype)
        (y,) = run(
            merged_linear, ((32,), 64, dtype, None, ProductSchedule()), [x, stored], [((3, 32), "float32")]
        ).outputs
        np.testing.assert_array_equal(y.T, dequantised(w.numpy(), int(dtype[3:]))[:, :3])


def coded_values(stored: np.ndarray, dtype: str) -> np.ndarray:
    """The values of FP8 or FP4 codes in rows of 64, without their scales."""
    if dtype == "fp8":
        return stored[:, :64].view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    both = np.stack([stored[:, :32] & 15, stored[:, :32] >> 4], -1).reshape(len(stored), 64)
    return both.view(ml_dtypes.float4_e2m1fn).astype(np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 6, 20])
def test_norm_before_a_product(rows: int, dtype: str, rng: torch.Generator) -> None:
    kind, bound = DTYPES[dtype]
    x, norm, w = normal(rng, rows, 64), normal(rng, 64), normal(rng, 40, 64).to(kind)
    arguments = ((40,), 64, dtype, 1e-6, ProductSchedule())
    (y,) = run(merged_linear, arguments, [x, norm, w], [((rows, 40), "float32")]).outputs
    close(y, x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * norm, w, bound)


@pytest.mark.parametrize("k", [36, 33])
@pytest.mark.parametrize("rows", [2, 12])
def test_rows_that_are_no_whole_copies(rows: int, k: int, rng: torch.Generator) -> None:
    x, w = normal(rng, rows, k), normal(rng, 20, k).bfloat16()
    (y,) = run(
        merged_linear, ((20,), k, "bfloat16", None, ProductSchedule()), [x, w], [((rows, 20), "float32")]
    ).outputs
    close(y, x, w, 2e-6)  # converted, not rounded


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_grouped_linear(rows: int, dtype: str, rng: torch.Generator) -> None:
    kind, bound = DTYPES[dtype]
    x, w = normal(rng, rows, 3, 64), normal(rng, 3 * 40, 64).to(kind)
    arguments = (3, 40, 64, dtype, ProductSchedule())
    (y,) = run(grouped_linear, arguments, [x, w], [((rows, 3, 40), "float32")]).outputs
    for group in range(3):
        close(y[:, group], x[:, group], w[group * 40 : group * 40 + 40], bound)


@pytest.mark.parametrize("dtype", CODED)
@pytest.mark.parametrize("rows", [1, 70])
def test_coded_grouped_linear(rows: int, dtype: str, rng: torch.Generator) -> None:
    x, (stored, w) = normal(rng, rows, 3, 64), coded(rng, dtype, 3 * 40, 64)
    arguments = (3, 40, 64, dtype, ProductSchedule())
    (y,) = run(grouped_linear, arguments, [x, stored], [((rows, 3, 40), "float32")]).outputs
    for group in range(3):
        close(y[:, group], x[:, group], w[group * 40 : group * 40 + 40], 2e-6 if rows == 1 else ROUNDED)


def expert_inputs(rng: torch.Generator, tokens: int, kind: torch.dtype, d: int, f: int) -> dict[str, torch.Tensor]:
    indices = torch.stack([torch.randperm(12, generator=rng)[:4] for _ in range(tokens)])
    indices[torch.rand(indices.shape, generator=rng) < 0.2] = -1
    return {
        "x": normal(rng, 1, tokens, d), "weights": torch.rand(1, tokens, 4, generator=rng), "indices": indices[None],
        "gate_up": (normal(rng, 12, 2 * f, d) / 8).to(kind), "down": (normal(rng, 12, d, f) / 8).to(kind),
        "shared_gate_up": (normal(rng, 2 * 24, d) / 8).to(kind), "shared_down": (normal(rng, d, 24) / 8).to(kind),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize(("d", "f"), [(64, 40), (36, 20)])
def test_experts(tokens: int, dtype: str, d: int, f: int, rng: torch.Generator) -> None:
    kind, _ = DTYPES[dtype]
    inputs, schedule = expert_inputs(rng, tokens, kind, d, f), ExpertSchedule(few_tokens=8)
    rounded = dtype == "bfloat16" and tokens > 8 and d == 64
    bound = 0.08 if rounded else 3e-5  # sums of some 200 products of numbers that were rounded to 8 bits
    check("GroupedExperts", inputs, bound, schedule, limit=2.0)
    check("MixtureOfExperts", inputs, bound, schedule, limit=2.0)


@pytest.mark.parametrize("expert", [0, 11, -1])
def test_all_tokens_to_one_expert(expert: int, rng: torch.Generator) -> None:
    inputs = expert_inputs(rng, 30, torch.float32, 64, 40)
    inputs["indices"] = torch.full_like(inputs["indices"], -1)
    inputs["indices"][..., 2] = expert
    check("MixtureOfExperts", inputs, 3e-5, ExpertSchedule(few_tokens=8), limit=2.0)


@pytest.mark.parametrize(
    "kinds", [("fp4", "fp8"), ("fp4", "bfloat16"), ("fp8", "fp8"), ("int8", "int8"), ("int4", "int4")]
)
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("width", [0, 24])
def test_coded_experts(width: int, tokens: int, kinds: tuple[str, str], rng: torch.Generator) -> None:
    d, f, limit, schedule = 64, 40, 2.0, ExpertSchedule(few_tokens=8)
    inputs = {n: t for n, t in expert_inputs(rng, tokens, torch.float32, d, f).items() if "_" not in n and n != "down"}
    shapes = {"gate_up": (12, 2 * f, d), "down": (12, d, f)}
    shapes |= {"shared_gate_up": (2 * width, d), "shared_down": (d, width)} if width else {}
    stored, values = {}, {}
    for name, shape in shapes.items():
        kind = kinds[name.startswith("shared")]
        if kind == "bfloat16":
            stored[name] = (normal(rng, *shape) / 8).bfloat16()
            values[name] = stored[name].double()
        else:
            stored[name], values[name] = coded(rng, kind, *shape, size=0.125)
    arguments: tuple[Any, ...] = (12, d, f, 4, limit, kinds[0])
    name, factory = "GroupedExperts", grouped_experts
    if width:
        name, factory, arguments = "MixtureOfExperts", mixture_of_experts, (*arguments, width, kinds[1])
    tensors = [*inputs.values(), *stored.values()]
    (y,) = run(factory, (*arguments, schedule), tensors, [((1, tokens, d), "float32")]).outputs
    exact = [t.double() if t.is_floating_point() else t for t in (*inputs.values(), *values.values())]
    expected = OPS[name].reference(*exact, limit).numpy()
    # On tensor cores rows, hidden rows and, of integers, weights are rounded: by 2^-9 each, in random directions.
    bound = 0.02 if tokens > 8 else 1e-5
    assert np.abs(y - expected).max() <= bound * max(1.0, np.abs(expected).max())
