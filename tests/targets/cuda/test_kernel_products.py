"""Products and experts against float64, for one, few and many rows, in both storage dtypes and by every path."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.targets.cuda.harness import run
from tests.targets.cuda.ops import check
from v4c.targets.cuda.kernels.products import grouped_linear, merged_linear
from v4c.targets.cuda.schedule import ExpertSchedule, ProductSchedule

DTYPES = {"float32": (torch.float32, 2e-6), "bfloat16": (torch.bfloat16, 6e-3)}
"""The weight's dtype, and the error to expect relative to the terms' sizes: on tensor cores inputs are rounded too."""


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
