"""The tiny model as an ONNX file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.v4c.cli_harness import shell


@pytest.fixture(scope="session")
def tiny_onnx(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_checkpoint` exported by the command, in bfloat16."""
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    result = shell(["export", "-m", tiny_checkpoint, "--dtype", "bf16", "-o", path])
    assert (result.returncode, result.stdout, result.stderr) == (0, "", f"wrote {path}\n")
    return path
