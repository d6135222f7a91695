"""The command line itself: help, exit codes, one line per error, and what is not imported."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.v4c.cli_harness import V4C, assert_one_line, invoke, shell
from v4c.cli.console import Progress
from v4c.frontend import presets

COMMANDS = ("presets", "init", "export", "compile", "run", "verify", "bench", "inspect", "tune")


def test_version_and_help_as_a_process() -> None:
    version = shell(["--version"])
    assert (version.returncode, version.stderr) == (0, "")
    assert version.stdout.startswith("v4c 0.")
    short, long = shell(["-h"]), shell(["--help"])
    assert short.returncode == long.returncode == 0
    assert short.stdout == long.stdout
    assert all(f"  {command} " in short.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = invoke(command, "-h")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: v4c {command}")
    assert "--debug" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ([], "Missing command"),
        (["train"], "No such command 'train'"),
        (["presets", "--wrong"], "--wrong"),
        (["presets", "extra"], "extra"),
        (["init", "-o", "x"], "--preset"),
        (["init", "--preset", "v4-nano"], "-o"),
        (["init", "--preset", "v4-nano", "--seed", "-1", "-o", "x"], "--seed"),
        (["init", "--preset", "v4-nano", "--dtype", "f64", "-o", "x"], "--dtype"),
        (["export", "-o", "x"], "one of -m and --preset"),
        (["export", "-m", "x", "--preset", "v4-nano", "-o", "y"], "one of -m and --preset"),
        (["export", "-m", "x", "--format", "gguf", "-o", "y"], "--format"),
        (["compile", "--preset", "v4-nano", "--quant", "int3", "-o", "y"], "--quant"),
        (["run", "x"], "one of --prompt, --prompt-file and --tokens"),
        (["run", "x", "--prompt", "a", "--tokens", "1"], "one of --prompt, --prompt-file and --tokens"),
        (["run", "x", "--tokens", "1", "--temperature", "warm"], "--temperature"),
        (["verify", "x"], "-m"),
        (["inspect"], "PATH"),
    ],
)
def test_bad_usage_is_one_line(arguments: list[str], fragment: str) -> None:
    assert_one_line(invoke(*arguments), fragment)


def test_usage_errors_point_to_the_help_of_their_command() -> None:
    assert "(see v4c export -h)" in invoke("export").stderr


def test_debug_adds_a_traceback_before_or_after_the_command(tmp_path: Path) -> None:
    path = str(tmp_path / "no")
    for arguments in (["--debug", "inspect", path], ["inspect", path, "--debug"]):
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith("Traceback (most recent call last)")
        assert result.stderr.splitlines()[-1].startswith("v4c: error: ")
    assert "Traceback" not in invoke("inspect", path).stderr


def test_unexpected_exceptions_name_their_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "PRESETS", {"broken": None})
    assert_one_line(invoke("presets"), "unexpected AttributeError", "--debug")
    assert "--debug for" not in invoke("presets", "--debug").stderr


def test_an_interrupt_is_remembered() -> None:
    def work(error: type[BaseException], calls: int) -> None:
        with Progress() as progress:
            # What Python and libraries do to a KeyboardInterrupt that arrives at a bad moment.
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                for _ in range(calls):
                    progress("step", 1, 2)
                raise error from None

    former = signal.getsignal(signal.SIGINT)
    for error, calls in ((ValueError, 0), (ValueError, 1), (KeyboardInterrupt, 0)):
        with pytest.raises(KeyboardInterrupt):
            work(error, calls)
    assert signal.getsignal(signal.SIGINT) is former


def test_interrupt_in_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupting(dict):  # type: ignore[type-arg]
        def items(self) -> Any:
            raise KeyboardInterrupt

    monkeypatch.setattr(presets, "PRESETS", Interrupting())
    result = invoke("presets", "--json")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "v4c: error: interrupted\n")


def test_interrupted_process_leaves_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [str(V4C), "init", "--preset", "v4-mini", "-o", str(tmp_path / "mini")],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 30
    while not any(tmp_path.glob(".*/*.safetensors")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "v4c: error: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_goes_away_is_no_error() -> None:
    script = f"{V4C} presets --json | true; echo ${{PIPESTATUS[0]}}"
    # The writer may be done before the reader has gone.
    for _ in range(3):
        result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
        assert result.stdout.strip() in ("0", "141")
        assert result.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, Linux's device that is always full")
@pytest.mark.parametrize("argument", ["-h", "presets"])
def test_full_stdout_is_one_line(argument: str) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run([V4C, argument], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr.startswith("v4c: error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("patience", "terminal", "shown"), [(0.05, True, True), (60, True, False), (0.05, False, False)]
)
def test_progress_bar_appears_on_a_terminal_after_a_while(patience: float, terminal: bool, shown: bool) -> None:
    work = (
        "import time\nfrom v4c.cli import console\n"
        f"console._PATIENCE = {patience}\n"
        "with console.Progress() as progress:\n    progress('pack weights', 1, 4)\n    time.sleep(0.6)\n"
    )
    ours, theirs = pty.openpty() if terminal else os.pipe()
    subprocess.run(
        [sys.executable, "-c", work], stderr=theirs, check=True, timeout=60, env={**os.environ, "TERM": "xterm"}
    )
    os.close(theirs)
    output = b""
    with contextlib.suppress(OSError):  # how a terminal says that its other end is closed
        while piece := os.read(ours, 4096):
            output += piece
    os.close(ours)
    assert (b"pack weights" in output and b"25%" in output) == shown
    assert shown or output == b""


def test_closed_pipe_exits_with_141() -> None:
    process = subprocess.Popen([str(V4C), "presets"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 141


@pytest.mark.parametrize("arguments", [["-h"], ["--version"], ["presets"], ["run", "-h"], ["compile", "-h"]])
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    probe = (
        "import json, sys\nfrom v4c.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print(json.dumps([name for name in ('torch', 'tvm', 'onnx', 'onnxscript', 'tvm_ffi') if name in sys.modules]))"
    )
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == []
