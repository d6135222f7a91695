"""``v4c init``, ``export`` and ``compile``: what they write, and that they write nothing when they fail."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.v4c.cli_harness import V4C, assert_one_line, invoke, shell
from v4c.frontend.config import ModelConfig
from v4c.frontend.names import tensor_specs
from v4c.frontend.presets import preset


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_init_writes_a_checkpoint(tmp_path: Path) -> None:
    result = shell(["init", "--preset", "v4-nano", "-o", "nano"], cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "wrote nano\n")
    assert ModelConfig.from_file(tmp_path / "nano") == preset("v4-nano")


def test_init_seed_and_dtype(tmp_path: Path) -> None:
    for name, options in {
        "a": ["--seed", "3"],
        "b": ["--seed", "3"],
        "c": ["--seed", "4"],
        "d": ["--dtype", "bf16"],
    }.items():
        assert invoke("init", "--preset", "v4-nano", *options, "-o", tmp_path / name).exit_code == 0
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")
    assert weights_of(tmp_path / "a") != weights_of(tmp_path / "c")
    assert ModelConfig.from_file(tmp_path / "d").dtype == "bfloat16"
    assert len(weights_of(tmp_path / "d")) < 0.6 * len(weights_of(tmp_path / "a"))


def test_init_refuses(tmp_path: Path) -> None:
    assert_one_line(invoke("init", "--preset", "v5", "-o", tmp_path / "x"), "v4-nano", "'v5'")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert_one_line(invoke("init", "--preset", "v4-nano", "-o", tmp_path / "full"), "full", "empty")
    assert_one_line(invoke("init", "--preset", "v4-nano", "-o", tmp_path / "no" / "where"), "parent")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["full", "full/notes.txt"]


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    # A limit on file sizes fails a write in the middle, as a full disk does.
    limit = 1 << 20
    result = shell(
        ["init", "--preset", "v4-nano", "-o", tmp_path / "nano"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"v4c: error: {tmp_path / 'nano'}: ")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the API was called with; it does nothing."""
    made: list[tuple[Any, ...]] = []

    def record(source: Any, path: Path, *, progress: Any, **options: Any) -> dict[str, Any]:
        progress("step", 1, 2)
        made.append((source, path, options))
        return {"target": "cpu"}

    monkeypatch.setattr("v4c.api.export", record)
    monkeypatch.setattr("v4c.api.compile", record)
    return made


def test_export_options_reach_the_api(calls: list[tuple[Any, ...]]) -> None:
    assert invoke("export", "-m", "ckpt", "-o", "x.onnx").exit_code == 0
    assert invoke("export", "--preset", "v4-nano", "--no-weights", "--format", "mlir", "--dtype", "f16", "--all-logits",
                  "--mtp", "--dry-run", "-o", "y").exit_code == 0  # fmt: skip
    plain = {"format": "onnx", "dtype": "f32", "weights": True, "all_logits": False, "mtp": False, "dry_run": False}
    given = {"format": "mlir", "dtype": "f16", "weights": False, "all_logits": True, "mtp": True, "dry_run": True}
    assert calls == [(Path("ckpt"), Path("x.onnx"), plain), (preset("v4-nano"), Path("y"), given)]


def test_compile_options_reach_the_api(calls: list[tuple[Any, ...]]) -> None:
    assert invoke("compile", "-m", "m.onnx", "-o", "x").exit_code == 0
    result = invoke("compile", "--preset", "v4-mini", "--no-weights", "--target", "cuda:sm_90a", "--dtype", "bf16",
                    "--quant", "int4", "--kv", "fp8", "--activations", "bf16", "--disable-pass", "a",
                    "--disable-pass", "b", "--dump-ir", "ir", "--tuning", "db.json",
                    "--no-mtp", "--strict", "--dry-run", "-o", "y")  # fmt: skip
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {"target": "cpu"}
    defaults = {"target": "cpu", "dtype": "f32", "quant": "none", "kv": "f32", "activations": "f32",
                "weights": True, "disable_passes": (), "dump_ir": None, "tuning": None,
                "mtp": True, "strict": False, "dry_run": False}  # fmt: skip
    given = {"target": "cuda:sm_90a", "dtype": "bf16", "quant": "int4", "kv": "fp8",
             "activations": "bf16", "weights": False, "disable_passes": ("a", "b"), "dump_ir": Path("ir"),
             "tuning": Path("db.json"),
             "mtp": False, "strict": True, "dry_run": True}  # fmt: skip
    assert calls == [(Path("m.onnx"), Path("x"), defaults), (preset("v4-mini"), Path("y"), given)]


