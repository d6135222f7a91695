"""The examples run as a reader would run them; the artifact that one compiles serves the other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_example(name: str, *arguments: str | Path, cwd: Path) -> str:
    """Run one example in a process of its own, in an empty folder; its stdout."""
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that compile_and_run.py writes, and what it printed."""
    folder = tmp_path_factory.mktemp("compiled")
    return folder / "nano.v4c", run_example("compile_and_run.py", "nano.v4c", cwd=folder)


def test_export_onnx(tmp_path: Path) -> None:
    printed = run_example("export_onnx.py", cwd=tmp_path)
    assert (tmp_path / "nano.onnx").is_file()
    assert (tmp_path / "nano.onnx.data").is_file()
    (tokens,) = (line for line in printed.splitlines() if line.startswith("tokens"))
    assert tokens.partition("]")[0].count(",") == 10  # 6 of the prompt and 5 decoded
    assert "If the value is not given" in tokens


def test_compile_and_run(compiled: tuple[Path, str]) -> None:
    folder, printed = compiled
    assert (folder / "manifest.json").is_file()
    assert "positions [301] [301]" in printed
    assert printed.count("largest difference") == 2
    assert "generated" in printed


def test_compile_and_run_uses_what_is_there(compiled: tuple[Path, str]) -> None:
    folder, printed = compiled
    written = (folder / "manifest.json").stat().st_mtime_ns
    again = run_example("compile_and_run.py", folder, cwd=folder.parent)
    assert again.splitlines()[-1] == printed.splitlines()[-1]  # the tokens; differences vary with rounding
    assert (folder / "manifest.json").stat().st_mtime_ns == written


def test_embed_in_app(compiled: tuple[Path, str]) -> None:
    folder, _ = compiled
    printed = run_example("embed_in_app.py", folder, cwd=folder.parent)
    assert printed.count(" -> ") == 3
    assert "The otter likes plum. The otter likes -> ' plum" in printed


@pytest.mark.slow
def test_long_context(tmp_path: Path) -> None:
    printed = run_example("long_context.py", cwd=tmp_path)
    grown, full = (int(part.split(" MiB")[0].split()[-1]) for part in printed.split("memory grew")[1].split(";")[:2])
    assert grown < full / 4
    assert printed.count("question") == 2
    assert printed.splitlines()[-1] == "the restored session gave the same tokens"


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("add_custom_op.py", "largest logit"),
        ("add_pass.py", "what the clamps change"),
        pytest.param("add_target.py", "cpu:portable, features []", marks=pytest.mark.slow),
        pytest.param("tune.py", "grouped_linear", marks=pytest.mark.slow),
    ],
)
def test_extensions_and_tuning(name: str, line: str, tmp_path: Path) -> None:
    printed = run_example(name, cwd=tmp_path)
    assert line in printed
    assert "difference" in printed or "against torch" in printed
    (artifact,) = tmp_path.glob("*.v4c")
    assert (artifact / "manifest.json").is_file()


TESTED = {
    "add_custom_op.py",
    "add_pass.py",
    "add_target.py",
    "compile_and_run.py",
    "embed_in_app.py",
    "export_onnx.py",
    "long_context.py",
    "tune.py",
}


def test_every_example_is_run_and_short() -> None:
    scripts = sorted(EXAMPLES.glob("*.py"))
    assert {script.name for script in scripts} == TESTED
    for script in scripts:
        assert len(script.read_text().splitlines()) < 100
        assert script.read_text().startswith('"""Promise: ')
