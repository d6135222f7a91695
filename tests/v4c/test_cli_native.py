"""Published-format checkpoints from the command line: written, exported, planned, and refused when damaged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

import v4c
from tests.v4c.cli_harness import assert_one_line, invoke, shell
from v4c.cli import console
from v4c.frontend import onnx_export
from v4c.frontend.checkpoint import Checkpoint
from v4c.frontend.config import ModelConfig
from v4c.frontend.estimate import mtp_weight_bytes, weight_bytes
from v4c.frontend.initialise_native import initialise_native
from v4c.frontend.names import tensor_specs
from v4c.frontend.presets import preset
from v4c.onnx_source import OnnxSource
from v4c.targets.cpu.target import CPUTarget


@pytest.fixture(scope="module")
def native(tiny_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published-layout checkpoint of the tiny model; tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("native") / "tiny"
    initialise_native(tiny_config, folder, seed=3)
    return folder


@pytest.fixture(scope="module")
def sharded(tiny_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in several files."""
    folder = tmp_path_factory.mktemp("native") / "sharded"
    initialise_native(tiny_config, folder, seed=3, shard_bytes=1 << 17)
    return folder


@pytest.fixture(scope="module")
def proto(tiny_config: ModelConfig) -> Any:
    """The tiny model traced once, as a protobuf."""
    return ir.to_proto(onnx_export.build(tiny_config))


@pytest.fixture
def traced(proto: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No time is spent on tracing the same model again."""

    def build(config: ModelConfig, **_: Any) -> ir.Model:
        return ir.from_proto(proto)

    monkeypatch.setattr("v4c.frontend.onnx_export.build", build)
    monkeypatch.setattr("v4c.compiler.build", build)


def test_init_writes_the_published_formats(tmp_path: Path) -> None:
    result = shell(["init", "--preset", "v4-nano", "--seed", "2", "--format", "native", "-o", "nano"], cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "wrote nano\n")
    checkpoint = Checkpoint.open(tmp_path / "nano")
    checkpoint.check()
    assert checkpoint.source_dtype("model.layers.1.mlp.experts.gate_up_proj") == "fp4"
    assert checkpoint.source_dtype("model.layers.1.self_attn.q_a_proj.weight") == "fp8"
    description = json.loads(invoke("inspect", tmp_path / "nano", "--json").stdout)
    assert description["problem"] is None
    assert description["bytes"] == weight_bytes(preset("v4-nano"))
    assert set(description["bytes_by_dtype"]) == {"BF16", "F32", "F8_E4M3", "F8_E8M0", "I64", "I8"}
    same = invoke("init", "--preset", "v4-nano", "--seed", "2", "--format", "native", "-o", tmp_path / "again")
    assert same.exit_code == 0
    for file in (tmp_path / "nano").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_init_native_takes_no_dtype(tmp_path: Path) -> None:
    result = invoke("init", "--preset", "v4-nano", "--format", "native", "--dtype", "f32", "-o", tmp_path / "x")
    assert_one_line(result, "--dtype goes with --format hf")
    assert list(tmp_path.iterdir()) == []


def set_byte(name: str, place: tuple[int, ...], value: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name].view(torch.uint8)[place] = value
        save_file(tensors, folder / "model.safetensors")

    return change


def set_tensor(name: str, value: torch.Tensor) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        save_file(load_file(folder / "model.safetensors") | {name: value}, folder / "model.safetensors")

    return change


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1000)


def edit_header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return damage


def overlap(header: dict[str, Any]) -> None:
    first, second = sorted((e for e in header.values() if "shape" in e), key=lambda e: e["data_offsets"])[:2]
    width = second["data_offsets"][1] - second["data_offsets"][0]
    second["data_offsets"] = [first["data_offsets"][1] - 8, first["data_offsets"][1] - 8 + width]


def oversize(folder: Path) -> None:
    """A header that says it is as long as nothing can be."""
    file = folder / "model.safetensors"
    file.write_bytes((1 << 62).to_bytes(8, "little") + file.read_bytes()[8:])


TABLE = torch.zeros(320, 2, dtype=torch.int64)
TABLE[7, 1] = 8
E8 = torch.float8_e8m0fnu
DAMAGES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "truncated shard": (truncate, ("model.safetensors", "truncated")),
    "shape of scales": (
        set_tensor("layers.1.attn.wq_a.scale", torch.ones(2, 1).to(E8)),
        ("q_a_proj.weight", "expected shape [1, 1], found [2, 1]"),
    ),
    "NaN scale of FP8": (set_byte("layers.1.attn.wo_b.scale", (0, 0), 0xFF), ("layers.1.attn.wo_b.scale", "NaN")),
    "NaN scale of FP4": (
        set_byte("layers.2.ffn.experts.3.w2.scale", (5, 0), 0xFF),
        ("layers.2.ffn.experts.3.w2.scale", "NaN", "[5, 0]"),
    ),
    "ids out of range": (set_tensor("layers.0.ffn.gate.tid2eid", TABLE), ("tid2eid", "from 0 to 7, found 0 to 8")),
    "overlap": (edit_header(overlap), ("model.safetensors", "found an overlap")),
    "oversized header": (oversize, ("model.safetensors", f"found a length of {1 << 62}")),
}


def refused(command: str, folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Result:
    """What `command` says of the checkpoint; kernels, which take a minute, are not built."""

    def build(self: CPUTarget, module: Any, library: Path, options: Any) -> dict[str, list[Any]]:
        library.write_bytes(b"no code")
        return {}

    monkeypatch.setattr(CPUTarget, "build", build)
    out.mkdir()
    result = invoke(command, "-m", folder, "-o", out / "x")
    assert list(out.iterdir()) == []
    return result


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_line_and_nothing_written(
    damage: str, native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, traced: None
) -> None:
    """Export reads every tensor, and finds what only data can show."""
    shutil.copytree(native, tmp_path / "bad")
    change, fragments = DAMAGES[damage]
    change(tmp_path / "bad")
    result = refused("export", tmp_path / "bad", tmp_path / "out", monkeypatch)
    assert_one_line(result, str(tmp_path / "bad"), *fragments)


def test_damaged_data_leaves_no_artifact(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, traced: None
) -> None:
    """Found while weights are packed, when most of the artifact is on disk."""
    shutil.copytree(native, tmp_path / "bad")
    set_byte("layers.2.ffn.experts.7.w2.scale", (63, 0), 0xFF)(tmp_path / "bad")
    result = refused("compile", tmp_path / "bad", tmp_path / "out", monkeypatch)
    assert_one_line(result, "layers.2.ffn.experts.7.w2.scale", "NaN")


@pytest.mark.parametrize(
    ("shard", "found"),
    [
        ("../outside.safetensors", "outside it"),
        ("/etc/passwd.safetensors", "outside it"),
        ("model-00099-of-00099.safetensors", "found none"),
    ],
)
@pytest.mark.parametrize("command", ["export", "compile", "inspect"])
def test_an_index_that_points_elsewhere(command: str, shard: str, found: str, sharded: Path, tmp_path: Path) -> None:
    shutil.copytree(sharded, tmp_path / "in" / "bad")
    save_file({"norm.weight": torch.zeros(64)}, tmp_path / "in" / "outside.safetensors")
    index = tmp_path / "in" / "bad" / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["norm.weight"] = shard
    index.write_text(json.dumps(values))
    (tmp_path / "out").mkdir()
    arguments = [tmp_path / "in" / "bad"] if command == "inspect" else ["-m", tmp_path / "in" / "bad"]
    output = [] if command == "inspect" else ["-o", tmp_path / "out" / "x"]
    assert_one_line(invoke(command, *arguments, *output), "norm.weight", found)
    assert list((tmp_path / "out").iterdir()) == []


def test_export(native: Path, tmp_path: Path, traced: None) -> None:
    """The file holds the dequantised values."""
    assert invoke("export", "-m", native, "-o", tmp_path / "m.onnx").exit_code == 0
    source, checkpoint = OnnxSource(tmp_path / "m.onnx"), Checkpoint.open(native)
    for name in checkpoint.names():
        assert np.array_equal(source.load(name), checkpoint.load(name, "f32")), name


def test_export_dry_run(native: Path, tiny_onnx: Path, tiny_config: ModelConfig, tmp_path: Path) -> None:
    """`tiny_onnx` is the same model in bfloat16: as many bytes as announced."""
    result = invoke("export", "-m", native, "--dtype", "bf16", "--dry-run", "-o", tmp_path / "m.onnx")
    assert (result.exit_code, result.stderr, list(tmp_path.iterdir())) == (0, "", [])
    plan = json.loads(result.stdout)
    assert plan["tensors"] == len(tensor_specs(tiny_config))
    assert plan["weight_bytes"] == v4c.inspect(tiny_onnx)["weights"]["bytes"]
    assert plan["artifact_bytes"] == pytest.approx(tiny_onnx.with_name("tiny.onnx.data").stat().st_size, rel=0.03)
    assert plan["largest_tensor_bytes"] < plan["peak_memory_bytes"]
    assert set(plan["cache_bytes"]) == {"f32", "bf16", "fp8"}
    assert set(plan["flops_per_token"]) == {"4096", "131072", "1048576"}
    wide = json.loads(invoke("export", "-m", native, "--dry-run", "-o", tmp_path / "x").stdout)
    assert wide["weight_bytes"] == weight_bytes(tiny_config, "f32")
    without = invoke("export", "-m", native, "--no-weights", "--dry-run", "-o", tmp_path / "x")
    assert json.loads(without.stdout)["artifact_bytes"] == 0


def test_compile_dry_run(native: Path, tiny_artifact: Path, tmp_path: Path, traced: None) -> None:
    """`tiny_artifact` is of the same model: its weights' file is as large as announced."""
    result = invoke("compile", "-m", native, "--dry-run", "-o", tmp_path / "x")
    assert (result.exit_code, result.stderr, list(tmp_path.iterdir())) == (0, "", [])
    plan = json.loads(result.stdout)
    assert plan["artifact_bytes"] == (tiny_artifact / "weights-00001.safetensors").stat().st_size
    assert plan["weight_bytes"] < plan["artifact_bytes"] < plan["peak_memory_bytes"]
    costs = v4c.inspect(native)["costs"]
    assert (plan["flops_per_token"], plan["cache_bytes"]) == (costs["flops_per_token"], costs["cache_bytes"])


def test_inspect_preset() -> None:
    result = invoke("inspect", "--preset", "v4-flash", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    description = json.loads(result.stdout)
    assert (description["kind"], description["path"], description["problem"]) == ("preset", "v4-flash", None)
    flash = preset("v4-flash")
    assert description["tensors"] == 69187  # entries of the published index
    assert description["bytes"] == weight_bytes(flash) + mtp_weight_bytes(flash)
    assert description["bytes"] == sum(description["bytes_by_part"].values())
    assert "other" not in description["bytes_by_part"]
    assert description["weight_bytes"]["f32"] == weight_bytes(flash, "f32")
    assert description["peak_memory_bytes"] < 3 << 30
    assert description["costs"]["cache_bytes_per_token"]["fp8"] == 3514
    table = invoke("inspect", "--preset", "v4-pro").stdout
    for text in ("preset v4-pro", "MTP layers", "memory to pack", "10.5%", "26.8% (in FP8 equivalents)"):
        assert text in table


def test_inspect_takes_one_thing(native: Path) -> None:
    for arguments in ([], [native, "--preset", "v4-nano"]):
        assert_one_line(invoke("inspect", *arguments), "Expected one of PATH and --preset")
    assert_one_line(invoke("inspect", "--preset", "v5"), "v4-nano", "'v5'")


def test_progress_of_bytes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With --verbose: a line per step, and every ten seconds how far it is; steps are not taken for bytes."""
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    gibibyte = 1 << 30
    with console.Progress(verbose=True) as progress:
        for seconds, step in (
            (0, ("trace", 0, 5)),
            (60, ("trace", 3, 5)),
            (0, ("pack weights", 2 * gibibyte, 10 * gibibyte)),  # an earlier attempt got so far
            (4, ("pack weights", 3 * gibibyte, 10 * gibibyte)),
            (6, ("pack weights", 4 * gibibyte, 10 * gibibyte)),
            (9, ("pack weights", 5 * gibibyte, 10 * gibibyte)),
            (981, ("pack weights", 5 * gibibyte, 10 * gibibyte)),
            (9000, ("pack weights", 6 * gibibyte, 10 * gibibyte)),
        ):
            now[0] += seconds
            progress(*step)
    assert capsys.readouterr().err.splitlines() == [
        "trace",
        "pack weights",
        "pack weights: 4 GiB of 10 GiB, 0:30 left",
        "pack weights: 5 GiB of 10 GiB, 27:47 left",
        "pack weights: 6 GiB of 10 GiB, 2:46:40 left",
    ]
