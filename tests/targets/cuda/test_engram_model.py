"""A whole model with Engram on the simulated GPU: tables in host memory, rows fetched on the side stream."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.targets.cuda.simulated import report, verified
from v4c.inspection import inspect
from v4c.runtime.artifact import read_manifest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("order", [{}, {"V4C_SIM_BACKWARDS": "1"}], ids=["late", "backwards"])
def test_logits_are_those_of_torch(engram_checkpoint: Path, engram_artifact: Path, order: dict[str, str]) -> None:
    """With the side stream as late as it may be, and as early; threads in both orders."""
    # Two readings decode eight tokens; all but the first of each and the recorded step's first run are replays.
    assert verified(engram_checkpoint, engram_artifact, **order) >= 10


def test_in_bfloat16(engram_checkpoint: Path, tmp_path: Path) -> None:
    assert verified(engram_checkpoint, tmp_path / "bf16.v4c", "--dtype", "bf16") >= 10


def test_lookups_are_alone_on_the_side_stream_with_memory_of_their_own(engram_artifact: Path) -> None:
    for found in report("side_stream_run", engram_artifact, "watch").values():
        assert found["wrong"] == []
        assert found["unjoined"] == 0
        assert found["lookups"] == 2 * 4  # tables; chunks and steps
        assert found["between"] > found["lookups"]  # other kernels run meanwhile
        assert found["readers"] >= found["lookups"]


def test_a_missing_join_shows(engram_artifact: Path) -> None:
    found = report("side_stream_run", engram_artifact, "unjoined")
    assert found["finite"]
    assert not found["same"]
    assert "cudaStreamEndCapture: expected success, found CUDA error 904" in found["recording"]


def test_where_tables_lie_is_said(engram_artifact: Path) -> None:
    tables = {w.name: w.nbytes for w in read_manifest(engram_artifact).weights if w.on_host}
    assert [name for name in tables if name.endswith("engram.embedding.weight")] == list(tables)
    assert len(tables) == 2
    assert inspect(engram_artifact)["host_tables"] == tables
    shown = subprocess.run(
        [Path(sys.executable).with_name("v4c"), "inspect", engram_artifact], capture_output=True, text=True, check=True
    ).stdout
    assert re.search(rf"of these in host memory.*\n(.*\n)*.*{re.escape(min(tables))}", shown)


def test_too_little_host_memory(engram_artifact: Path) -> None:
    tables = {w.name: w.nbytes for w in read_manifest(engram_artifact).weights if w.on_host}
    name, nbytes = next(iter(tables.items()))
    found = report("side_stream_run", engram_artifact, "load", V4C_SIM_HOST_BYTES=str(nbytes - 1))["error"]
    assert found.startswith(f"InputError: {name}: expected {nbytes} bytes of host memory for this table, found: ")
    assert "\n" not in found
