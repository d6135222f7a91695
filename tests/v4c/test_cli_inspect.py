"""``v4c presets`` and ``v4c inspect``: their JSON, and tables that show the same figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.v4c.cli_harness import assert_one_line, invoke, shell
from v4c.cli.console import bytes_text, count_text
from v4c.frontend import estimate
from v4c.frontend.presets import PRESETS
from v4c.inspection import inspect


def test_presets_json_has_the_promised_keys() -> None:
    result = shell(["presets", "--json"])
    assert (result.returncode, result.stderr) == (0, "")
    rows = json.loads(result.stdout)
    assert [row["name"] for row in rows] == list(PRESETS)
    for row in rows:
        config = PRESETS[row["name"]]
        assert list(row) == ["name", "parameters", "active_parameters", "weight_bytes", "cache_bytes_per_token"]
        assert row["parameters"] == estimate.parameters(config)
        assert row["active_parameters"] == estimate.active_parameters(config)
        assert row["weight_bytes"] == estimate.weight_bytes(config)
        assert row["cache_bytes_per_token"] == estimate.cache_bytes_per_token(config)
        assert list(row["cache_bytes_per_token"]) == ["f32", "bf16", "fp8"]


def test_presets_table() -> None:
    lines = invoke("presets").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["name", *PRESETS]
    flash = next(line for line in lines if line.startswith("v4-flash "))
    assert "284.3 G" in flash
    assert "13.27 G" in flash
    assert "3.432 KiB" in flash


@pytest.mark.parametrize("kind", ["checkpoint", "onnx", "artifact"])
def test_inspect_prints_json_and_tables(kind: str, tiny_checkpoint: Path, tiny_onnx: Path, tiny_artifact: Path) -> None:
    path = {"checkpoint": tiny_checkpoint, "onnx": tiny_onnx, "artifact": tiny_artifact}[kind]
    as_json = invoke("inspect", path, "--json")
    assert (as_json.exit_code, as_json.stderr) == (0, "")
    description = inspect(path)
    assert json.loads(as_json.stdout) == description

    table = invoke("inspect", path)
    assert (table.exit_code, table.stderr) == (0, "")
    lines = table.stdout.splitlines()
    assert lines[0] == f"{kind} {path}"
    flops = description["costs"]["flops_per_token"]["1048576"]
    cache = description["costs"]["cache_bytes"]["fp8"]["131072"]
    assert any(line.startswith("1M ") and count_text(flops) in line for line in lines)
    assert any(line.startswith("128k ") and line.endswith(bytes_text(cache)) for line in lines)
    sizes = description["weights" if kind == "onnx" else "bytes_by_dtype"]
    for dtype, size in (sizes["bytes_by_dtype"] if kind == "onnx" else sizes).items():
        assert any(line.split() == [dtype, *bytes_text(size).split()] for line in lines)
    if kind == "onnx":
        assert any(line.split() == ["KVCompress", "3", "3"] for line in lines)


def test_inspect_reports_problems_on_stderr(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_checkpoint / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")  # a file without tensors
    result = invoke("inspect", tmp_path)
    assert result.exit_code == 0
    assert result.stderr.startswith("problem: ")
    assert "model.embed_tokens.weight" in result.stderr
    assert json.loads(invoke("inspect", tmp_path, "--json").stdout)["problem"] in result.stderr


def test_inspect_refuses(tmp_path: Path) -> None:
    assert_one_line(invoke("inspect", tmp_path / "none"), str(tmp_path / "none"), "nothing")
    (tmp_path / "m.onnx").write_text("text")
    assert_one_line(invoke("inspect", tmp_path / "m.onnx", "--json"), str(tmp_path / "m.onnx"), "ONNX")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (584, "584 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (3 * 2**30, "3 GiB"), (5000 * 2**40, "5,000 TiB")],
)
def test_bytes_text(value: int, text: str) -> None:
    assert bytes_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999, "999"), (1000, "1 k"), (284332240471, "284.3 G"), (1572997201763, "1.573 T")]
)
def test_count_text(value: int, text: str) -> None:
    assert count_text(value) == text
