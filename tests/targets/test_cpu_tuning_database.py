"""The tuning database: what goes in comes out, what does not belong is refused, and which record is compiled by."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from v4c.targets.cpu.levels import LEVELS
from v4c.targets.cpu.scheduling import BY_NAME, FAMILIES, shipped
from v4c.targets.tuning_database import KernelKey, Machine, Record, Trial, TuningDatabase, TuningError, digest

KEY = KernelKey("merged_linear", (("k", 64), ("sizes", (32, 16))), "float32", "x86-64-v4")
HERE, THERE = Machine("this processor", 2, 2), Machine("another", 8, 4)
RECORD = Record(
    KEY, HERE, {"row_block": 3}, {"1": 10.0, "128": 300.0}, {"1": 5.0, "128": 300.0},
    (Trial({"row_block": 3}, 0.7), Trial({"row_block": 1}, None, "no result within 60 s")), True,
)  # fmt: skip

names = st.text("abc_", min_size=1, max_size=4)
sizes = st.one_of(st.integers(0, 2**40), st.lists(st.integers(1, 99), max_size=3).map(tuple))
keys = st.builds(
    KernelKey, names, st.dictionaries(names, sizes, max_size=3).map(lambda d: tuple(sorted(d.items()))), names, names
)
numbers = st.dictionaries(names, st.integers(1, 999), max_size=3)
times = st.just({}) | st.fixed_dictionaries({"1": st.floats(0.1, 1e6), "128": st.floats(0.1, 1e6)})
trials = st.builds(Trial, numbers, st.floats(0.01, 9)) | st.builds(Trial, numbers, st.none(), st.just("why"))
records = times.flatmap(
    lambda t: st.builds(
        Record, keys, st.sampled_from([HERE, THERE]), st.none() | numbers, st.just(t), st.just(t),
        st.lists(trials, max_size=3).map(tuple), st.booleans(),
    )
)  # fmt: skip


@given(st.lists(records, max_size=4))
def test_a_database_survives_json(given_records: list[Record]) -> None:
    database = TuningDatabase(given_records)
    again = TuningDatabase.from_document(json.loads(json.dumps(database.document())), "db.json")
    assert list(again) == list(database)


def test_gain_is_the_geometric_mean() -> None:
    assert RECORD.gain == pytest.approx(2**0.5)
    assert Record(KEY, HERE).gain == 1.0


def test_the_own_processor_decides_then_the_first_record() -> None:
    other = Record(KEY, THERE, {"row_block": 5}, finished=True)
    unfinished = Record(KEY, Machine("unfinished", 2, 2), {"row_block": 1})
    database = TuningDatabase([unfinished, other, RECORD])
    assert database.find(KEY) is other
    assert database.find(KEY, "this processor") is RECORD
    assert database.find(KEY, "unfinished") is other
    assert database.find(KernelKey("merged_linear", (), "float32", "x86-64-v4")) is None
    assert database.get(KEY, HERE) is RECORD
    database.put(Record(KEY, HERE))
    assert len(database) == 3


def test_the_digest_is_of_keys_and_schedules() -> None:
    slower = Record(KEY, THERE, {"row_block": 3}, {"1": 9.0}, {"1": 8.0})
    assert digest([RECORD]) == digest([slower])
    assert digest([RECORD]) != digest([Record(KEY, HERE, {"row_block": 4})])


def _changed(**changes: Any) -> dict[str, Any]:
    document = copy.deepcopy(TuningDatabase([RECORD]).document())
    for path, value in changes.items():
        *place, last = path.split("__")
        at: Any = document
        for step in place:
            at = at[int(step)] if isinstance(at, list) else at[step]
        if value is ...:
            del at[last]
        else:
            at[int(last) if isinstance(at, list) else last] = value
    return document


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "expected tuning format_version 1, found 2"),
        ({"more": 1}, "expected the keys"),
        ({"records": {}}, "records: expected a list"),
        ({"records__0__op": 3}, r"records\[0\]: op: expected a string, found 3"),
        ({"records__0__finished": 1}, "finished: expected true or false"),
        ({"records__0__level": ...}, "expected the keys op, shape"),
        ({"records__0__shape__k": "64"}, "shape: k: expected an integer or a list"),
        ({"records__0__machine__cores": True}, "machine: cores: expected a count"),
        ({"records__0__parameters__row_block": 1.5}, "parameters: row_block: expected an integer, found 1.5"),
        ({"records__0__default_us__1": -1}, "default_us: expected microseconds"),
        ({"records__0__default_us__x": 1.0}, "default_us: expected microseconds"),
        ({"records__0__tuned_us": {}}, "tuned_us: expected times of the row counts"),
        ({"records__0__trials__0__ratio": None}, r"trials\[0\]: expected either a ratio or why it failed"),
        ({"records__0__trials__0__ratio": 0}, "ratio: expected a positive number"),
        ({"records__0__trials__1": []}, r"trials\[1\]: expected an object"),
    ],
)
def test_what_is_no_database_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TuningError, match=f"db.json.*{message}"):
        TuningDatabase.from_document(_changed(**changes), "db.json")


def test_what_comes_with_v4c_fits_the_kernels() -> None:
    assert len(shipped()) > 0
    for record in shipped():
        assert record.key.level in LEVELS
        assert record.finished
        assert record.key.op in BY_NAME
        assert record.parameters is None or FAMILIES[BY_NAME[record.key.op]].schedule.from_parameters(
            record.parameters, "shipped"
        )
