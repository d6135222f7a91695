"""Operators, passes and targets from outside: what an extension calls before it compiles.

An installed package can have it done by itself: whatever it lists under the entry point group ``v4c.extensions`` is
called, once, before the first compilation or export of a process, the command line's included::

    [project.entry-points."v4c.extensions"]
    mine = "my_package:register"

``examples/add_custom_op.py``, ``add_pass.py`` and ``add_target.py`` show each of them at work. What an operator or a
target has to give is in docs/architecture.md, "How to add".
"""

from __future__ import annotations

import functools
from importlib.metadata import entry_points

from v4c.custom_ops.base import CustomOp, TensorSpec, define
from v4c.errors import UnsupportedError
from v4c.passes.pipeline import add_onnx_pass, remove_onnx_pass
from v4c.passes.relax.kernels import Kernel
from v4c.targets import add_target
from v4c.targets.cpu.lowering import add_kernel

__all__ = [
    "CustomOp",
    "Kernel",
    "TensorSpec",
    "add_kernel",
    "add_onnx_pass",
    "add_target",
    "define",
    "load_installed",
    "remove_onnx_pass",
]

GROUP = "v4c.extensions"


@functools.cache
def load_installed() -> tuple[str, ...]:
    """Call what installed packages list under `GROUP`; their names.

    Raises:
        UnsupportedError: one of them fails.
    """
    names = []
    for entry in entry_points(group=GROUP):
        try:
            entry.load()()
        except Exception as error:
            found = " ".join(f"{type(error).__name__}: {error}".split())
            raise UnsupportedError(
                f"extension {entry.name} ({entry.value}): expected it to load, found {found}"
            ) from error
        names.append(entry.name)
    return tuple(names)
