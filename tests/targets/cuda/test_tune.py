"""The GPU's tuner: ``v4c tune --target cuda`` with a child process that behaves as told, and what the real one measures
with, on the simulated GPU."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.targets.cuda import harness
from tests.v4c.cli_harness import assert_one_line, invoke
from v4c.errors import UnsupportedError
from v4c.frontend.config import ModelConfig
from v4c.frontend.initialise import initialise
from v4c.passes.relax.kernels import Kernel
from v4c.runtime import cuda_library
from v4c.targets.cuda import tune
from v4c.targets.cuda.kernels.attention import compressed_sparse_attention
from v4c.targets.cuda.schedule import MHCSchedule, ProductSchedule
from v4c.targets.cuda.scheduling import tunable
from v4c.tuning import read_database

STUB = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    assert request["level"] == "sm_90a"
    ratio = request["candidate"]["few_rows"] / 8
    times = {name: {str(r): value for r in request["rows"]} for name, value in
             (("default_us", 8.0), ("candidate_us", 8.0 * ratio), ("ratio", ratio), ("wins", 1.0))}
    print(json.dumps(times), flush=True)
"""


@pytest.fixture(scope="module")
def checkpoint(tiny_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuning") / "model"
    config = replace(tiny_config, num_hidden_layers=1, attention_types=("sliding",), mlp_types=("topk",), vocab_size=64)
    initialise(config, folder)
    return folder


def test_what_is_found_is_compiled_by(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_library, "find_device", lambda: cuda_library.Device("a GPU", (9, 0), 132))
    monkeypatch.setattr(tune, "COMMAND", (sys.executable, "-c", STUB))
    database = tmp_path / "db.json"
    result = invoke(
        "tune", "-m", checkpoint, "--target", "cuda:sm_90a", "--op", "merged_linear", "--trials", "6", "-o", database
    )
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("a GPU, 132 processors\n")
    records = list(read_database(database))
    assert {(r.key.op, r.key.level, r.machine.cpu) for r in records} == {("merged_linear", "sm_90a", "a GPU")}
    assert all(r.parameters is not None and r.parameters["few_rows"] < ProductSchedule().few_rows for r in records)
    command = ("compile", "-m", checkpoint, "--target", "cuda:sm_90a", "--dry-run", "-o", tmp_path / "m")
    notes = json.loads(invoke(*command, "--tuning", database).stdout)["tuning"]
    assert notes["records"] == len(records) > 0
    assert notes["kernels"] > len(records)


def test_without_a_gpu_there_is_one_line(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> cuda_library.Device:
        raise UnsupportedError("target cuda: expected NVIDIA's driver, found none")

    monkeypatch.setattr(cuda_library, "find_device", none)
    result = invoke("tune", "-m", checkpoint, "--target", "cuda:sm_90a", "-o", tmp_path / "db.json")
    assert_one_line(result, "target cuda", "found none")
    assert not (tmp_path / "db.json").exists()


@pytest.mark.parametrize(("architecture", "keys"), [("sm_80", 32), ("sm_90a", 64)])
def test_attention_is_searched_for_what_makes_a_difference(architecture: str, keys: int) -> None:
    sizes = (64, 512, 128, 512, 0.044, 64)
    rounded, plain = (
        tunable(Kernel(compressed_sparse_attention, (*sizes, dtype)), architecture) for dtype in ("bfloat16", "float32")
    )
    assert rounded is not None
    assert plain is not None
    assert rounded.default.parameters["tile_keys"] == keys
    assert len(rounded.choices["tile_keys"]) > 1 == len(rounded.choices["warps"])
    assert len(plain.choices["warps"]) > 1 == len(plain.choices["tile_keys"])
    assert rounded.key != plain.key


def test_the_child_measures_both_schedules() -> None:
    level = harness.prepare()
    from v4c.targets.cuda import architectures, toolchain
    from v4c.targets.cuda.measure import Bench
    from v4c.targets.cuda.simulator.build import compile_simulated
    from v4c.targets.cuda.tune_worker import measure

    architecture = architectures.find(level)
    compiler = partial(toolchain.compile_source, architecture=architecture) if harness.real() else compile_simulated
    default, other = MHCSchedule().parameters, MHCSchedule(columns=256).parameters
    times = measure(
        "mhc_head", [4, 512, 1e-6, 1e-6], level, default, other, [1, 3], 1e-3,
        on=lambda _: Bench(architecture, compiler),
    )  # fmt: skip
    assert set(times) == {"default_us", "candidate_us", "ratio", "wins"}
    assert all(set(values) == {"1", "3"} for values in times.values())
    assert all(0 <= share <= 1 for share in times["wins"].values())