def test_dry_run_prints_a_plan_and_writes_nothing(tiny_onnx: Path, tiny_config: ModelConfig, tmp_path: Path) -> None:
    result = invoke("compile", "-m", tiny_onnx, "--dry-run", "-o", tmp_path / "x")
    assert (result.exit_code, result.stderr) == (0, "")
    plan = json.loads(result.stdout)
    assert plan["target"].startswith("cpu")
    assert plan["tensors"] < len(tensor_specs(tiny_config))  # some are joined
    assert list(tmp_path.iterdir()) == []


def test_verbose_prints_steps_on_stderr(calls: list[tuple[Any, ...]]) -> None:
    result = invoke("compile", "-m", "ckpt", "--verbose", "-o", "x")
    assert (result.stdout, result.stderr) == ("", "step\nwrote x\n")
    assert invoke("compile", "-m", "ckpt", "-o", "x").stderr == "wrote x\n"


def edit_config(edit: Callable[[str], str]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(edit(path.read_text()))

    return change


def truncate_shard(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1000)


BAD_CHECKPOINTS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "missing": (shutil.rmtree, ("checkpoint folder",)),
    "truncated": (truncate_shard, ("model.safetensors", "truncated")),
    "nan": (edit_config(lambda text: text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": NaN')), ("NaN",)),
    "duplicate": (edit_config(lambda text: '{"head_dim": 64,' + text.lstrip()[1:]), ("head_dim", "twice")),
    "v4.1": (
        edit_config(lambda text: text.replace("DeepseekV4ForCausalLM", "DeepseekV41ForCausalLM")),
        ("DeepSeek-V4.1",),
    ),
    "no shards": (lambda folder: (folder / "model.safetensors").unlink(), ("model.safetensors",)),
}


@pytest.mark.parametrize("command", ["export", "compile", "inspect"])
@pytest.mark.parametrize("damage", BAD_CHECKPOINTS)
def test_bad_checkpoints_are_one_line(damage: str, command: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in" / "ckpt"
    shutil.copytree(tiny_checkpoint, folder)
    change, fragments = BAD_CHECKPOINTS[damage]
    change(folder)
    (tmp_path / "out").mkdir()
    arguments = [folder] if command == "inspect" else ["-m", folder, "-o", tmp_path / "out" / "x"]
    expected = ("nothing",) if (damage, command) == ("missing", "inspect") else fragments
    assert_one_line(invoke(command, *arguments), str(folder), *expected)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--target", "tpu"], ("'tpu'", "cpu")),
        (["--target", "cpu:x86-64-v9"], ("x86-64-v9",)),
        (["--disable-pass", "make_it_faster"], ("make_it_faster",)),
        (["--target", "ascend", "--quant", "native"], ("native",)),
        (["--target", "ascend", "--kv", "fp8"], ("fp8",)),
    ],
)
def test_compile_refuses_options(
    options: list[str], fragments: tuple[str, ...], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    assert_one_line(invoke("compile", "-m", tiny_checkpoint, *options, "-o", tmp_path / "x"), *fragments)
    assert list(tmp_path.iterdir()) == []


def test_compile_refuses_a_taken_destination(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "notes.txt").write_text("mine")
    assert_one_line(invoke("compile", "-m", tiny_checkpoint, "-o", tmp_path / "x"), str(tmp_path / "x"))
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["x", "x/notes.txt"]


@pytest.mark.parametrize("content", [None, b"", b"no protobuf at all"])
def test_compile_refuses_bad_onnx(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "m.onnx"
    if content is not None:
        file.write_bytes(content)
    assert_one_line(invoke("compile", "-m", file, "-o", tmp_path / "x"), str(file))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("number", "code", "message"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_interrupted_compilation_leaves_nothing(
    number: signal.Signals, code: int, message: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    scratch.mkdir()
    out.mkdir()
    process = subprocess.Popen(
        [V4C, "compile", "-m", tiny_checkpoint, "--verbose", "-o", out / "tiny.v4c"],
        env={**os.environ, "TMPDIR": str(scratch), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "torch")},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("trace")
    assert len(list(out.iterdir())) == 1  # the folder that becomes the artifact
    time.sleep(0.5)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert errors.splitlines()[-1] == f"v4c: error: {message}"
    assert "Traceback" not in errors
    assert list(out.iterdir()) == []
    assert list(scratch.iterdir()) == []
