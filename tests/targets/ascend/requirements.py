"""What the tests of the Ascend target need beside Python packages; each mark's reason is the tool's own message."""

from __future__ import annotations

import pytest

from v4c.targets.ascend.toolchain import ToolMissing, find, tool

DEVICES = ("Ascend910B1", "Ascend950PR_9599")
"""One device of each architecture."""


def _missing_compiler() -> str:
    try:
        find()
    except ToolMissing as missing:
        return str(missing)
    return ""


def _missing_mlir() -> str:
    try:
        for name, package in (("mlir-opt", "mlir-19-tools"), ("opt", "llvm-19")):
            tool(name, package)
    except ToolMissing as missing:
        return str(missing)
    return ""


needs_compiler = pytest.mark.skipif(bool(_missing_compiler()), reason=_missing_compiler())
needs_mlir = pytest.mark.skipif(bool(_missing_mlir()), reason=_missing_mlir())
