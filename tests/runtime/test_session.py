"""Sessions of the fake model against its NumPy reference, through random sequences of calls."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime import fake_model
from tests.runtime.fake_model import MAX_CONTEXT, RATIO, VOCAB, expected_logits
from v4c.errors import ArtifactError, Error, InputError
from v4c.runtime import Model, Session, load
from v4c.runtime.library import Machine, Program


def random_tokens(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, shape)


def last_logits(history: list[int]) -> np.ndarray:
    return expected_logits(np.array(history))[-1]


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_sequence_of_calls_matches_the_reference(model: Model, data: st.DataObject) -> None:
    batch = data.draw(st.integers(1, 3))
    session = model.new_session(batch)
    history: list[list[int]] = [[] for _ in range(batch)]
    for _ in range(data.draw(st.integers(1, 6))):
        action = data.draw(st.sampled_from(["prefill", "all", "decode", "reset", "fork"]))
        if action == "reset":
            rows = data.draw(st.lists(st.integers(0, batch - 1), max_size=batch))
            session.reset(rows)
            for row in rows:
                history[row] = []
        elif action == "fork":
            original, session = session, session.fork()
            original.decode([1] * batch)  # must not reach the fork
            original.close()
        else:
            width = 1 if action == "decode" else data.draw(st.integers(1, 9))
            tokens = random_tokens(data.draw(st.integers(0, 10**6)), batch, width)
            lengths = data.draw(st.lists(st.integers(0, width), min_size=batch, max_size=batch))
            padded = tokens.copy()
            padded[np.arange(width) >= np.array(lengths)[:, None]] = -1  # padding may hold anything
            if action == "decode":
                found = session.decode(padded[:, 0], lengths)
            else:
                chunk = data.draw(st.integers(1, 10))
                found = session.prefill(padded, lengths, all_logits=action == "all", chunk=chunk)
            for row, length in enumerate(lengths):
                before = len(history[row])
                history[row] += tokens[row, :length].tolist()
                if action == "all":
                    expected = expected_logits(np.array(history[row], dtype=np.int64))[before:]
                    np.testing.assert_array_equal(found[row, :length], expected)
                    assert np.isnan(found[row, length:]).all()
                elif length:
                    np.testing.assert_array_equal(found[row], last_logits(history[row]))
                else:
                    assert np.isnan(found[row]).all()
        np.testing.assert_array_equal(session.position, [len(row) for row in history])


def test_chunks_are_no_longer_than_asked(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []
    run = Session._run

    def recorded(self: Session, entry: str, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        widths.append((entry, tokens.shape[1], lengths.tolist()))
        return run(self, entry, tokens, lengths)

    monkeypatch.setattr(Session, "_run", recorded)
    model.new_session(2).prefill(random_tokens(0, 2, 12), lengths=[9, 2], chunk=4)
    assert widths == [("prefill", 4, [4, 2]), ("prefill", 4, [4, 0]), ("decode", 1, [1, 0])]


def test_rows_of_length_zero_run_nothing(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    session = model.new_session(2)
    monkeypatch.setattr(Session, "_run", lambda *args: pytest.fail("nothing is to be computed"))
    assert np.isnan(session.prefill(random_tokens(0, 2, 3), lengths=[0, 0])).all()


def test_scratch_memory_is_released_after_every_prompt(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """TVM's pool keeps a buffer of every size, so prompts of many lengths would grow it without bound."""
    session = model.new_session(1, max_context=8)
    released = []
    monkeypatch.setattr(Program, "release_scratch", lambda program: released.append(program))
    session.prefill([[1, 2]])
    session.prefill([[1, 2, 3]], all_logits=True)
    assert len(released) == 2
    session.decode([1])
    assert len(released) == 2, "a step keeps its scratch for the next one"


def test_results_are_the_callers_own(model: Model) -> None:
    session = model.new_session()
    tokens = random_tokens(1, 6)
    results = [session.decode([token]) for token in tokens]
    np.testing.assert_array_equal(np.concatenate(results), expected_logits(tokens))
    results[0][:] = 7.0  # writable, and not the memory of the others
    np.testing.assert_array_equal(np.concatenate(results[1:]), expected_logits(tokens)[1:])
    session.position[:] = 99
    assert session.position.tolist() == [6]


