"""Saved sessions: continued bit for bit in any capacity, and refused whole when anything is not as it was."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from tests.runtime import fake_model
from tests.runtime.fake_model import MAX_CONTEXT, RATIO, VOCAB, WINDOW, expected_logits
from v4c.errors import ArtifactError, InputError, OutputError
from v4c.runtime import Model, Session, load


def read(model: Model, positions: list[int], capacity: int, seed: int = 0) -> tuple[Session, list[np.ndarray]]:
    """A session whose rows have read so many random tokens, and these tokens."""
    random = np.random.default_rng(seed)
    rows = [random.integers(0, VOCAB, length) for length in positions]
    session = model.new_session(len(positions), max_context=capacity)
    if max(positions):
        tokens = np.zeros((len(positions), max(positions)), dtype=np.int64)
        for row, ids in enumerate(rows):
            tokens[row, : len(ids)] = ids
        session.prefill(tokens, lengths=positions)
    return session, rows


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    positions=st.lists(st.integers(0, 30), min_size=1, max_size=3),
    more=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9),
    spare=st.integers(0, 20),
)
def test_a_restored_session_continues_bit_for_bit(
    model: Model, tmp_path: Path, positions: list[int], more: list[int], spare: int
) -> None:
    session, rows = read(model, positions, 40)
    session.save(tmp_path / "s")
    capacity = max(positions) + len(more) + spare
    restored = model.restore_session(tmp_path / "s", max_context=min(capacity, MAX_CONTEXT))
    assert (restored.position.tolist(), restored.pending) == (positions, None)
    for step, token in enumerate(more, start=1):
        tokens = [token] * len(positions)
        found = restored.decode(tokens)
        np.testing.assert_array_equal(found, session.decode(tokens))
        expected = [expected_logits(np.array([*row, *more[:step]]))[-1] for row in rows]
        np.testing.assert_array_equal(found, expected)


def test_the_capacity_is_kept_or_chosen(model: Model, tmp_path: Path) -> None:
    session, _ = read(model, [7, 9], 20)
    session.save(tmp_path / "s")
    assert model.restore_session(tmp_path / "s").max_context == 20
    assert model.restore_session(tmp_path / "s", max_context=9).max_context == 9
    for wrong in (8, MAX_CONTEXT + 1):
        with pytest.raises(
            InputError, match=f"max_context: expected an integer from 9 to {MAX_CONTEXT}, found {wrong}"
        ):
            model.restore_session(tmp_path / "s", max_context=wrong)


def test_tokens_left_to_be_read_are_kept(model: Model, tmp_path: Path) -> None:
    session, _ = read(model, [3, 4], 20)
    session.save(tmp_path / "s", pending=[5, 6])
    pending = model.restore_session(tmp_path / "s").pending
    assert pending is not None
    assert pending.tolist() == [5, 6]
    for wrong in ([5], [5, VOCAB], [0.5, 1]):
        with pytest.raises(InputError, match="token_ids"):
            session.save(tmp_path / "s", pending=wrong)
    assert model.restore_session(tmp_path / "s").pending is not None, "a refusal leaves the file that was there"


def test_the_file_holds_what_was_read_and_nothing_else(model: Model, tmp_path: Path) -> None:
    session, _rows = read(model, [MAX_CONTEXT, 9], MAX_CONTEXT)
    session.reset([0])
    session.prefill([[1, 2], [0, 0]], lengths=[2, 0])
    session.save(tmp_path / "s")
    with safe_open(tmp_path / "s", "np") as file:
        window = file.get_tensor("layers.0.window")
    assert window.shape == (2, WINDOW, VOCAB)
    assert window[0, :2].any()
    assert not window[0, 2:].any(), "the rest is of the sequence before"
    sizes = json.loads((tmp_path / "s").read_bytes()[8:].split(b"}}")[0] + b"}}")
    assert sizes["layers.0.rows"]["shape"] == [9 // RATIO, VOCAB]
    assert (tmp_path / "s").stat().st_size < 4096 + window.nbytes


@pytest.fixture
def saved(model: Model, tmp_path: Path) -> Path:
    session, _ = read(model, [9, 6], 20)
    session.save(tmp_path / "saved", pending=[1, 2])
    return tmp_path / "saved"


def refused(model: Model, path: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        model.restore_session(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: expected ")
    assert "\n" not in message
    return message


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_any_altered_byte_is_noticed(model: Model, saved: Path, where: float, flip: int) -> None:
    content = bytearray(saved.read_bytes())
    content[int(where * len(content))] ^= flip
    altered = saved.with_name("altered")
    altered.write_bytes(content)
    refused(model, altered)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(left=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_noticed(model: Model, saved: Path, left: float) -> None:
    short = saved.with_name("short")
    short.write_bytes(saved.read_bytes()[: int(left * saved.stat().st_size)])
    refused(model, short)
    short.write_bytes(saved.read_bytes() + b"\0")
    refused(model, short)


def test_other_files_are_named(model: Model, saved: Path) -> None:
    assert "No such file" in refused(model, saved.with_name("nothing"))
    assert "Is a directory" in refused(model, saved.parent)
    text = json.dumps({"__metadata__": {"format": "pt"}}).encode()
    saved.write_bytes(struct.pack("<Q", len(text)) + text)
    assert "found another file" in refused(model, saved)


def test_another_version_is_refused(model: Model, saved: Path) -> None:
    saved.write_bytes(saved.read_bytes().replace(b'"version":"1"', b'"version":"2"'))
    assert "version 1, found '2'" in refused(model, saved)


def test_another_model_is_refused(library: Path, saved: Path, tmp_path: Path) -> None:
    other = load(fake_model.write(tmp_path / "other.v4c", library, seed=1))
    assert "found one of another" in refused(other, saved)
    config = {"model_type": "deepseek_v4", "vocab_size": VOCAB, "rope_theta": 2.0}
    changed = load(fake_model.write(tmp_path / "changed.v4c", library, config=config))
    assert "found one of another" in refused(changed, saved)
    same = load(fake_model.write(tmp_path / "same.v4c", library, eos_token_ids=()))
    assert same.restore_session(saved).position.tolist() == [9, 6]


def test_positions_must_lie_in_the_context(model: Model, saved: Path) -> None:
    for wrong in ("[9,21]", "[9,-6]", "[9.0,6]", "[]", "{}", "[9,true]"):
        saved.with_name("wrong").write_bytes(saved.read_bytes().replace(b"[9, 6]", wrong.encode()))
        refused(model, saved.with_name("wrong"))


def test_a_failed_save_leaves_what_was_there(model: Model, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()
    session, _ = read(model, [5, 5], 20)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="saved: expected to write it, found No space left on device"):
        session.save(saved)
    assert saved.read_bytes() == before
    assert [file.name for file in saved.parent.iterdir() if file.name.endswith(".partial")] == []


@pytest.mark.parametrize("place", ["missing/s", "."])
def test_a_place_that_cannot_be_written_is_named(model: Model, tmp_path: Path, place: str) -> None:
    session, _ = read(model, [1], 4)
    with pytest.raises(OutputError, match="expected to write it, found"):
        session.save(tmp_path / place)
    assert list(tmp_path.iterdir()) == []


def test_a_closed_session_is_not_saved(model: Model, tmp_path: Path) -> None:
    session, _ = read(model, [1], 4)
    session.close()
    with pytest.raises(InputError, match="found a closed one"):
        session.save(tmp_path / "s")


def test_dtypes_follow_the_manifest(model: Model, saved: Path) -> None:
    dtypes = {cache.name: cache.dtype for cache in model.manifest.caches}
    assert set(dtypes.values()) == {"float32", "bfloat16"}
    header = json.loads(saved.read_bytes()[8:].split(b"}}")[0] + b"}}")
    codes = {"float32": "F32", "bfloat16": "BF16"}
    assert {name: header[name]["dtype"] for name in dtypes} == {name: codes[dtype] for name, dtype in dtypes.items()}
