"""What tests of several rooms share: a model of a few hundred kilobytes, as config, checkpoint and artifact."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

os.environ.setdefault("TVM_NUM_THREADS", "2")  # read once, when TVM is first loaded

from v4c.frontend.config import ModelConfig
from v4c.frontend.presets import preset


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """Every kind of layer and router once; the ratios are the published ones."""
    return replace(
        preset("v4-nano"),
        vocab_size=320,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        head_dim=32,
        qk_rope_head_dim=8,
        q_lora_rank=32,
        o_lora_rank=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        attention_types=("sliding", "csa", "hca"),
        mlp_types=("hash", "topk", "topk"),
        index_head_dim=16,
        index_topk=16,
        max_position_embeddings=4096,
        eos_token_ids=(1,),
    )


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with random float32 weights of `tiny_config`; tests that change it work on a copy."""
    from v4c.frontend.initialise import initialise

    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    initialise(tiny_config, folder, seed=7)
    return folder


@pytest.fixture(scope="session")
def tiny_artifact(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_checkpoint` compiled for this machine's CPU; tests that change it work on a copy."""
    import v4c

    path = tmp_path_factory.mktemp("artifact") / "tiny.v4c"
    v4c.compile(tiny_checkpoint, path)
    return path


@pytest.fixture(scope="session")
def tiny_engram(tiny_config: ModelConfig) -> ModelConfig:
    """`tiny_config` with an Engram layer."""
    from v4c.frontend.presets import with_engram

    return with_engram(tiny_config)
