"""``v4c tune`` as a user runs it, and compiling by what it found."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import v4c
from tests.v4c.cli_harness import V4C, assert_one_line, invoke
from v4c.frontend.config import ModelConfig
from v4c.frontend.initialise import initialise
from v4c.runtime.artifact import read_manifest
from v4c.targets.scheduler import Tunable
from v4c.targets.tuning_database import Machine, Record, TuningDatabase, processor
from v4c.tuning import model_kernels, read_database, write_database


@pytest.fixture(scope="module")
def small_config(tiny_config: ModelConfig) -> ModelConfig:
    """One layer, so that importing takes little."""
    return replace(tiny_config, num_hidden_layers=1, attention_types=("sliding",), mlp_types=("topk",), vocab_size=64)


@pytest.fixture(scope="module")
def imported(small_config: ModelConfig) -> list[Tunable]:
    """What compiling `small_config` for x86-64-v3 builds."""
    return model_kernels(small_config, "cpu:x86-64-v3", "f32", "none", None)


@pytest.fixture
def quick(imported: list[Tunable], monkeypatch: pytest.MonkeyPatch) -> list[Tunable]:
    """The same, and importing the model again takes no time."""
    monkeypatch.setattr("v4c.tuning.model_kernels", lambda *_: imported)
    return imported


@pytest.fixture(scope="module")
def checkpoint(small_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuning") / "model"
    initialise(small_config, folder)
    return folder


def test_the_kernels_of_a_model_are_each_there_once(imported: list[Tunable]) -> None:
    kernels = imported
    assert len({k.key for k in kernels}) == len(kernels)
    assert {k.key.level for k in kernels} == {"x86-64-v3"}
    assert {"merged_linear", "grouped_linear", "mhc_pre_norm", "sliding_window_attention", "mixture_of_experts"} <= {
        k.key.op for k in kernels
    }


def test_tune_writes_a_database_and_skips_what_it_holds(quick: list[Tunable], checkpoint: Path, tmp_path: Path) -> None:
    database = tmp_path / "found.json"
    arguments = ["tune", "-m", checkpoint, "--op", "grouped_linear", "--trials", "2", "--threads", "2", "-o", database]
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    (row,) = document["kernels"]
    assert (row["op"], row["level"], row["trials"], row["failed"]) == ("grouped_linear", "x86-64-v3", 2, 0)
    assert set(row["default_us"]) == set(row["tuned_us"]) == {"1", "128"}
    assert document["machine"]["cpu"] == processor()
    before = database.read_bytes()
    again = invoke(*arguments)
    assert again.exit_code == 0
    assert "grouped_linear" in again.stdout
    assert again.stderr.endswith(f"wrote {database}\n")
    assert database.read_bytes() == before  # nothing was measured
    assert not list(tmp_path.glob(".*partial"))


def test_a_found_schedule_is_compiled_by_and_noted(imported: list[Tunable], checkpoint: Path, tmp_path: Path) -> None:
    product = next(k for k in imported if k.key.op == "merged_linear")
    numbers = {**product.default.parameters, "row_block": 2, "chains": 1}
    database = TuningDatabase([Record(product.key, Machine("elsewhere", 1, 1), numbers, finished=True)])
    write_database(database, tmp_path / "db.json")
    assert list(read_database(tmp_path / "db.json")) == list(database)
    command = ["compile", "-m", checkpoint, "--target", "cpu:x86-64-v3", "--dry-run", "-o", tmp_path / "m"]
    notes = json.loads(invoke(*command, "--tuning", tmp_path / "db.json").stdout)["tuning"]
    assert notes == {"kernels": len(imported), "shipped": notes["shipped"], "records": 1, "sha256": notes["sha256"]}
    assert len(notes["sha256"]) == 64


def test_an_artifact_says_how_its_kernels_were_chosen(tiny_artifact: Path) -> None:
    notes = read_manifest(tiny_artifact).build["tuning"]
    assert notes["kernels"] > 5
    assert (notes["records"], notes["sha256"]) == (0, None)


@pytest.mark.slow
def test_schedules_change_the_code_and_not_the_logits(checkpoint: Path, tmp_path: Path) -> None:
    kernels = model_kernels(checkpoint, "cpu", "f32", "none", None)
    here = Machine(processor(), 2, 2)
    smallest = {k.key: k.default.parameters | {n: c[0] for n, c in k.choices.items()} for k in kernels}
    write_database(
        TuningDatabase(Record(key, here, numbers, finished=True) for key, numbers in smallest.items()),
        tmp_path / "db.json",
    )
    v4c.compile(checkpoint, tmp_path / "plain")
    v4c.compile(checkpoint, tmp_path / "tuned", tuning=tmp_path / "db.json")
    assert read_manifest(tmp_path / "tuned").build["tuning"]["records"] == len(kernels)
    libraries = [next((tmp_path / name).glob("*.so")).read_bytes() for name in ("plain", "tuned")]
    assert libraries[0] != libraries[1]
    ids = np.random.default_rng(0).integers(0, 64, (2, 37))
    plain, tuned = (
        v4c.load(tmp_path / name).new_session(batch=2, max_context=64).prefill(ids, all_logits=True)
        for name in ("plain", "tuned")
    )
    np.testing.assert_allclose(tuned, plain, rtol=0, atol=2e-5)


def test_refusals_are_one_line(
    quick: list[Tunable], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    database, tune = tmp_path / "db.json", ["tune", "-m", checkpoint, "-o"]
    assert_one_line(invoke("tune", "-o", database), "-m and --preset")
    assert_one_line(invoke(*tune, tmp_path), "expected a file name, found a folder")
    assert_one_line(invoke(*tune, tmp_path / "no" / "db.json"), "expected an existing folder")
    assert_one_line(invoke("compile", "-m", checkpoint, "--tuning", database, "-o", tmp_path / "m"), "db.json", "found")
    database.write_text("{")
    assert_one_line(invoke(*tune, database), "db.json: expected valid JSON")
    database.write_text('{"format_version": 9, "records": []}')
    assert_one_line(invoke(*tune, database), "format_version 1, found 9")
    database.unlink()
    assert_one_line(invoke(*tune, database, "--op", "linear_unpacked_of_mine"), "expected a kernel of this model")
    assert not database.exists()
    assert invoke(*tune, database, "--trials", "0").exit_code == 2


def test_a_level_this_machine_lacks_is_not_tuned(
    quick: list[Tunable], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr("v4c.targets.cpu.tune.machine_features", lambda: frozenset({"ssse3"}))
    result = invoke("tune", "-m", checkpoint, "--target", "cpu:x86-64-v3", "-o", tmp_path / "db.json")
    assert_one_line(result, "target cpu:x86-64-v3", "found one without")


def test_interrupted_search_keeps_its_trials(checkpoint: Path, tmp_path: Path) -> None:
    database = tmp_path / "db.json"
    command = [V4C, "tune", "-m", checkpoint, "--op", "merged_linear", "-o", database]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while not database.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    assert stderr.splitlines()[-1] == "v4c: error: interrupted"
    assert [line for line in stderr.splitlines() if "warning: load" not in line] == ["v4c: error: interrupted"]
    (record, *_) = read_database(database)
    assert record.trials
    assert not list(tmp_path.glob(".*partial"))


@pytest.mark.parametrize(("load", "warned"), [(0.2, False), (99.0, True)])
def test_a_busy_machine_is_warned_about(
    load: float, warned: bool, quick: list[Tunable], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (load, load, load))
    stderr = invoke("tune", "-m", checkpoint, "--op", "none", "-o", tmp_path / "db.json").stderr
    assert ("warning: load 99.0 on" in stderr) == warned


def test_the_tuner_is_a_program_of_its_own() -> None:
    python = Path(V4C).with_name("python")
    result = subprocess.run(
        [python, "-m", "v4c.targets.cpu.tune", "-h"], capture_output=True, text=True, timeout=60, check=True
    )
    assert "--time-limit" in result.stdout
