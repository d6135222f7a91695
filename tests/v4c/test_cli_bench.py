"""``v4c bench`` as a user runs it: tables, one JSON document, a trace, and everything a user can get wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.v4c.cli_harness import assert_one_line, invoke, shell

FEW = ("--rounds", "2", "--prompt-tokens", "16")


def test_tables(tiny_artifact: Path) -> None:
    result = shell(["bench", tiny_artifact, "--context", "20", "--context", "40", *FEW])
    assert (result.returncode, result.stderr) == (0, "")
    assert "GB/s" in result.stdout
    assert "GFLOP/s" in result.stdout
    lines = result.stdout.splitlines()
    decode, prefill = lines.index("decode"), lines.index("prefill")
    assert lines[decode + 1].split()[:4] == ["context", "ms", "p10", "p90"]
    assert [line.split()[0] for line in lines[decode + 2 : decode + 4]] == ["20", "40"]
    assert lines[prefill + 2].split()[0] == "16"
    assert "between kernels" not in result.stdout


def test_profile_and_trace(tiny_artifact: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    result = invoke("bench", tiny_artifact, "--context", "20", *FEW, "--profile", "--trace", trace)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("between kernels") == 2
    assert "decode, context 20: " in result.stdout
    assert "prefill, tokens 16: " in result.stdout
    assert "could be won" in result.stdout
    assert json.loads(trace.read_text())["traceEvents"]


def test_json_is_one_document(tiny_artifact: Path) -> None:
    options = ["--context", "20", "--rounds", "30", "--prompt-tokens", "16", "--threads", "1", "--profile", "--json"]
    result = shell(["bench", tiny_artifact, *options])
    assert (result.returncode, result.stderr) == (0, "")
    document = json.loads(result.stdout)
    assert list(document) == [
        "machine", "threads", "huge_pages", "stream_bandwidth_gbs", "matrix_peak_gflops", "decode", "prefill", "profile"
    ]  # fmt: skip
    assert document["threads"] == 1
    assert {"context", "ms", "tokens_per_second", "bytes_read", "bandwidth_share"} <= document["decode"][0].keys()
    assert {"tokens", "ms", "tokens_per_second"} <= document["prefill"][0].keys()
    for part in (*document["profile"]["decode"], *document["profile"]["prefill"]):
        assert sum(row["ms"] for row in part["rows"]) == pytest.approx(part["step_ms"], rel=0.05)
    assert document["profile"]["decode"][0]["rows"][0].keys() == {
        "kernel", "op", "calls", "ms", "share", "bytes", "flops", "bandwidth_share", "peak_share", "limit",
        "winnable_ms",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--context", "0"], "context: expected an integer from 1 to 4096"),
        (["--context", "5000"], "5000"),
        (["--prompt-tokens", "5000"], "prompt_tokens"),
        (["--rounds", "0"], "rounds"),
        (["--threads", "0"], "threads"),
        (["--trace", "t.json"], "--profile"),
        (["--profile", "--trace", "no/such/t.json"], "existing folder"),
        (["--context", "many"], "--context"),
    ],
)
def test_refusals_are_one_line(options: list[str], fragment: str, tiny_artifact: Path) -> None:
    assert_one_line(invoke("bench", tiny_artifact, *options), fragment)


def test_no_artifact(tmp_path: Path) -> None:
    assert_one_line(invoke("bench", tmp_path), str(tmp_path), "manifest.json")
