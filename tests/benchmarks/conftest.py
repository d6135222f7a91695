"""A model of about a megabyte that llama.cpp can run: widths in whole blocks, an indexer of 64 dims."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from v4c.frontend.checkpoint import Checkpoint
from v4c.frontend.config import ModelConfig
from v4c.frontend.initialise import initialise


@pytest.fixture(scope="session")
def peer_config(tiny_config: ModelConfig) -> ModelConfig:
    """`tiny_config` in llama.cpp's multiples; every kind of attention, both routers."""
    return replace(tiny_config, head_dim=64, qk_rope_head_dim=16, index_head_dim=64, index_n_heads=16, dtype="bfloat16")


@pytest.fixture(scope="session")
def peer_checkpoint(peer_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Random bfloat16 weights of `peer_config`."""
    folder = tmp_path_factory.mktemp("peers") / "checkpoint"
    initialise(peer_config, folder, seed=3, dtype="bf16")
    return Checkpoint.open(folder)


@pytest.fixture
def peer_folder(peer_checkpoint: Checkpoint) -> Path:
    """The folder of `peer_checkpoint`."""
    return peer_checkpoint.folder
