"""`v4c.verify`: that it passes what is right, and that each of its readings notices what is wrong."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import v4c
from v4c.errors import CheckpointError, InputError
from v4c.frontend.checkpoint import Checkpoint
from v4c.frontend.config import ModelConfig
from v4c.frontend.initialise import RandomCheckpoint
from v4c.passes.relax.layouts import part_names
from v4c.runtime.model import Model
from v4c.runtime.session import Session
from v4c.verification import RELATIVE_TOLERANCE, _AsStored, _chunks, verify


@pytest.fixture(scope="module")
def source(tiny_checkpoint: Path) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint)


def test_a_right_artifact_is_ok(tiny_artifact: Path, tiny_checkpoint: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    report = verify(tiny_artifact, tiny_checkpoint, progress=lambda *step: steps.append(step))
    assert report.ok
    # Both compute in float32; a thousandth is what another order of summation could never explain.
    assert 0 < report.max_abs_diff < 1e-4
    assert report.tolerance >= RELATIVE_TOLERANCE
    assert report.argmax_agreement > 0.99
    # One chunk sees every position, decoding 13 and 12, each of two ragged readings some five at least.
    assert 262 + 13 + 12 + 10 <= report.positions < 262 + 13 + 12 + 100
    assert [done for _, done, _ in steps] == list(range(6))
    assert v4c.verify is verify


def test_seed_and_lengths_choose_the_tokens(tiny_artifact: Path, source: Checkpoint) -> None:
    def report(**options: int) -> Any:
        merged: dict[str, Any] = {"prompt_tokens": 9, "decode_tokens": 3} | options
        return verify(tiny_artifact, source, **merged)

    assert report() == report() != report(seed=1)
    assert report().ok
    assert report(decode_tokens=1).positions < report().positions < report(prompt_tokens=40).positions


@pytest.mark.parametrize("entry", ["prefill", "prefill_all", "decode_one"])
@pytest.mark.parametrize("error", [0.01, math.nan])
def test_every_entry_point_is_compared(
    entry: str, error: float, tiny_artifact: Path, source: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Session._run

    def wrong(session: Session, name: str, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        logits = run(session, name, tokens, lengths)
        if name == entry:
            logits[..., 3] += error
        return logits

    monkeypatch.setattr(Session, "_run", wrong)
    report = verify(tiny_artifact, source, prompt_tokens=20, decode_tokens=5)
    assert not report.ok
    assert report.max_abs_diff == (pytest.approx(error, rel=0.01) if math.isfinite(error) else math.inf)


@pytest.mark.parametrize("state", ["1.rows", "1.index_rows", "2.comp_kv", "0.window"])
def test_lost_state_is_noticed(
    state: str, tiny_artifact: Path, source: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_session = Model.new_session

    def forgetful(model: Model, *arguments: Any, **options: Any) -> Session:
        session = new_session(model, *arguments, **options)
        index = [cache.name for cache in model.manifest.caches].index(state)
        memory = np.from_dlpack(session._caches.tensors[index])
        run = session._run

        def wrong(name: str, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
            logits = run(name, tokens, lengths)
            memory[:] = 0
            return logits

        monkeypatch.setattr(session, "_run", wrong)
        return session

    monkeypatch.setattr(Model, "new_session", forgetful)
    assert not verify(tiny_artifact, source).ok


@pytest.mark.parametrize("options", [{"prompt_tokens": 0}, {"decode_tokens": -1}, {"prompt_tokens": 2.0}])
def test_counts_are_checked(options: dict[str, Any], tiny_artifact: Path, source: Checkpoint) -> None:
    with pytest.raises(InputError, match=f"{next(iter(options))}: expected a positive integer"):
        verify(tiny_artifact, source, **options)


def test_more_tokens_than_the_model_can_hold(tiny_artifact: Path, source: Checkpoint) -> None:
    with pytest.raises(InputError, match="prompt_tokens and decode_tokens: expected at most 4096"):
        verify(tiny_artifact, source, prompt_tokens=4090, decode_tokens=7)


def test_a_reference_that_is_not_finite_is_refused(tiny_artifact: Path, tiny_config: ModelConfig) -> None:
    class Broken(RandomCheckpoint):
        def load(self, name: str, dtype: Any = "f32") -> np.ndarray:
            array = super().load(name, dtype)
            return array * np.float32("nan") if name == "model.norm.weight" else array

    with pytest.raises(CheckpointError, match="reference: expected finite logits"):
        verify(tiny_artifact, Broken(tiny_config), prompt_tokens=3, decode_tokens=1)


def test_the_reference_is_rounded_as_the_artifact_is(tiny_artifact: Path, source: Checkpoint) -> None:
    model = v4c.load(tiny_artifact)
    name = "model.layers.1.self_attn.q_a_proj.weight"
    plain = source.load(name)
    assert np.array_equal(_AsStored(source, model).load(name), plain)
    weights = [
        replace(weight, dtype="bfloat16") if name in part_names(weight.name) else weight
        for weight in model.manifest.weights
    ]
    model.manifest = replace(model.manifest, weights=tuple(weights))
    rounded = _AsStored(source, model)
    assert np.array_equal(rounded.load(name, "f32"), plain.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert not np.array_equal(rounded.load(name, "f32"), plain)
    assert np.array_equal(rounded.load("lm_head.weight", "f32"), source.load("lm_head.weight"))
    table = "model.layers.0.mlp.gate.tid2eid"
    assert rounded.load(table, None).dtype == np.int64


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 700), st.integers(0, 99), st.lists(st.integers(1, 200), max_size=5))
def test_chunks_cover_all_tokens(total: int, seed: int, first: list[int]) -> None:
    lengths = _chunks(total, tuple(first), np.random.default_rng(seed))
    assert sum(lengths) == total
    assert min(lengths) > 0
    assert all(length == wanted for length, wanted in zip(lengths[:-1], first, strict=False))
