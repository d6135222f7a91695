"""Calls of the command line, in this process or as one of its own, and what every refusal looks like."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from v4c.cli import main

V4C = Path(sys.executable).with_name("v4c")


def invoke(*arguments: str | Path) -> Result:
    """One call of the command line in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def assert_one_line(result: Result, *fragments: str) -> None:
    """Exit code 2, nothing on stdout, one line on stderr that contains the fragments."""
    assert result.exit_code == 2, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("v4c: error: ")
    assert result.stderr.count("\n") == 1
    for fragment in fragments:
        assert fragment in result.stderr


def shell(arguments: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
    """One call of the command line as a process of its own."""
    command = [str(V4C), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, **options)
