"""The schedule of a run, with processes that are made up, and a child's bookkeeping, with a model that is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gguf", reason="the extra `bench` is not installed: no gguf")
pytest.importorskip("psutil", reason="the extra `bench` is not installed: no psutil")

from benchmarks import peer_child
from benchmarks.peer_child import Runner
from benchmarks.peer_engine import CHUNK, Engine, State
from benchmarks.peer_list import PEERS
from benchmarks.peer_measure import Run, agreement
from benchmarks.peer_pool import Pool, Process
from v4c.errors import Error
from v4c.frontend.presets import preset

V4C, LLAMA, EAGER = (PEERS[name] for name in ("v4c-bf16", "llama-bf16", "transformers-bf16"))


class FakePool:
    """Answers like peers that slow down with the machine, turn by turn; `broken` ones fail at decode, or at `fails`.

    Where not all fit, only the one asked last is alive.
    """

    def __init__(self, in_turns: bool, broken: str = "", fails: str = "decode") -> None:
        self.in_turns, self.broken, self.fails = in_turns, broken, fails
        self.huge_pages = False
        self.alive: list[str] = []
        self.slow = 1.0
        self.asked: list[tuple[str, str]] = []
        self.versions = {"v4c-bf16": "v4c 0", "llama-bf16": "llama 0", "transformers-bf16": "transformers 0"}

    def start(self, peer: Any) -> None:
        """Load a peer."""
        self.alive = [*self.alive, peer.name] if self.in_turns else [peer.name]

    def is_alive(self, peer: Any) -> bool:
        """Whether it is loaded."""
        return peer.name in self.alive

    def ask(self, peer: Any, do: str, /, **arguments: Any) -> Any:
        """The answer to a request."""
        assert peer.name in self.alive
        self.asked.append((peer.name, f"{do} {arguments.get('context', '')}".strip()))
        if peer.name == self.broken and do == self.fails:
            raise Error(f"{peer.name}: out of luck")
        if do == "decode":
            if arguments["save"]:
                np.save(arguments["save"], np.full((3, 8), 2.0 if peer is V4C else 2.02, np.float32))
            return {"ms": [10.0 * self.slow] * arguments["steps"], "last_chunk_ms": 700.0 * self.slow}
        if do == "limits":
            self.slow = 1.0 if self.slow == 2.0 else 2.0
            return {"bandwidth": 20e9 / self.slow, "peak": 200e9 / self.slow}
        return {"prefill": 500.0 * self.slow, "costs": {}, "fill": None}[do]


def _run(pool: FakePool, folder: Path, rounds: int = 2) -> dict[str, Any]:
    run = Run(pool, [V4C, LLAMA, EAGER], [16384, 1024], 3, folder, lambda text: None)  # type: ignore[arg-type]
    for number in range(rounds):
        run.round(str(number))
    return run.document(preset("v4-mini"), "v4-mini", 2, rounds)


def test_peers_take_turns_where_they_fit(tmp_path: Path) -> None:
    pool = FakePool(in_turns=True)
    _run(pool, tmp_path, rounds=1)
    names = ("v4c-bf16", "llama-bf16", "transformers-bf16")
    limits = ("v4c-bf16", "limits")
    expected = [("v4c-bf16", "costs 1024")]
    for name in names:
        expected += [limits, (name, "prefill")]
    for context, readers in ((1024, names), (16384, names[:2])):
        for name in readers:
            expected += [(name, f"fill {context}"), limits, (name, f"decode {context}")]
    assert pool.asked == expected


def test_whole_rounds_where_they_do_not(tmp_path: Path) -> None:
    pool = FakePool(in_turns=False)
    _run(pool, tmp_path, rounds=2)
    names = [name for name, _ in pool.asked]
    changes = [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]
    assert changes == ["v4c-bf16", "llama-bf16", "transformers-bf16"] * 2


def test_limits_that_were_measured_last_serve_where_no_v4c_is_loaded(tmp_path: Path) -> None:
    pool = FakePool(in_turns=False)
    document = _run(pool, tmp_path, rounds=1)
    v4c, llama, _ = document["peers"]
    last = v4c["decode"][-1]["turns"][0]
    found = llama["prefill"][0]["turns"][0]
    assert [found[key] for key in ("bandwidth", "peak", "measured_by")] == [last["bandwidth"], last["peak"], "v4c-bf16"]
    assert found["seconds_before"] >= last["seconds_before"] >= 0
    assert pool.asked.count(("v4c-bf16", "limits")) == 3 == len(document["limits"])


def test_every_v4c_measures_in_its_own_process(tmp_path: Path) -> None:
    pool = FakePool(in_turns=True, broken="v4c-int8", fails="limits")
    pool.versions["v4c-int8"] = "v4c 0"
    run = Run(pool, [V4C, PEERS["v4c-int8"], LLAMA], [1024], 3, tmp_path, lambda text: None)  # type: ignore[arg-type]
    run.round("1")
    document = run.document(preset("v4-mini"), "v4-mini", 2, 1)
    assert ("v4c-int8", "limits") in pool.asked
    assert ("v4c-int8", "prefill") not in pool.asked
    assert document["left_out"] == [{"name": "v4c-int8", "reason": "out of luck"}]
    assert {limit["measured_by"] for limit in document["limits"]} == {"v4c-bf16"}
    assert [peer["name"] for peer in document["peers"]] == ["v4c-bf16", "llama-bf16"]


def test_document(tmp_path: Path) -> None:
    document = _run(FakePool(in_turns=True), tmp_path)
    v4c, llama, eager = document["peers"]
    assert [e["context"] for e in llama["decode"]] == [1024, 16384]
    assert [e["context"] for e in eager["decode"]] == [1024]
    for entry in v4c["decode"]:
        # The machine is half as fast in every other turn, and so are its peers: their shares are the same in both.
        for turn in entry["turns"]:
            assert turn["samples_ms"] == [10.0 * 20e9 / turn["bandwidth"]] * 3
        assert entry["bandwidth_share"] == pytest.approx(entry["bytes_read"] / 10e-3 / 20e9)
    assert {turn["bandwidth"] for entry in v4c["decode"] for turn in entry["turns"]} == {20e9, 10e9}
    assert (document["stream_bandwidth_gbs"], document["lowest_stream_bandwidth_gbs"]) == (20.0, 10.0)
    assert (document["matrix_peak_gflops"], document["lowest_matrix_peak_gflops"]) == (200.0, 100.0)
    first, _, last = v4c["prefill"]
    assert (first["start"], last["start"]) == (0, 15872)
    assert first["peak_share"] == pytest.approx(first["flops"] / 0.5 / 200e9)
    assert last["peak_share"] == pytest.approx(last["flops"] / 0.7 / 200e9)
    assert last["flops"] > first["flops"]
    found = llama["agreement"][0]
    assert found["relative_difference"] == pytest.approx(0.01)
    assert found["max_abs_diff"] == pytest.approx(0.02)
    assert found["agrees"]


def test_a_peer_that_fails_is_left_out_with_the_reason(tmp_path: Path) -> None:
    pool = FakePool(in_turns=True, broken="llama-bf16")
    document = _run(pool, tmp_path)
    assert document["left_out"] == [{"name": "llama-bf16", "reason": "out of luck"}]
    assert [p["name"] for p in document["peers"]] == ["v4c-bf16", "transformers-bf16"]
    assert pool.asked.count(("llama-bf16", "decode 1024")) == 1


def test_without_the_reference_there_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(Error, match="v4c-bf16: out of luck"):
        _run(FakePool(in_turns=True, broken="v4c-bf16"), tmp_path)


def test_agreement_forgives_one_token_and_no_more() -> None:
    reference = np.random.default_rng(0).standard_normal((9, 50))
    found = reference * 1.01
    found[4] = -reference[4]
    assert agreement(reference, found, 0.02)["agrees"]
    assert agreement(reference, found, 0.02)["argmax_agreement"] == pytest.approx(8 / 9)
    assert not agreement(reference, np.roll(reference, 1, axis=1), 0.8)["agrees"]


class FakeState(State):
    """Keeps what it was given to read."""

    def __init__(self, can_mark: bool) -> None:
        self.read_so_far: list[int] = []
        self.calls: list[int] = []
        self._can_mark, self._mark = can_mark, 0

    def read(self, tokens: np.ndarray) -> np.ndarray:
        """Logits whose first entry is how much was read."""
        self.read_so_far += tokens.tolist()
        self.calls.append(len(tokens))
        return np.full(4, len(self.read_so_far), np.float32)

    def restart(self) -> None:
        self.read_so_far = []

    def mark(self) -> bool:
        self._mark = len(self.read_so_far)
        return self._can_mark

    def rewind(self) -> None:
        assert self._can_mark
        del self.read_so_far[self._mark :]

    def pretend(self, position: int) -> bool:
        self.read_so_far = self.read_so_far[:1] * position
        return True


class FakeEngine(Engine):
    """Hands out one state, and remembers the capacity that was asked for."""

    vocab_size, version = 4, "0"

    def __init__(self, can_mark: bool = True) -> None:
        self.state, self.capacity = FakeState(can_mark), 0

    def begin(self, capacity: int) -> State:
        self.capacity = capacity
        return self.state


def test_a_context_is_read_once_and_its_end_again(tmp_path: Path) -> None:
    engine = FakeEngine()
    runner = Runner(engine, slack=10)
    first = runner.decode(3 * CHUNK, 4, str(tmp_path / "logits.npy"))
    assert engine.capacity == 3 * CHUNK + 10
    assert engine.state.calls == [CHUNK] * 3 + [1] * 5
    assert len(first["ms"]) == 4
    assert first["last_chunk_ms"] is not None
    saved = np.load(tmp_path / "logits.npy")
    np.testing.assert_array_equal(saved[:, 0], 3 * CHUNK + np.arange(6))
    whole = list(engine.state.read_so_far)
    again = runner.decode(3 * CHUNK, 4, None)
    assert engine.state.calls[8:] == [CHUNK] + [1] * 5
    assert engine.state.read_so_far == whole  # the same tokens at the same places
    assert again["last_chunk_ms"] is not None


def test_all_but_the_end_of_a_context_is_read_beforehand() -> None:
    engine = FakeEngine()
    runner = Runner(engine, slack=10)
    runner.fill(3 * CHUNK)
    runner.fill(3 * CHUNK)
    assert engine.state.calls == [CHUNK] * 2
    runner.decode(3 * CHUNK, 1, None)
    assert engine.state.calls == [CHUNK] * 3 + [1] * 2


@pytest.mark.parametrize("context", [1, 200, CHUNK, CHUNK + 188, 2 * CHUNK])
def test_a_context_of_any_length(context: int) -> None:
    engine = FakeEngine()
    Runner(engine, slack=10).decode(context, 1, None)
    expected = np.random.default_rng(0).integers(0, 4, context + 10)
    assert engine.state.read_so_far == expected[: context + 2].tolist()
    assert max(engine.state.calls) <= CHUNK


def test_one_prompt_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    runner = Runner(engine, slack=10)
    runner.warm()
    assert engine.state.calls == [CHUNK]
    runner.prefill()
    runner.prefill()
    assert engine.state.calls == [CHUNK] * 3
    assert engine.capacity == CHUNK

    monkeypatch.setattr(peer_child, "open_engine", lambda *arguments: engine)
    peer_child.Child().answer({"do": "open", "peer": "llama-bf16", "folder": "", "threads": 1, "slack": 8})
    assert engine.state.calls == [CHUNK] * 4


def test_a_peer_that_cannot_go_back_goes_on() -> None:
    engine = FakeEngine(can_mark=False)
    runner = Runner(engine, slack=10)
    runner.decode(2 * CHUNK, 4, None)
    assert runner.decode(2 * CHUNK, 4, None)["last_chunk_ms"] is None
    assert engine.state.calls == [CHUNK] * 2 + [1] * 10
    expected = np.random.default_rng(0).integers(0, 4, 2 * CHUNK + 10)
    assert engine.state.read_so_far == expected.tolist()


def test_beyond_what_is_read_a_peer_pretends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_child, "LONGEST_FILL", 2 * CHUNK)
    engine = FakeEngine()
    runner = Runner(engine, slack=10)
    for _ in range(2):
        assert runner.decode(8 * CHUNK, 2, None)["last_chunk_ms"] is None
    assert engine.state.calls == [CHUNK] * 2 + [1] * 6
    assert len(engine.state.read_so_far) == 8 * CHUNK + 3


def test_a_child_answers_errors_in_one_line_and_ends(tmp_path: Path) -> None:
    """A real process, asked for a folder that is not there."""
    process = Process("v4c-bf16", tmp_path / "log", 1)
    with pytest.raises(Error, match=r"v4c-bf16: .*nothing-here/bf16\.v4c.*expected") as caught:
        process.ask("open", peer="v4c-bf16", folder=str(tmp_path / "nothing-here"), threads=1, slack=8)
    assert "\n" not in str(caught.value)
    process.end()


def test_a_child_that_dies_is_an_error_that_names_the_log(tmp_path: Path) -> None:
    process = Process("v4c-bf16", tmp_path / "log", 1)
    process.kill()
    with pytest.raises(Error, match=r"v4c-bf16: its process ended with -?\d+ during 'prefill'; see .*log"):
        process.ask("prefill")


def test_processes_end_to_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Recorded:
        def __init__(self, name: str, log: Path, threads: int) -> None:
            self.name = name
            events.append(f"start {name}")

        def ask(self, do: str, /, **arguments: Any) -> Any:
            return {"version": "0"}

        def end(self) -> None:
            events.append(f"end {self.name}")

    monkeypatch.setattr("benchmarks.peer_pool.Process", Recorded)
    monkeypatch.setattr("benchmarks.peer_pool._PAUSE", 0.0)
    config = preset("v4-mini")
    room = V4C.needs(config) + LLAMA.needs(config)
    with Pool([V4C, LLAMA, EAGER], config, tmp_path, memory=room, threads=1, slack=8) as pool:
        assert not pool.in_turns
        for peer in (V4C, LLAMA, V4C):
            pool.ask(peer, "prefill")
        pool.start(EAGER)
        pool.ask(EAGER, "prefill")
        assert [pool.is_alive(peer) for peer in (V4C, LLAMA, EAGER)] == [False, True, True]
    names = [V4C.name, LLAMA.name, EAGER.name]
    assert events[:2] == [f"start {names[0]}", f"start {names[1]}"]
    assert events[2:4] == [f"end {names[0]}", f"start {names[2]}"]
    assert sorted(events[4:]) == sorted([f"end {names[1]}", f"end {names[2]}"])
    assert Pool([V4C, LLAMA], config, tmp_path, memory=room, threads=1, slack=8).in_turns
