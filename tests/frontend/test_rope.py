"""Rotation speeds, bit for bit against the buffers of transformers' rotary embedding."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding

from v4c.frontend.config import ModelConfig, YarnScaling
from v4c.frontend.presets import PRESETS, preset
from v4c.frontend.rope import inv_freq

torch.set_num_threads(1)


def assert_equals_reference(config: ModelConfig) -> None:
    reference: Any = DeepseekV4RotaryEmbedding(DeepseekV4Config(**config.to_dict()))
    main, compress = inv_freq(config, "main"), inv_freq(config, "compress")
    assert main.dtype == compress.dtype == np.float32
    assert main.shape == compress.shape == (config.qk_rope_head_dim // 2,)
    assert np.array_equal(main, reference.main_inv_freq.numpy())
    assert np.array_equal(compress, reference.compress_inv_freq.numpy())
    assert reference.compress_attention_scaling == 1.0


@pytest.mark.parametrize("name", ["v4-flash", "v4-nano"])
def test_presets(name: str) -> None:
    assert_equals_reference(PRESETS[name])


@settings(deadline=None, max_examples=40)
@given(
    pairs=st.integers(1, 64), theta=st.floats(100, 1e7), compress_theta=st.floats(100, 1e7),
    yarn=st.none() | st.builds(
        YarnScaling, st.floats(1, 100), st.integers(64, 2**20), st.floats(2, 100), st.floats(0.1, 2),
    ),
)  # fmt: skip
def test_random(pairs: int, theta: float, compress_theta: float, yarn: YarnScaling | None) -> None:
    config = replace(
        preset("v4-nano"), head_dim=128, index_head_dim=128, qk_rope_head_dim=2 * pairs, rope_theta=theta,
        compress_rope_theta=compress_theta, yarn=yarn,
    )  # fmt: skip
    assert_equals_reference(config)


def test_yarn_without_truncation() -> None:
    """Against the paper's ramp in float64: between the two correction dims the share falls linearly."""
    yarn = YarnScaling(16.0, 65536, truncate=False)
    config = replace(preset("v4-flash"), yarn=yarn)
    pairs = np.arange(32)
    plain = 160000.0 ** (-2 * pairs / 64)
    low, high = (32 * np.log(65536 / (beta * 2 * np.pi)) / np.log(160000.0) for beta in (32, 1))
    share = np.clip((pairs - low) / (high - low), 0, 1)
    np.testing.assert_allclose(inv_freq(config, "compress"), plain * (1 - share) + plain / 16 * share, rtol=2e-6)
    assert not np.array_equal(inv_freq(config, "compress"), inv_freq(preset("v4-flash"), "compress"))