@pytest.mark.parametrize("kind", ["list", "int32", "uint8", "strided", "torch"])
def test_ids_come_in_many_forms(model: Model, kind: str) -> None:
    tokens = random_tokens(2, 2, 5)
    given_ids: Any = tokens
    if kind == "list":
        given_ids = tokens.tolist()
    elif kind == "strided":
        given_ids = np.repeat(tokens, 2, axis=1)[:, ::2]
    elif kind == "torch":
        given_ids = pytest.importorskip("torch").from_numpy(tokens.astype(np.int32))
    else:
        given_ids = tokens.astype(kind)
    found = model.new_session(2).prefill(given_ids)
    np.testing.assert_array_equal(found, [expected_logits(row)[-1] for row in tokens])


def test_sessions_run_in_threads(model: Model) -> None:
    def read(seed: int) -> bool:
        tokens = random_tokens(seed, 40)
        with model.new_session() as session:
            found = [session.prefill(tokens[None, :10], chunk=3)]
            found += [session.decode([token]) for token in tokens[10:]]
        return np.array_equal(np.concatenate(found), expected_logits(tokens)[9:])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(24)))


def test_one_session_may_be_shared_by_threads(model: Model) -> None:
    session = model.new_session()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: session.decode([1]), range(40)))
    assert session.position.tolist() == [40]
    np.testing.assert_array_equal(session.decode([1])[0], last_logits([1] * 41))


