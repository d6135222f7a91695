"""Kernels on single rows, routing and hyper-connections against the references of their ops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.targets.cuda.harness import run
from tests.targets.cuda.ops import check, results
from v4c.targets.cuda.kernels.rows import add, rms_norm
from v4c.targets.cuda.schedule import MHCSchedule, ProductSchedule


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def normal(rng: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=rng)


def frequencies(rotary: int) -> torch.Tensor:
    return 160000.0 ** -(torch.arange(rotary // 2) / (rotary // 2))


@pytest.mark.parametrize(("rows", "width", "weighted"), [(1, 4096, True), (5, 37, False), (3, 64, True)])
def test_rms_norm(rows: int, width: int, weighted: bool, rng: torch.Generator) -> None:
    x, weight = normal(rng, rows, width), normal(rng, width)
    inputs = [x, weight] if weighted else [x]
    (y,) = run(rms_norm, (width, 1e-6, weighted), inputs, [((rows, width), "float32")]).outputs
    expected = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * (weight if weighted else 1)
    np.testing.assert_allclose(y, expected, atol=2e-6)


def test_add(rng: torch.Generator) -> None:
    a, b = normal(rng, 3, 171), normal(rng, 3, 171)
    (y,) = run(add, (171,), [a, b], [((3, 171), "float32")]).outputs
    np.testing.assert_array_equal(y, a + b)


def test_swiglu(rng: torch.Generator) -> None:
    check("ClampedSwiGLU", {"gate": 9 * normal(rng, 2, 3, 130), "up": 9 * normal(rng, 2, 3, 130)}, 1e-5, limit=10.0)


@pytest.mark.parametrize(("heads", "width", "rotary", "sign"), [(3, 64, 16, 1.0), (9, 32, 32, -1.0), (2, 512, 64, 1.0)])
def test_trailing_rope(heads: int, width: int, rotary: int, sign: float, rng: torch.Generator) -> None:
    inputs = {
        "x": normal(rng, 2, 3, heads, width), "positions": torch.tensor([0, 70_001]), "inv_freq": frequencies(rotary),
    }  # fmt: skip
    check("TrailingRope", inputs, 2e-2, sign=sign)  # float32 angles of some thousand turns
    inputs["positions"] = torch.tensor([0, 131])
    check("TrailingRope", inputs, 3e-5, sign=sign)


@pytest.mark.parametrize(("heads", "width", "rotary"), [(1, 64, 16), (8, 32, 8), (3, 512, 64)])
def test_rotary_query_kv(heads: int, width: int, rotary: int, rng: torch.Generator) -> None:
    inputs = {
        "q": normal(rng, 2, 3, heads, width), "kv": normal(rng, 2, 3, width), "kv_norm": normal(rng, width),
        "positions": torch.tensor([5, 99]), "inv_freq": frequencies(rotary),
    }  # fmt: skip
    check("RotaryQueryKV", inputs, 3e-5, q_eps=1e-6, kv_eps=1e-5)


@pytest.mark.parametrize(("experts", "top_k"), [(16, 4), (256, 6), (40, 33)])
def test_topk_route(experts: int, top_k: int, rng: torch.Generator) -> None:
    inputs = {"logits": 3 * normal(rng, 2, 5, experts), "bias": 0.1 * normal(rng, experts)}
    check("TopKRoute", inputs, 1e-5, top_k=top_k, scaling=1.5)


def test_equal_scores_go_to_the_smaller_expert() -> None:
    found, _ = results("TopKRoute", {"logits": torch.zeros(1, 2, 40), "bias": torch.zeros(40)}, top_k=5, scaling=1.0)
    assert found["indices"].tolist() == [[list(range(5))] * 2]


@pytest.mark.parametrize("tokens", [1, 9])
def test_topk_router(tokens: int, rng: torch.Generator) -> None:
    inputs = {"x": normal(rng, 1, tokens, 96), "weight": 0.1 * normal(rng, 24, 96), "bias": 0.1 * normal(rng, 24)}
    check("TopKRouter", inputs, 1e-5, schedule=ProductSchedule(few_rows=4), top_k=4, scaling=2.5)


def test_hash_routes(rng: torch.Generator) -> None:
    table = torch.randint(16, (50, 6), generator=rng)
    ids = torch.randint(50, (2, 3), generator=rng)
    check("HashRoute", {"logits": normal(rng, 2, 3, 16), "input_ids": ids, "table": table}, 1e-5, scaling=1.5)
    inputs = {"x": normal(rng, 2, 3, 128), "weight": 0.1 * normal(rng, 16, 128), "indices": table[ids]}
    check("HashRouter", inputs, 1e-5, scaling=1.5)


MHC = {"iterations": 20, "hc_eps": 1e-6, "norm_eps": 1e-6}


def entry(rng: torch.Generator, m: int, d: int) -> dict[str, torch.Tensor]:
    rows = (2 + m) * m
    return {
        "streams": normal(rng, 2, 3, m, d), "fn": 0.05 * normal(rng, rows, m * d), "base": 0.1 * normal(rng, rows),
        "scale": torch.tensor([0.5, 0.7, 0.9]), "norm": normal(rng, d),
    }  # fmt: skip


@pytest.mark.parametrize(("m", "d", "columns"), [(4, 128, 512), (4, 600, 256), (2, 37, 512)])
def test_hyper_connections(m: int, d: int, columns: int, rng: torch.Generator) -> None:
    inputs, schedule = entry(rng, m, d), MHCSchedule(columns)
    check("MHCPre", inputs, 2e-5, schedule, **MHC)
    check("MHCPreNorm", inputs, 5e-5, schedule, **MHC, eps=1e-6)
    inputs |= {
        "x": normal(rng, 2, 3, d), "post": normal(rng, 2, 3, m).abs(), "comb": normal(rng, 2, 3, m, m).softmax(-1),
    }  # fmt: skip
    check("MHCPost", inputs, 1e-5)
    check("MHCPostPreNorm", inputs, 5e-5, schedule, **MHC, eps=1e-6)
    inputs |= {"fn": 0.05 * normal(rng, m, m * d), "base": 0.1 * normal(rng, m), "scale": torch.tensor([0.5])}
    check("MHCHead", inputs, 2e-5, schedule, hc_eps=1e-6, norm_eps=1e-6)
