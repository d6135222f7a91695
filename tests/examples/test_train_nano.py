"""The training example: its forward pass is the model's, batches say what they claim, and a run continues exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.train_nano import corpus, vocabulary
from examples.train_nano.__main__ import main
from examples.train_nano.batches import QUESTION_WEIGHT, Batches
from examples.train_nano.config import BOS, NANO, VARIANTS, Variant
from examples.train_nano.forward import Forward
from examples.train_nano.run import Plan, Run
from examples.train_nano.state import load_state
from examples.train_nano.streams import Mixer
from examples.train_nano.weights import initial, join_experts, split_experts
from v4c.custom_ops.mhc_pre import mhc_pre
from v4c.errors import CheckpointError
from v4c.frontend.checkpoint import Checkpoint
from v4c.frontend.config import ModelConfig
from v4c.frontend.initialise import RandomCheckpoint
from v4c.frontend.model.model import V4Model
from v4c.frontend.model.mtp import MTPModel, allocate_mtp
from v4c.recall import CHANCE, Facts, question

torch.set_num_threads(1)

SMALL = replace(NANO, vocab_size=97, hidden_size=64, engram=replace(NANO.engram, table_rows=50), index_topk=8)  # type: ignore[type-var]


def weights_of(source: Any) -> dict[str, torch.Tensor]:
    names = [*source.specs, *source.mtp_specs]
    return split_experts({name: torch.from_numpy(np.array(source.load(name))) for name in names})


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    texts, _ = corpus.split(corpus.documents())
    return vocabulary.train_tokenizer(texts[:200])


def facts_of(tokenizer: Any) -> Facts:
    return Facts.of(lambda text: tokenizer.encode(text, add_special_tokens=False).ids)


@torch.no_grad()
@pytest.mark.parametrize("config", [NANO, SMALL], ids=["nano", "small"])
@pytest.mark.parametrize("length", [3, 261])
def test_forward_is_the_models(config: ModelConfig, length: int) -> None:
    """Logits of the model and of the MTP layer, from random weights in float64, so that no choice is a tie."""
    source = RandomCheckpoint(config, seed=2)
    rng = np.random.default_rng(length)
    ids = torch.from_numpy(rng.integers(0, config.vocab_size, (2, length + 1)))
    weights = weights_of(source)
    out = Forward(config, weights)(ids[:, :-1], ids[:, 1:])
    model, mtp = V4Model.from_source(source), MTPModel.from_source(source)
    torch.testing.assert_close(out.logits, model.logits(ids[:, :-1]), rtol=0, atol=2e-5)
    where = torch.zeros(2, dtype=torch.int64), torch.full((2,), length)
    from v4c.frontend.model.caches import allocate

    streams, _ = model.hidden(ids[:, :-1], *where, allocate(config, 2, length))
    wanted, _, _ = mtp(streams, ids[:, 1:], *where, allocate_mtp(config, 2, length), all_logits=True)
    assert out.mtp_logits is not None
    torch.testing.assert_close(out.mtp_logits, wanted, rtol=0, atol=2e-5)