def test_fork_copies_what_was_read_only(model: Model) -> None:
    session = model.new_session(2)
    session.prefill(random_tokens(3, 2, MAX_CONTEXT))
    session.reset()
    session.prefill(random_tokens(4, 2, 10), lengths=[10, 0])
    rows, forked = session._caches.arrays[1], session.fork()._caches.arrays[1]
    assert rows[0, 10 // RATIO :].any(), "the original holds remains of the first prompt"
    np.testing.assert_array_equal(forked[0, : 10 // RATIO], rows[0, : 10 // RATIO])
    assert not forked[0, 10 // RATIO :].any()
    assert not forked[1].any()


def test_capacity_costs_memory_only_when_used(library: Path, tmp_path: Path) -> None:
    context = 1 << 26  # 805 MB of rows
    large = load(fake_model.write(tmp_path / "large.v4c", library, max_context=context))

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    session = large.new_session()
    session.prefill(random_tokens(5, 1, 100))
    forks = [session.fork() for _ in range(3)]
    assert all(fork.max_context == context for fork in forks)
    assert resident() - before < 64 << 20


def test_tensors_are_aligned_and_weights_are_the_mapped_file(model: Model, artifact: Path) -> None:
    session = model.new_session(3, max_context=7)
    tensors = [*model._weights, *session._caches.tensors, *session._vectors]
    assert [tensor.data_ptr() % 64 for tensor in tensors] == [0] * len(tensors)
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith("weights-00001.safetensors"):
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            mapped.append(range(start, end))
    for weight in model._weights:
        assert any(weight.data_ptr() in span for span in mapped)


BAD_CALLS = [
    ("prefill", {"token_ids": [[1, VOCAB]]}, f"token_ids[0, 1]: expected 0 to {VOCAB - 1}, found {VOCAB}"),
    ("prefill", {"token_ids": [[-1, 0]]}, f"token_ids[0, 0]: expected 0 to {VOCAB - 1}, found -1"),
    ("prefill", {"token_ids": [[1.0, 2.0]]}, "token_ids: expected integers, found float64"),
    ("prefill", {"token_ids": [[True]]}, "token_ids: expected integers, found bool"),
    ("prefill", {"token_ids": [[2**64]]}, "token_ids: expected integers, found object"),
    ("prefill", {"token_ids": np.array([[2**64 - 1]], dtype=np.uint64)}, "token_ids[0, 0]: expected 0 to"),
    ("prefill", {"token_ids": [[1], [2, 3]]}, "token_ids: expected an array of integers"),
    ("prefill", {"token_ids": [1, 2]}, "token_ids: expected shape [1, tokens], found [2]"),
    ("prefill", {"token_ids": [[1], [2]]}, "token_ids: expected shape [1, tokens], found [2, 1]"),
    ("prefill", {"token_ids": np.zeros((1, 0), dtype=int)}, "token_ids: expected shape [1, tokens], found [1, 0]"),
    ("prefill", {"token_ids": [[1, 2]], "lengths": [3]}, "lengths[0]: expected 0 to 2, found 3"),
    ("prefill", {"token_ids": [[1, 2]], "lengths": [-1]}, "lengths[0]: expected 0 to 2, found -1"),
    ("prefill", {"token_ids": [[1, 2]], "lengths": [[1]]}, "lengths: expected shape [1], found [1, 1]"),
    ("prefill", {"token_ids": [[1, 2]], "lengths": [0.5]}, "lengths: expected integers, found float64"),
    ("prefill", {"token_ids": [[1, 2]], "chunk": 0}, "chunk: expected an integer of at least 1, found 0"),
    ("prefill", {"token_ids": [[1] * 7]}, "row 0: expected at most 10 tokens in this session (max_context), found"),
    ("decode", {"token_ids": [[1]]}, "token_ids: expected shape [1], found [1, 1]"),
    ("decode", {"token_ids": [1], "lengths": [2]}, "lengths[0]: expected 0 to 1, found 2"),
    ("decode", {"token_ids": [VOCAB]}, "token_ids[0, 0]: expected 0 to"),
    ("reset", {"rows": [1]}, "rows: expected row numbers below 1, found [1]"),
    ("reset", {"rows": [0.0]}, "rows: expected integers, found float64"),
]


@pytest.mark.parametrize(("method", "arguments", "message"), BAD_CALLS)
def test_bad_arguments_change_nothing(model: Model, method: str, arguments: dict[str, Any], message: str) -> None:
    session = model.new_session(max_context=10)
    session.prefill([[5, 6, 7, 8]])
    with pytest.raises(InputError) as caught:
        getattr(session, method)(**arguments)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert session.position.tolist() == [4]
    np.testing.assert_array_equal(session.decode([9])[0], last_logits([5, 6, 7, 8, 9]))


def test_a_session_fills_to_its_last_position(model: Model) -> None:
    session = model.new_session(2, max_context=9)
    tokens = random_tokens(6, 2, 9)
    found = session.prefill(tokens, chunk=4)
    np.testing.assert_array_equal(found, [expected_logits(row)[-1] for row in tokens])
    assert np.isnan(session.decode([0, 0], lengths=[0, 0])).all()
    with pytest.raises(InputError, match=r"row 1: .* 9 tokens .* position 9 and 1 more"):
        session.decode([0, 0], lengths=[0, 1])


@pytest.mark.parametrize(
    "arguments", [{"batch": 0}, {"batch": 1.0}, {"max_context": 0}, {"max_context": MAX_CONTEXT + 1}, {"batch": True}]
)
def test_new_session_checks_its_arguments(model: Model, arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"^{next(iter(arguments))}: expected an integer"):
        model.new_session(**arguments)


def test_a_session_too_large_for_the_address_space_is_refused(model: Model) -> None:
    with pytest.raises(InputError, match="caches do not fit in memory"):
        model.new_session(batch=1 << 50)


def test_a_failed_call_is_reported_until_reset(model: Model) -> None:
    session = model.new_session()
    session.decode([1])
    good = session._functions["decode"]

    def failing(*args: Any) -> None:
        raise RuntimeError("Check failed:\n somewhere")

    session._functions["decode"] = failing
    with pytest.raises(Error, match=r"^decode: the compiled function failed: Check failed: somewhere$"):
        session.decode([1])
    session._functions["decode"] = good
    for call in (lambda: session.decode([1]), session.fork, lambda: session.reset([0])):
        with pytest.raises(InputError, match=r"interrupted: reset\(\) it"):
            call()
    session.reset()
    np.testing.assert_array_equal(session.decode([2])[0], last_logits([2]))


def test_a_library_that_copies_its_caches_is_refused(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    other = model.new_session()
    other.decode([1])
    wrong = other._functions["decode"]
    monkeypatch.setattr(Machine, "bind", lambda *args: wrong)  # updates the caches of another session
    with pytest.raises(ArtifactError, match=r"decode: cache layers\.0\.window: expected an update in place"):
        model.new_session().decode([1])


def test_a_closed_session_refuses_everything(model: Model) -> None:
    with model.new_session() as session:
        session.decode([1])
    session.close()
    for call in (lambda: session.decode([1]), lambda: session.prefill([[1]]), session.fork, session.reset):
        with pytest.raises(InputError, match="found a closed one"):
            call()
