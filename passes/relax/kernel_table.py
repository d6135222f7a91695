"""What each kernel of a lowered module computes, in a form that outlives it: a library keeps only their names.

`v4c bench` reads the table from the manifest to tell what a call costs (`passes/cost.py`).
"""

from __future__ import annotations

import re
from typing import Any

from v4c.passes.cost import INPUTS_ATTRIBUTE, OP_ATTRIBUTE

_TAKE = re.compile(r"(^|_)take\d*(_|$)")
"""Names that TVM gives to its lookups by row, alone and fused with what follows."""

_SHAPES = "tirx.is_host_func"
"""Attribute of the functions that compute shapes for the virtual machine; they are part of it, and no kernels."""


def kernel_table(module: Any) -> dict[str, list[Any]]:
    """For every kernel of `module` by name: its operator, as `cost_of` takes it, and how many arguments are inputs.

    Loops that TVM made itself have no operator (``""``), unless they look rows up; their last argument is the output.
    """
    from tvm import tirx

    table: dict[str, list[Any]] = {}
    for variable, function in module.functions.items():
        name, attributes = variable.name_hint, function.attrs or {}
        if not isinstance(function, tirx.PrimFunc) or _SHAPES in attributes:
            continue
        if OP_ATTRIBUTE in attributes:
            table[name] = [str(attributes[OP_ATTRIBUTE]), int(attributes[INPUTS_ATTRIBUTE])]
        else:
            table[name] = ["Gather" if _TAKE.search(name) else "", len(function.params) - 1]
    return dict(sorted(table.items()))
