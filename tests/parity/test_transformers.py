"""Compiled models against `transformers`, on random models of random configurations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import v4c
from tests.parity.margins import clear_model
from tests.parity.reference import StateDictSource, random_chunks, random_hf_config

TOLERANCE = 1e-3  # logits have a standard deviation near 1
CONSISTENCY = 2e-4  # compiled decode against compiled prefill
LENGTH = 263


@dataclass
class Case:
    """A compiled model, the reference's logits [B, S, V] for `ids` [B, S], and a source of randomness."""

    model: v4c.runtime.model.Model
    source: StateDictSource
    ids: np.ndarray
    expected: np.ndarray
    rng: np.random.Generator


@pytest.fixture(scope="module", params=[0, 1, 2])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    config = random_hf_config(1000 + request.param, published_ratios=request.param == 0)
    reference, source, ids, rng = clear_model(config, 1000 * request.param, batch=3, length=LENGTH)
    with torch.no_grad():
        expected = reference(torch.from_numpy(ids), use_cache=False).logits.numpy()
    best = np.sort(expected, axis=-1)
    assert (best[..., -1] - best[..., -2] > 2 * TOLERANCE).mean() > 0.9, "most argmaxes are beyond rounding"
    assert 0.3 < expected.std() < 3, "weights are scaled so that logits have a standard deviation near 1"
    path: Path = tmp_path_factory.mktemp("parity") / "model.v4c"
    v4c.compile(source, path)
    return Case(v4c.load(path), source, ids, expected, rng)


def check(found: np.ndarray, expected: np.ndarray) -> None:
    """Within tolerance, and the same argmax wherever the reference's two best are further apart than the tolerance."""
    assert np.abs(found - expected).max() <= TOLERANCE
    best = np.sort(expected, axis=-1)
    clear = best[..., -1] - best[..., -2] > 2 * TOLERANCE
    assert (found.argmax(-1) == expected.argmax(-1))[clear].all()


def test_torch_model_matches(case: Case) -> None:
    from v4c.frontend.model.model import V4Model

    model = V4Model.from_source(case.source)
    check(model.logits(torch.from_numpy(case.ids)).numpy(), case.expected)


def test_one_shot_prefill(case: Case) -> None:
    session = case.model.new_session(batch=3, max_context=LENGTH)
    check(session.prefill(case.ids, all_logits=True), case.expected)
    session.reset()
    check(session.prefill(case.ids), case.expected[:, -1])


def test_random_chunks(case: Case) -> None:
    session = case.model.new_session(batch=3, max_context=LENGTH + 100)
    for _ in range(3):
        session.reset()
        found, start = [], 0
        for length in random_chunks(case.rng, LENGTH):
            found.append(session.prefill(case.ids[:, start : start + length], all_logits=True))
            start += length
        check(np.concatenate(found, axis=1), case.expected)


def test_token_by_token(case: Case) -> None:
    session = case.model.new_session(batch=3, max_context=LENGTH)
    found = np.stack([session.decode(case.ids[:, t]) for t in range(LENGTH)], axis=1)
    check(found, case.expected)
    session.reset()
    assert np.abs(found - session.prefill(case.ids, all_logits=True)).max() <= CONSISTENCY


def test_rows_at_different_positions(case: Case) -> None:
    """Prompts of different lengths in one batch, then chunks of different lengths, idle rows among them."""
    session = case.model.new_session(batch=3, max_context=LENGTH)
    for _ in range(3):
        session.reset()
        position = np.zeros(3, np.int64)
        while (position < LENGTH).any():
            width = int(case.rng.integers(1, 70))
            lengths = np.minimum(case.rng.integers(0, width + 1, 3), LENGTH - position)
            ids = np.zeros((3, width), np.int64)
            for row in range(3):
                ids[row, : lengths[row]] = case.ids[row, position[row] : position[row] + lengths[row]]
            found = session.prefill(ids, lengths=lengths)
            position += lengths
            assert (session.position == position).all()
            live = lengths > 0
            if live.any():
                check(found[live], case.expected[live, position[live] - 1])
            assert np.isnan(found[~live]).all()


def test_batch_equals_single_rows(case: Case) -> None:
    alone = case.model.new_session(batch=1, max_context=LENGTH)
    together = case.model.new_session(batch=3, max_context=LENGTH)
    both = together.prefill(case.ids[:, :150])
    for row in range(3):
        alone.reset()
        assert np.abs(alone.prefill(case.ids[row : row + 1, :150]) - both[row]).max() <= 1e-5


def test_fork_continues_on_its_own(case: Case) -> None:
    session = case.model.new_session(batch=3, max_context=LENGTH)
    session.prefill(case.ids[:, :131])
    branch = session.fork()
    other = np.roll(case.ids, 1, axis=1)
    for t in range(131, 140):  # the fork goes elsewhere and must not disturb the original
        branch.decode(other[:, t])
    for t in range(131, 171):
        check(session.decode(case.ids[:, t]), case.expected[:, t])
    again = case.model.new_session(batch=3, max_context=LENGTH)
    again.prefill(np.concatenate([case.ids[:, :131], other[:, 131:140]], axis=1))
    assert np.abs(branch.fork().decode(other[:, 140]) - again.decode(other[:, 140])).max() <= CONSISTENCY
