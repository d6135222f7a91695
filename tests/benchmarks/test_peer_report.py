"""Tables and the chart of results that were written down here, and the command that prints them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("gguf", reason="the extra `bench` is not installed: no gguf")
pytest.importorskip("psutil", reason="the extra `bench` is not installed: no psutil")
pytest.importorskip("matplotlib", reason="the extra `bench` is not installed: no matplotlib")

from benchmarks.peers import main


def _peer(name: str, storage: str, decode: dict[int, float], prefill: dict[int, float], agrees: bool) -> dict[str, Any]:
    def times(ms: float) -> dict[str, Any]:
        turn = {
            "samples_ms": [ms], "bandwidth": 26e9, "peak": 250e9, "measured_by": "v4c-bf16", "seconds_before": 0.1
        }  # fmt: skip
        return {"ms": ms, "p10_ms": ms - 1, "p90_ms": ms + 2, "turns": [turn]}

    return {
        "name": name, "engine": name.partition("-")[0], "storage": storage, "version": "1",
        "decode": [{"context": n, "bytes_read": 1e8, "bandwidth_share": 0.5} | times(ms) for n, ms in decode.items()],
        "prefill": [
            {"start": n, "tokens": 512, "flops": 1e9, "peak_share": 0.25} | times(ms) for n, ms in prefill.items()
        ],
        "agreement": [{
            "context": 1024, "max_abs_diff": 0.5, "relative_difference": 0.021, "argmax_agreement": 1.0, "tokens": 9,
            "tolerance": 0.02, "agrees": agrees,
        }],
    }  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A run of three peers; one has no long context, and one was left out."""
    document = {
        "model": "v4-mini", "parameters": 186_500_000, "active_parameters": 88_000_000, "machine": "a CPU, 2 CPUs",
        "threads": 2, "rounds": 5, "steps": 8, "in_turns": True, "huge_pages": False, "chunk": 512,
        "longest_fill": 16384,
        "stream_bandwidth_gbs": 26.0, "lowest_stream_bandwidth_gbs": 21.0,
        "matrix_peak_gflops": 250.0, "lowest_matrix_peak_gflops": 199.0,
        "limits": [
            {"bandwidth": 26e9, "peak": 250e9, "measured_by": "v4c-bf16"},
            {"bandwidth": 21e9, "peak": 199e9, "measured_by": "v4c-bf16"},
        ],
        "kernel_costs": {},
        "peers": [
            _peer("v4c-bf16", "bf16", {1024: 10.0, 16384: 12.0}, {0: 500.0, 15872: 600.0}, True),
            _peer("llama-bf16", "bf16", {1024: 25.0, 16384: 72.0}, {0: 1500.0, 15872: 6600.0}, False),
            _peer("transformers-bf16", "bf16", {1024: 70.0}, {0: 1000.0}, True),
        ],
        "left_out": [{"name": "onnxruntime-f32", "reason": "expected 53 GB of memory to use, found 18"}],
    }  # fmt: skip
    path = tmp_path / "results.json"
    path.write_text(json.dumps(document))
    return path


def _run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_markdown(results: Path) -> None:
    """Every table is whole, and every figure stands in its column."""
    result = _run("--from", results, "--markdown")
    assert result.exit_code == 0, result.output
    text = result.stdout
    assert "bandwidth varied between 21.0 and 26.0 GB/s, and the float32 peak between 199 and 250 GFLOP/s" in text
    assert "(2 counts)" in text
    assert "Shares are of what was read and multiplied beside each turn, medians over the turns;" in text
    assert "ratios between peers are of medians over rounds in turns" in text
    assert "all processes alive, in turns" in text
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert ["llama-bf16", "25.00 (24.00-27.00)", "72.00 (71.00-74.00)", "50%", "50%"] in rows
    assert ["transformers-bf16", "70.00 (69.00-72.00)", "-", "50%", "-"] in rows
    assert ["llama-bf16", "1500 (1499-1502)", "25%", "6600 (6599-6602)", "4.40x"] in rows
    assert ["v4c-bf16 against llama-bf16", "2.50x", "6.00x", "3.00x"] in rows
    assert ["v4c-bf16 against transformers-bf16", "7.00x", "-", "2.00x"] in rows
    assert "- llama-bf16 DOES NOT AGREE with v4c-bf16 behind 1024 tokens: logits differ by 2.10%" in text
    assert "- transformers-bf16 agrees with" in text
    assert "- Left out: onnxruntime-f32: expected 53 GB of memory to use, found 18" in text
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    assert all(len({line.count("|") for line in table.splitlines()}) == 1 for table in tables)


def test_terminal(results: Path) -> None:
    result = _run("--from", results)
    assert result.exit_code == 0, result.output
    line = next(line for line in result.stdout.splitlines() if line.startswith("llama-bf16 "))
    assert line.split() == ["llama-bf16", "25.00", "(24.00-27.00)", "72.00", "(71.00-74.00)", "50%", "50%"]


def test_whole_rounds_are_said(results: Path) -> None:
    results.write_text(json.dumps(json.loads(results.read_text()) | {"in_turns": False}))
    assert "one peer after another, whole rounds in turns" in _run("--from", results).stdout


def test_huge_pages_are_said(results: Path) -> None:
    assert "2 threads for every peer." in _run("--from", results).stdout
    results.write_text(json.dumps(json.loads(results.read_text()) | {"huge_pages": True}))
    assert "2 threads for every peer; v4c's weights copied into huge pages." in _run("--from", results).stdout


def test_limits_from_long_before_are_said(results: Path) -> None:
    assert "before)" not in _run("--from", results).stdout
    document = json.loads(results.read_text())
    document["peers"][1]["decode"][0]["turns"][0]["seconds_before"] = 61.2
    results.write_text(json.dumps(document))
    assert "beside each turn (of peers without v4c beside them: up to 61 s before)" in _run("--from", results).stdout


def test_chart_and_json(results: Path, tmp_path: Path) -> None:
    chart, copy = tmp_path / "chart.png", tmp_path / "copy.json"
    result = _run("--from", results, "--chart", chart, "--json", copy)
    assert result.exit_code == 0, result.output
    from PIL import Image

    with Image.open(chart) as image:
        assert image.format == "PNG"
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 3  # bars of three engines on white
    assert json.loads(copy.read_text()) == json.loads(results.read_text())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["chart.png", "copy.json", "results.json"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--peers", "v4c-bf16,llama-q3"], 1, "--peers: expected some of v4c-f32"),
        (["--contexts", "1024,x"], 2, "expected positive integers with commas between, found '1024,x'"),
        (["--contexts", "0"], 2, "expected positive integers with commas between, found '0'"),
        (["--contexts", "2000000"], 1, "--contexts: expected at most"),
        (["--chart", "no-such-folder/chart.png"], 1, "expected a file name in an existing folder"),
    ],
)
def test_bad_arguments(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    result = _run("--work", tmp_path / "work", *arguments)
    assert result.exit_code == code
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"peers": []}', '{"peers": [{}]}', '{"peers": [{"decode": [{"samples_ms": [1]}], "prefill": []}]}'],
)
def test_results_that_are_none(content: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    result = _run("--from", path)
    assert result.exit_code == 1
    assert "expected results of this benchmark, found" in result.output
