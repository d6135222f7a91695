"""What tests of several rooms share: a model of about a megabyte, as config, checkpoint and artifact."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

os.environ.setdefault("TVM_NUM_THREADS", "2")  # read once, when TVM is first loaded

from tests.made_once import made_once
from v4c.frontend.config import ModelConfig
from v4c.frontend.presets import preset

V4C = Path(sys.executable).with_name("v4c")


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """One layer of each attention, both routers; the compress ratios are the published ones."""
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
        bos_token_id=0,
        eos_token_ids=(1,),
    )


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with random float32 weights of `tiny_config` and a tokenizer of single bytes (byte b is id b + 2).

    Tests that change it work on a copy.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from v4c.frontend.initialise import initialise

    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    initialise(tiny_config, folder, seed=7)
    vocabulary = {"<bos>": 0, "<eos>": 1}
    # ByteLevel writes printable bytes as themselves and the others, in order, as characters from U+0100 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    for byte in range(256):
        vocabulary[chr(byte) if byte in printable else chr(next(others))] = byte + 2
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def tiny_artifact(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_checkpoint` compiled for this machine's CPU, by the command; tests that change it work on a copy."""
    return made_once(
        tmp_path_factory, "tiny.v4c",
        lambda path: subprocess.run([V4C, "compile", "-m", tiny_checkpoint, "-o", path], check=True),
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_engram(tiny_config: ModelConfig) -> ModelConfig:
    """`tiny_config` with Engram layers."""
    from v4c.frontend.presets import with_engram

    return with_engram(tiny_config)
