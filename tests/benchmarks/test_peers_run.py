"""The benchmark as a user runs it, on a small model, twice: the second time the checkpoint is there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("gguf", reason="the extra `bench` is not installed: no gguf")
pytest.importorskip("psutil", reason="the extra `bench` is not installed: no psutil")
pytest.importorskip("matplotlib", reason="the extra `bench` is not installed: no matplotlib")

ROOT = Path(__file__).parents[2]


def _run(work: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.peers", "--model", "v4-nano", "--work", work, *arguments]
    return subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, timeout=1800)


@pytest.mark.slow
def test_a_run_and_a_second_one(tmp_path: Path) -> None:
    results, chart = tmp_path / "results.json", tmp_path / "chart.png"
    few = ("--rounds", "2", "--steps", "2", "--contexts", "1024,20000")
    peers = "v4c-bf16,transformers-f32,onnxruntime-f32,llama-q8_0"
    first = _run(tmp_path / "work", *few, "--peers", peers, "--json", results, "--chart", chart)
    assert first.returncode == 0, first.stderr
    document = json.loads(results.read_text())
    names = [peer["name"] for peer in document["peers"]]
    assert names == ["v4c-bf16", "transformers-f32", "onnxruntime-f32"]
    assert [entry["name"] for entry in document["left_out"]] == ["llama-q8_0"]
    assert "index_head_dim in multiples of 64, found 32" in first.stdout
    for peer in document["peers"]:
        assert all(entry["agrees"] for entry in peer["agreement"]), peer["agreement"]
        assert peer["agreement"], peer["name"]
        assert all(entry["ms"] > 0 for entry in peer["decode"])
        for entry in (*peer["decode"], peer["prefill"][0]):
            assert len(entry["turns"]) == 2
            assert all(turn["bandwidth"] > 0 and turn["seconds_before"] < 60 for turn in entry["turns"])
        assert all(len(turn["samples_ms"]) == 2 for entry in peer["decode"] for turn in entry["turns"])
    assert [entry["context"] for entry in document["peers"][0]["decode"]] == [1024, 20000]
    assert [entry["context"] for entry in document["peers"][1]["decode"]] == [1024]
    assert document["stream_bandwidth_gbs"] >= document["lowest_stream_bandwidth_gbs"] > 0
    assert chart.read_bytes().startswith(b"\x89PNG")

    weights = tmp_path / "work" / "v4-nano" / "checkpoint" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    second = _run(tmp_path / "work", *few, "--peers", "v4c-bf16", "--markdown")
    assert second.returncode == 0, second.stderr
    assert weights.stat().st_mtime_ns == before
    assert "| v4c-bf16 |" in second.stdout
