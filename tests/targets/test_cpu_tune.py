"""The tuner's search with a child process that behaves as told, and the real child on a small product."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.targets.test_cpu_schedule import ARGUMENTS, small
from v4c.targets.cpu.scheduling import BY_NAME
from v4c.targets.cpu.tune import COMMAND
from v4c.targets.cpu.tune_data import MOST_BYTES, Calls, fewer_experts
from v4c.targets.cpu.tune_worker import cautious_ratio
from v4c.targets.schedule_search import Search, clearly_beaten, tune, value
from v4c.targets.scheduler import named
from v4c.targets.tune_process import TrialFailed, Worker
from v4c.targets.tuning_database import Machine, Record, TuningDatabase

STUB = (sys.executable, str(Path(__file__).with_name("tune_stub.py")))
HERE = Machine("a processor", 2, 2)
SEARCH = Search(trials=60, level="x86-64-v4", machine=HERE)


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the stub notes its starts."""
    path = tmp_path / "log"
    monkeypatch.setenv("TUNE_STUB_LOG", str(path))
    return path


@pytest.fixture
def stub(log: Path) -> Iterator[Worker]:
    with Worker(2, 1.0, STUB) as worker:
        yield worker


def request(**candidate: int) -> dict[str, Any]:
    return {"rows": [1, 128], "candidate": candidate}


def test_a_crash_and_a_hang_each_lose_one_request(stub: Worker, log: Path) -> None:
    assert stub.ask(request(row_block=7))["ratio"] == {"1": 1.0, "128": 1.0}
    with pytest.raises(TrialFailed, match="ended by SIGSEGV"):
        stub.ask(request(row_block=1))
    assert stub.ask(request(row_block=7))["wins"]["1"] == 1.0
    with pytest.raises(TrialFailed, match="no result within 1 s"):
        stub.ask(request(row_block=2))
    with pytest.raises(TrialFailed, match="no kernel"):
        stub.ask(request(row_block=3))
    assert stub.ask(request(row_block=4))["candidate_us"]["1"] == pytest.approx(400 / 7)
    assert log.read_text().count("started") == 3


def test_a_child_that_cannot_start_is_a_failure() -> None:
    with Worker(2, 5.0, (sys.executable, "-c", "raise SystemExit(3)")) as worker, pytest.raises(TrialFailed, match="3"):
        worker.ask(request(row_block=7))


def test_the_search_finds_the_best_that_works(stub: Worker) -> None:
    saved: list[int] = []
    database = TuningDatabase()
    told: list[tuple[str, int, int]] = []
    (record,) = tune(
        [small("grouped_experts")], database, stub, SEARCH, lambda: saved.append(len(next(iter(database)).trials)),
        lambda *what: told.append(what),
    )  # fmt: skip
    assert record.parameters is not None
    assert record.parameters["row_block"] == 4  # smaller ones fail
    assert record.gain == pytest.approx(7 / 4)
    failures = {t.failed for t in record.trials if t.parameters["row_block"] < 4}
    assert failures == {
        "the child process was ended by SIGSEGV", "no result within 1 s", "no kernel",
    }  # fmt: skip
    assert record.finished
    assert len({tuple(t.parameters.values()) for t in record.trials}) == len(record.trials)
    assert saved[:3] == [1, 2, 3]  # kept after every trial
    assert told[0] == (f"tune {record.key}", 1, 60)


def test_the_defaults_neighbours_come_first(stub: Worker) -> None:
    kernel, database = small("sliding_window_attention"), TuningDatabase()
    own = kernel.default.parameters
    tune([kernel], database, Even(2, 1.0, STUB), Search(12, "x86-64-v4", HERE), lambda: None)
    tried = [t.parameters for t in next(iter(database)).trials]
    changed = [{name for name in own if t[name] != own[name]} for t in tried[:10]]
    assert all(len(names) == 1 for names in changed)
    assert set().union(*changed) == set(own)


def test_a_finished_kernel_is_skipped_and_an_unfinished_one_continued(stub: Worker, log: Path) -> None:
    kernel, few = small("grouped_experts"), Search(5, "x86-64-v4", HERE)
    whole = TuningDatabase()
    tune([kernel], whole, stub, few, lambda: None)
    (record,) = whole
    assert len(record.trials) == 5
    (again,) = tune([kernel], whole, Worker(2, 1.0, ("false",)), few, lambda: None)  # starts no child
    assert again == record
    begun = TuningDatabase([Record(kernel.key, HERE, trials=record.trials[:3])])
    (continued,) = tune([kernel], begun, stub, few, lambda: None)
    assert continued.trials[:3] == record.trials[:3]
    assert len(continued.trials) == 5
    assert continued.finished


def test_an_interrupt_keeps_what_was_found(stub: Worker) -> None:
    database = TuningDatabase()

    def save() -> None:
        if len(next(iter(database)).trials) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune([small("grouped_experts")], database, stub, SEARCH, save)
    (record,) = database
    assert (len(record.trials), record.finished) == (4, False)


