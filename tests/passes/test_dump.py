"""``--dump-ir`` and ``v4c inspect`` on its folder: what each pass left, counted here again from the text."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
from pathlib import Path

import pytest

import v4c
from tests.conftest import V4C
from v4c.errors import InputError, OutputError
from v4c.frontend.config import ModelConfig
from v4c.frontend.onnx_export import build
from v4c.passes.dump import Dump
from v4c.passes.pipeline import ONNX_PASSES, PHASES, PassOptions, run_onnx_passes
from v4c.passes.summary import SUMMARY, read_summary


@pytest.fixture(scope="module")
def dump(tiny_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a compilation without weights, one pass switched off."""
    folder = tmp_path_factory.mktemp("dump")
    subprocess.run(
        [V4C, "compile", "-m", save_config(tiny_config, folder), "--no-weights", "-o", folder / "a.v4c", "--dump-ir",
         folder / "ir", "--disable-pass", "merge-projections"],
        check=True,
    )  # fmt: skip
    return folder / "ir"


def save_config(config: ModelConfig, folder: Path) -> Path:
    from v4c.frontend.initialise import initialise

    initialise(config, folder / "checkpoint")
    return folder / "checkpoint"


def test_a_file_per_pass_and_a_summary(dump: Path) -> None:
    stages = [s["stage"] for s in read_summary(dump)["stages"]]
    onnx = ["export", *(p.pass_name for p in ONNX_PASSES if p.pass_name != "merge-projections")]
    relax = ["import", *(p.name for p in PHASES)]
    expected = [f"onnx-{i:02d}-{n}" for i, n in enumerate(onnx)] + [f"relax-{i:02d}-{n}" for i, n in enumerate(relax)]
    assert stages == expected
    files = {f"{s}.txt" if s.startswith("onnx") else f"{s}.py" for s in stages} | {SUMMARY}
    assert {p.name for p in dump.iterdir()} == files


def test_launches_are_the_kernel_calls_in_the_text(dump: Path) -> None:
    """Counted again from the printed module whose memory is planned, where every kernel call is one line."""
    stage = next(s for s in read_summary(dump)["stages"] if s["stage"].endswith("plan-memory"))
    text = (dump / f"{stage['stage']}.py").read_text()
    counted = {}
    for body in re.split(r"\n    @R\.function", text):
        name = re.search(r"def (decode_one\w*)\(", body)
        if name:
            calls = re.findall(r"^\s+(?:_\S* = |\w+: .* = )?cls\.(\w+)\(", body, re.MULTILINE)
            counted[name[1]] = len([c for c in calls if not c.startswith("decode_one")])
    assert counted == stage["launches_by_function"]
    layers = {n: v for n, v in counted.items() if n.endswith("Layer")}
    calls_of = {n: len(re.findall(rf"cls\.{n}\(", text)) for n in counted if n != "decode_one"}
    assert stage["launches"] == counted["decode_one"] + sum(counted[n] * calls_of[n] for n in calls_of)
    assert len(layers) == 3


def test_passes_lower_launches_and_never_raise_what_is_computed(dump: Path) -> None:
    stages = read_summary(dump)["stages"]
    onnx = [s for s in stages if s["stage"].startswith("onnx")]
    assert all(b["launches"] <= a["launches"] for a, b in itertools.pairwise(onnx))
    assert onnx[-1]["launches"] < 0.7 * onnx[0]["launches"]
    assert all(s["flops"] <= onnx[0]["flops"] * 1.001 for s in onnx)
    assert all(s["bytes"] > 0 and s["nodes"] > 0 for s in stages)


def test_inspect_reads_the_folder(dump: Path) -> None:
    described = v4c.inspect(dump)
    assert described["kind"] == "dump"
    assert described["problem"] is None
    assert described["stages"] == json.loads((dump / SUMMARY).read_text())["stages"]
    shown = subprocess.run([V4C, "inspect", dump], check=True, capture_output=True, text=True).stdout
    for stage in described["stages"]:
        (line,) = (x for x in shown.splitlines() if x.split()[:1] == [stage["stage"]])
        assert line.split()[1:3] == [str(stage["nodes"]), str(stage["launches"])]
    assert "decode_one_CSATopKLayer" in shown


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"context": 4096, "stages": [{"stage": "x"}]}'])
def test_a_damaged_summary_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / SUMMARY).write_text(text)
    with pytest.raises(InputError, match=r"summary.json: expected the summary of a --dump-ir folder, found .+"):
        v4c.inspect(tmp_path)


def test_a_folder_that_cannot_be_written_is_one_line(tiny_config: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="expected to write it"):
        run_onnx_passes(build(tiny_config), PassOptions.checked([], Dump(tmp_path / "file")))
