"""Sizes and costs, against the published figures and against the tensors themselves."""

from __future__ import annotations

from typing import Any

import pytest

from v4c.frontend.config import ModelConfig
from v4c.frontend.estimate import (
    active_parameters,
    cache_bytes,
    cache_bytes_per_token,
    flops_per_token,
    mtp_weight_bytes,
    parameters,
    row_bytes,
    weight_bytes,
)
from v4c.frontend.initialise import RandomCheckpoint
from v4c.frontend.presets import PRESETS, preset
from v4c.frontend.v32 import V32, against_v32, v4_flops_per_token

FLASH, PRO = preset("v4-flash"), preset("v4-pro")
MILLION = 2**20


@pytest.mark.parametrize(("config", "total", "active"), [(FLASH, 284e9, 13e9), (PRO, 1.6e12, 49e9)])
def test_published_parameters(config: ModelConfig, total: float, active: float) -> None:
    assert parameters(config) == pytest.approx(total, rel=0.02)
    assert active_parameters(config) == pytest.approx(active, rel=0.025)


def test_published_files() -> None:
    """159.6 GB of V4-Flash; the 805.3 that is quoted for V4-Pro are GiB."""
    assert (weight_bytes(FLASH) + mtp_weight_bytes(FLASH)) / 1e9 == pytest.approx(159.6, abs=0.05)
    assert (weight_bytes(PRO) + mtp_weight_bytes(PRO)) / 2**30 == pytest.approx(805.3, abs=0.05)


def test_published_cache() -> None:
    assert row_bytes(FLASH, "fp8") == (584, 68)
    assert cache_bytes_per_token(FLASH)["fp8"] == 3514
    assert cache_bytes_per_token(PRO)["fp8"] == 5031
    assert cache_bytes_per_token(PRO)["bf16"] == 9848
    assert cache_bytes_per_token(PRO)["f32"] == 2 * 9848
    assert round(48068 / 3514, 1) == 13.7
    assert MILLION * cache_bytes_per_token(FLASH)["fp8"] / 2**30 == pytest.approx(3.43, abs=0.01)
    assert MILLION * cache_bytes_per_token(PRO)["fp8"] / 2**30 == pytest.approx(4.91, abs=0.01)


@pytest.mark.parametrize("kv", ["f32", "bf16", "fp8"])
@pytest.mark.parametrize("name", PRESETS)
def test_cache_grows_as_promised(name: str, kv: Any) -> None:
    """From 1M to 2M tokens by the per-token figure; window and rings are the same at any length."""
    config = PRESETS[name]
    growth = cache_bytes(config, 2 * MILLION, kv) - cache_bytes(config, MILLION, kv)
    assert growth / MILLION == pytest.approx(cache_bytes_per_token(config)[kv], abs=0.51)


def test_cache_counts_every_buffer() -> None:
    """Element by element for nano: the shapes a session allocates for 1000 tokens."""
    config = preset("v4-nano-engram")
    c, i, w = 64, 32, 128
    sliding = w * c
    csa = w * c + 2 * 8 * 2 * c + 250 * c + 2 * 8 * 2 * i + 250 * i
    hca = w * c + 2 * 128 * c + 8 * c
    engram = 2 * 2 + 9 * 4 * 128  # ids count twice: they are int64
    assert cache_bytes(config, 1000, "f32") == 4 * (sliding + 3 * csa + 2 * hca + 2 * engram)


@pytest.mark.parametrize("name", ["v4-nano", "v4-nano-engram"])
def test_weight_bytes_of_real_tensors(name: str) -> None:
    weights = RandomCheckpoint(preset(name))
    for dtype in ("f32", "bf16"):
        assert weight_bytes(weights.config, dtype) == sum(weights.load(n, dtype).nbytes for n in weights.names())
    floats = [n for n in weights.names() if weights.source_dtype(n) != "int64"]
    assert parameters(weights.config) == sum(weights.load(n).size for n in floats)


def test_v32() -> None:
    """DeepSeek-V3.2 as published: 37 B active (its embedding aside), 48,068 B of cache per token."""
    assert V32.fp8_matrices() + V32.bf16_matrices() == pytest.approx(37e9, rel=0.02)
    assert V32.cache_bytes_per_token() == 61 * (656 + 132) == 48068
    # Growth with the context is attention and indexer alone.
    growth = V32.flops_per_token(2047).counted - V32.flops_per_token(0).counted
    assert growth == 61 * 2047 * (2 * 128 * (576 + 512) + 2 * 64 * 128)
    growth = V32.flops_per_token(MILLION).counted - V32.flops_per_token(2047).counted
    assert growth == 61 * (MILLION - 2047) * 2 * 64 * 128


@pytest.mark.parametrize(("config", "flops", "cache"), [(FLASH, 0.10, 0.07), (PRO, 0.27, 0.10)])
def test_published_shares_of_v32(config: ModelConfig, flops: float, cache: float) -> None:
    """The paper's figures at 1M, in equivalent FP8 FLOPs, within 1.5 points; and not for want of counting."""
    shares = against_v32(config)
    assert shares["context"] == MILLION
    assert shares["flops"] == pytest.approx(flops, abs=0.015)
    assert shares["cache"] == pytest.approx(cache, abs=0.015)
    assert shares["flops_counted"] == pytest.approx(flops, abs=0.03)
    short = against_v32(config, 4096)
    assert short["flops"] > shares["flops"]


@pytest.mark.parametrize("name", PRESETS)
def test_both_counts_of_flops_agree(name: str) -> None:
    config = PRESETS[name]
    for context in (0, 127, 128, 5000, MILLION - 1):
        both = v4_flops_per_token(config, context)
        assert both.counted == flops_per_token(config, context)
    # By hand for a growing context: attention in bfloat16 counts twice, the FP4 indexer half.
    more, less = v4_flops_per_token(config, MILLION - 1), v4_flops_per_token(config, MILLION - 129)
    per_key = 4 * config.num_attention_heads * config.head_dim
    hca, csa = len(config.layers_of("hca")), len(config.layers_of("csa"))
    index = 2 * config.index_n_heads * config.index_head_dim * 128 // config.csa_ratio
    assert more.fp8 - less.fp8 == 2 * hca * per_key * 128 // config.hca_ratio + csa * index / 2


def test_flops_by_hand() -> None:
    """Growth between two contexts is attention alone, counted here key by key."""
    config = preset("v4-nano")
    per_key = 4 * 8 * 64
    window = lambda t: min(t + 1, 128)  # noqa: E731
    for context in (0, 126, 127, 128, 300, 5000):
        csa = window(context) + min((context + 1) // 4, 64)
        hca = window(context) + (context + 1) // 128
        index = 2 * 16 * 32 * ((context + 1) // 4)
        attention = per_key * (window(context) + 3 * csa + 2 * hca) + 3 * index
        matrices = flops_per_token(config, context) - attention
        assert matrices == flops_per_token(config, 0) - 6 * per_key
    # Nearly all active parameters are matrix entries, each multiplied once.
    assert matrices == pytest.approx(2 * active_parameters(config), rel=0.01)