class Even(Worker):
    """A child for whom all schedules are equally fast, but for noise."""

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        ratio = 0.9 if request["seconds"] < 1 else 0.99  # a trial is luckier than what confirms it
        return {
            "default_us": {"1": 5.0, "128": 50.0}, "candidate_us": {"1": 5.0, "128": 49.0},
            "ratio": {"1": ratio, "128": ratio}, "wins": {"1": 0.6, "128": 0.6},
        }  # fmt: skip


def test_the_default_stays_unless_it_is_clearly_beaten() -> None:
    (record,) = tune([small("mhc_post")], TuningDatabase(), Even(2, 1.0, STUB), SEARCH, lambda: None)
    assert record.parameters is None
    assert record.gain == 1.0
    assert record.default_us == record.tuned_us == {"1": 5.0, "128": 50.0}
    assert len(record.trials) == 3  # all there are: one number with four values


@pytest.mark.parametrize(
    ("ratio", "wins", "beaten"),
    [
        ({"1": 0.8, "128": 0.9}, {"1": 0.9, "128": 0.9}, True),
        ({"1": 0.8, "128": 1.01}, {"1": 0.9, "128": 0.3}, True),
        ({"1": 0.5, "128": 1.03}, {"1": 1.0, "128": 0.1}, False),  # a prompt would be slower
        ({"1": 0.98, "128": 0.98}, {"1": 1.0, "128": 1.0}, False),  # too little
        ({"1": 0.8, "128": 1.0}, {"1": 0.6, "128": 0.5}, False),  # not sure
    ],
)
def test_what_clearly_beaten_means(ratio: dict[str, float], wins: dict[str, float], beaten: bool) -> None:
    assert clearly_beaten({"ratio": ratio, "wins": wins}) is beaten
    assert (value(ratio) > 1) == (max(ratio.values()) > 1.02)


def test_a_ratio_is_the_worse_of_medians_and_fastest_calls() -> None:
    assert cautious_ratio([10.0] * 20, [5.0] * 20) == 0.5
    # Better in most rounds of a busy machine, but not in those that were left alone; and the other way round.
    assert cautious_ratio([5.0] * 2 + [50.0] * 18, [6.0] * 2 + [30.0] * 18) == 1.2
    assert cautious_ratio([5.0] * 2 + [50.0] * 18, [4.0] * 2 + [60.0] * 18) == 1.2


def test_fewer_experts_have_as_many_tokens_each() -> None:
    big = {"experts": 256, "d": 4096, "f": 2048, "top_k": 6, "weight_dtype": "float32"}
    found, rows = fewer_experts(big, 128)
    assert 12 * found["experts"] * 4096 * 2048 <= MOST_BYTES
    assert rows == round(128 * found["experts"] / 256)
    assert fewer_experts({**big, "d": 64}, 128) == ({**big, "d": 64}, 128)
    assert fewer_experts({"k": 3}, 128) == ({"k": 3}, 128)
    assert fewer_experts({**big, "top_k": 200}, 1) == ({**big, "experts": 200, "top_k": 200}, 1)


@pytest.mark.parametrize(
    "name", ["merged_linear", "grouped_linear", "grouped_experts", "compressed_sparse_attention", "lightning_index"]
)
def test_arguments_are_what_a_model_would_pass(name: str) -> None:
    tunable = small(name)
    function = tunable.scheduled(tunable.default).build()
    calls = Calls(function, named(tunable.kernel), 3)
    for param, tensor in zip(function.params, calls.next(), strict=True):
        array = tensor.numpy()
        assert str(param.ty.dtype) == tensor.dtype
        if param.name.startswith("indices"):
            assert array.min() >= 0
            if "experts" in name:
                assert all(len(set(row)) == len(row) for row in array.reshape(-1, array.shape[-1]).tolist())
        if param.name.startswith("lengths"):
            np.testing.assert_array_equal(array, 3)


def test_the_real_child_measures_both_schedules() -> None:
    tunable = small("grouped_linear")
    known = tunable.default.parameters
    with Worker(2, 120.0, COMMAND) as worker:
        asked = {
            "op": "grouped_linear", "arguments": ARGUMENTS["grouped_linear"], "level": "x86-64", "rows": [1, 20],
            "default": known, "candidate": {**known, "row_block": 3}, "seconds": 0.02,
        }  # fmt: skip
        times = worker.ask(asked)
        assert set(times) == {"default_us", "candidate_us", "ratio", "wins"}
        for measured in times.values():
            assert set(measured) == {"1", "20"}
        assert all(t > 0 for kind in ("default_us", "candidate_us", "ratio") for t in times[kind].values())
        with pytest.raises(TrialFailed, match="row_block: expected at most 7, found 99"):
            worker.ask({**asked, "candidate": {**known, "row_block": 99}})
        assert worker.ask(asked)["ratio"]["1"] > 0
    assert set(BY_NAME) == set(ARGUMENTS)
