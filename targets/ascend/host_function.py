"""An operation as a TVM function of the host graph: it hands pointers and dimensions to the operation's launcher.

The launcher (`library`) is C, compiled for this machine with the operation's tile programs, and stands in the same
shared library.
"""

from __future__ import annotations

from typing import Any

from .operation import Operation

PREFIX = "v4c_ascend_"
"""Of the launchers' symbols."""


def host_function(operation: Operation) -> Any:
    """The PrimFunc: inputs in order, then the outputs that are not written over one.

    A call raises RuntimeError where a program leaves its buffers.
    """
    from tvm import script
    from tvm.script import tirx as T

    def dim(extent: int | str) -> str:
        return extent if isinstance(extent, str) else f"T.int64({extent})"

    names = [f"b{i}" for i in range(len(operation.borders))]
    lines = [
        "@T.prim_func(private=True, s_tir=True)",
        f"def {operation.name}({', '.join(f'{n}_: T.handle' for n in names)}):",
        '    T.func_attr({"tirx.noalias": True})',
        *(f"    {d} = T.int64()" for d in operation.dims),
    ]
    for name, border in zip(names, operation.borders, strict=True):
        shape = "".join(f"{dim(e)}, " for e in border.shape)
        lines.append(f'    {name} = T.match_buffer({name}_, ({shape}), "{border.host_dtype}")')
    arguments = ", ".join([*(f"{n}.data" for n in names), *operation.dims])
    call = f'T.call_extern("int32", "{PREFIX}{operation.name}", {arguments})'
    lines.append(f'    assert {call} == 0, "kernel {operation.name}: a tile program leaves its buffers"')
    return script.from_source("\n".join(lines) + "\n", {"T": T})
