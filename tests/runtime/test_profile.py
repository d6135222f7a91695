"""What sessions offer to measurements: a record of the calls they make, and any position without reading up to it."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.runtime.fake_model import MAX_CONTEXT, RATIO, VOCAB, WINDOW, expected_logits
from v4c.errors import InputError
from v4c.runtime import Model
from v4c.runtime.cache_specs import CacheSpec, Rows
from v4c.runtime.caches import Caches
from v4c.runtime.profile import Argument, Recorder


def test_a_recorder_sees_the_kernels_in_order(model: Model) -> None:
    session = model.new_session()
    recorder = Recorder(session)
    session.prefill([[1, 2, 3]])
    first = recorder.take()
    session.decode([4])
    second = recorder.take()
    for calls in (first, second):
        assert [c.name for c in calls if c.name in ("step", "last")] == ["step", "last"]
        assert all(c.ns >= 0 and c.depth >= 0 for c in calls)
        assert [c.start for c in calls] == sorted(c.start for c in calls)
    assert second[0].start >= first[-1].start + first[-1].ns
    assert recorder.take() == []


def test_a_recorder_notes_arguments_instead_of_times(model: Model) -> None:
    session = model.new_session(2, max_context=16)
    recorder = Recorder(session)
    session.decode([1, 2])
    names = [call.name for call in recorder.take()]
    recorder.record_arguments()
    session.decode([3, 4])
    assert recorder.take() == []
    given = dict(zip(names, recorder.take_arguments(), strict=True))
    assert given["step"] == (
        Argument((2, 1), "int64"), Argument((2,), "int64", (1, 1)), Argument((2,), "int64", (1, 1)),
        Argument((2, WINDOW, VOCAB), "float32"), Argument((2, 16 // RATIO, VOCAB), "bfloat16"),
        Argument((VOCAB,), "bfloat16"), Argument((VOCAB, VOCAB), "float32"), Argument((2, 1, VOCAB), "float32"),
    )  # fmt: skip
    recorder.record_times()
    session.decode([5, 6])
    assert len(recorder.take()) == len(names)
    assert recorder.take_arguments() == []


def test_recording_changes_no_result_and_stays_with_its_session(model: Model) -> None:
    watched, other = model.new_session(), model.new_session()
    recorder = Recorder(watched)
    tokens = np.array([[5, 3, 8, 1, 0, 2]])
    np.testing.assert_array_equal(watched.prefill(tokens)[0], expected_logits(tokens[0])[-1])
    recorder.take()
    thread = threading.Thread(target=other.prefill, args=(tokens,))
    thread.start()
    thread.join()
    assert recorder.take() == []
    fork = watched.fork()
    fork.decode([1])
    assert recorder.take() == []


@given(read=st.integers(1, 20), position=st.integers(0, 40), batch=st.integers(1, 3))
def test_growing_caches_repeat_what_was_written(read: int, position: int, batch: int) -> None:
    specs = [CacheSpec("ring", "float32", ("batch", 5, 2)), CacheSpec("rows", "bfloat16", ("batch", Rows(3), 2))]
    caches = Caches(specs, batch, 40)
    random = np.random.default_rng(0)
    for array in caches.arrays:
        array[...] = random.integers(1, 100, array.shape)
    before = [array.copy() for array in caches.arrays]
    caches.repeat(np.full(batch, read), position)
    np.testing.assert_array_equal(caches.arrays[0], before[0])
    written, end = read // 3, position // 3
    expected = before[1].copy()
    if written:
        for row in range(written, end):
            expected[:, row] = before[1][:, row % written]
    np.testing.assert_array_equal(caches.arrays[1], expected)


def test_a_session_can_pretend_a_position(model: Model) -> None:
    session = model.new_session()
    session.prefill([[1, 2, 3, 4, 5, 6, 7, 8]])
    session.pretend(MAX_CONTEXT - 1)
    assert session.position.tolist() == [MAX_CONTEXT - 1]
    session.decode([1])
    with pytest.raises(InputError, match="max_context"):
        session.decode([1])
    session.pretend(0)
    np.testing.assert_array_equal(session.decode([7])[0], expected_logits(np.array([7]))[-1])
    for wrong in (-1, MAX_CONTEXT + 1, 1.5):
        with pytest.raises(InputError, match="position"):
            session.pretend(wrong)  # type: ignore[arg-type]
    session.close()
    with pytest.raises(InputError, match="closed"):
        session.pretend(0)
    with pytest.raises(InputError, match="closed"):
        session.observe(print)
