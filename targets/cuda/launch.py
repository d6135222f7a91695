"""Makes PrimFuncs that launch device functions of `kernels/source`: sizes and shapes in Python, arithmetic in CUDA.

A PrimFunc of this form is what the importer calls by: its buffers have shapes, its sizes may be bound to constants, it
updates state in place. TVM writes the ``__global__`` function and the host code of each launch; the body of a launch is
one call of a device function whose template arguments are the static sizes.

Sizes and conditions are texts, such as ``"b * s"``: expressions of integers and of the one-letter names among the
dimensions. Memory that a kernel needs for itself is its last arguments, counted by the attribute `SCRATCH`
(`scratch.py` hands it in).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SCRATCH = "v4c.scratch"
"""Attribute of a PrimFunc: how many of its last arguments are memory of its own."""

CTYPES = {"float32": "float", "bfloat16": "nv_bfloat16", "int64": "int64_t", "int32": "int"}
"""TVM's names of element types to CUDA's."""

Dim = int | str
Buffer = tuple[Sequence[Dim], str]
"""Shape and dtype."""

_NAME = re.compile(r"\b[a-z]\b")


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        call: device function with its template arguments.
        arguments: names of buffers, ``"null"``, integer expressions, or floats.
        grid: up to three extents.
        threads: per block.
        shared: bytes of dynamic shared memory, whose pointer is then the argument ``"shared"``.
    """

    call: str
    arguments: Sequence[str | float]
    grid: Sequence[Dim]
    threads: int
    shared: int = 0


@dataclass(frozen=True)
class Choice:
    """Launches of which the host makes those whose condition comes first: (condition, steps), the last one ``""``."""

    cases: Sequence[tuple[str, Sequence[Step]]]


@dataclass(frozen=True)
class Repeat:
    """Launches made `times` over, the one-letter `name` counting from 0."""

    name: str
    times: str
    steps: Sequence[Step]


Step = Launch | Choice | Repeat


def ceil_div(n: Dim, size: int) -> Dim:
    """Blocks of `size` that cover `n`."""
    return -(-n // size) if isinstance(n, int) else f"({n} + {size - 1}) // {size}"


def device_call(function: str, *template: Any) -> str:
    """A device function with template arguments: ints, booleans, types and lists of widths."""
    return f"v4c::{function}<{', '.join(_template(t) for t in template)}>" if template else f"v4c::{function}"


def widths(sizes: Sequence[int]) -> str:
    """The type that stands for the widths of several outputs."""
    return f"v4c::Widths<{', '.join(map(str, sizes))}>"


def _template(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def prim_func(
    name: str, buffers: Mapping[str, Buffer], steps: Sequence[Step], scratch: Mapping[str, Buffer] | None = None
) -> Any:
    """The PrimFunc `name`: `buffers` are its inputs, then its outputs; `scratch` its own memory."""
    import tvm
    from tvm.script import tirx as T

    scratch = scratch or {}
    every = {**buffers, **scratch}
    sizes = sorted({n for shape, _ in every.values() for d in shape if isinstance(d, str) for n in _NAME.findall(d)})
    lines = ["@T.prim_func(private=True, s_tir=True)"]
    lines.append(f"def {name}({', '.join(f'{b}_: T.handle' for b in every)}):")
    lines.append(f'    T.func_attr({{"tirx.noalias": True, "tirx.is_scheduled": True, "{SCRATCH}": {len(scratch)}}})')
    lines += [f"    {n} = T.int64()" for n in sizes]
    for buffer, (shape, dtype) in every.items():
        lines.append(f'    {buffer} = T.match_buffer({buffer}_, ({", ".join(map(_int64, shape))},), "{dtype}")')
    lines += _steps(steps, every, 1)
    return tvm.script.from_source("\n".join(lines) + "\n", {"T": T})


def _int64(value: Dim) -> str:
    """An extent as TVMScript, all integers of 64 bits: in 32, products of sizes would overflow."""
    return re.sub(r"\b\d+\b", lambda m: f"T.int64({m[0]})", str(value))


def _steps(steps: Sequence[Step], buffers: Mapping[str, Buffer], depth: int) -> Iterator[str]:
    pad = "    " * depth
    for step in steps:
        if isinstance(step, Launch):
            yield from _launch(step, buffers, depth)
        elif isinstance(step, Repeat):
            yield f"{pad}for {step.name} in T.serial({_int64(step.times)}):"
            yield from _steps(step.steps, buffers, depth + 1)
        else:
            yield from _cases(list(step.cases), buffers, depth)


def _cases(cases: list[tuple[str, Sequence[Step]]], buffers: Mapping[str, Buffer], depth: int) -> Iterator[str]:
    """The first case, the others under its ``else``: TVM's parser has no ``elif``."""
    (condition, steps), *others = cases
    if not condition:
        yield from _steps(steps, buffers, depth)
        return
    yield f"{'    ' * depth}if {_int64(condition)}:"
    yield from _steps(steps, buffers, depth + 1)
    if others:
        yield f"{'    ' * depth}else:"
        yield from _cases(others, buffers, depth + 1)


def _launch(launch: Launch, buffers: Mapping[str, Buffer], depth: int) -> Iterator[str]:
    extents = [*zip(("blockIdx.x", "blockIdx.y", "blockIdx.z"), launch.grid, strict=False)]
    for axis, extent in (*extents, ("threadIdx.x", launch.threads)):
        text = str(extent) if axis == "threadIdx.x" else _int64(extent)
        yield f'{"    " * depth}with T.launch_thread("{axis}", {text}):'
        depth += 1
    pad = "    " * depth
    if launch.shared:
        yield f'{pad}shared = T.alloc_buffer(({launch.shared},), "uint8", scope="shared.dyn")'
    arguments = ", ".join(_argument(a, buffers) for a in launch.arguments)
    yield f'{pad}T.evaluate(T.call_extern("void", "{launch.call}", {arguments}))'


def _argument(argument: str | float, buffers: Mapping[str, Buffer]) -> str:
    if isinstance(argument, float):
        return f"T.float32({argument!r})"
    if argument == "null":
        return 'T.call_extern("handle", "v4c_null")'
    return f"{argument}.data" if argument in buffers or argument == "shared" else _int64(argument)
