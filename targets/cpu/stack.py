"""Puts the kernels' small buffers on the stack, where LLVM turns them into registers.

TVM takes the memory of a ``local`` buffer, and of every scalar variable in TVMScript, from a run-time pool: a pair of
calls per buffer and iteration, and memory that LLVM cannot keep in registers. Buffers of the default scope with less
than 1 KiB are allocated on the stack.
"""

from __future__ import annotations

import json
from typing import Any

STACK_BYTES = 1023
"""The largest constant buffer that TVM puts on the stack."""


def on_stack(function: Any) -> Any:
    """The PrimFunc with every ``local`` buffer in the default scope.

    TVM 0.27 has no rewriter of TensorIR in Python; its own serialised form is edited instead.
    """
    import tvm

    graph = json.loads(tvm.ir.save_json(function))
    nodes = graph["nodes"]
    scopes = {i for i, n in enumerate(nodes) if n["type"] == "ffi.String" and n["data"] == "local"}
    if not scopes:
        return function
    default = len(nodes)
    nodes.append({"type": "ffi.String", "data": "global"})
    for node in nodes:
        if node["type"] == "tirx.BufferType" and node["data"]["storage_scope"] in scopes:
            node["data"]["storage_scope"] = default
    return tvm.ir.load_json(json.dumps(graph))
