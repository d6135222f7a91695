"""Threads for the loops that TVM makes itself: lookups, broadcasts, and elementwise arithmetic between the kernels."""

from __future__ import annotations

from typing import Any

_THREADS = 256
_NOT_LOOPS = ("tirx.is_scheduled", "tirx.is_host_func")
"""Attributes of kernels, which have threads, and of the virtual machine's functions of shapes, which need none."""


def schedule_loops(module: Any) -> None:
    """Schedule every PrimFunc of `module` that has no threads yet: one element of its output per thread.

    What stands before the last loop nest is computed in it, so that nothing is stored in between: a kernel's own memory
    would move (see `scratch`).
    """
    from tvm import tirx

    for variable, function in module.functions.items():
        if isinstance(function, tirx.PrimFunc) and not any(note in (function.attrs or {}) for note in _NOT_LOOPS):
            module[variable] = _scheduled(function)


def _scheduled(function: Any) -> Any:
    import tvm
    from tvm.s_tir import Schedule

    schedule = Schedule(tvm.IRModule({"main": function}))
    *before, last = schedule.get_child_blocks(schedule.get_sblock("root"))
    for block in before:
        schedule.compute_inline(block)
    loops = schedule.get_loops(last)
    everything = schedule.fuse(*loops) if loops else schedule.add_unit_loop(last)
    blocks, threads = schedule.split(everything, [None, _THREADS])
    schedule.bind(blocks, "blockIdx.x")
    schedule.bind(threads, "threadIdx.x")
    return schedule.mod["main"].with_attr("tirx.is_scheduled", True)
