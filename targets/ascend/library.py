"""The x86 simulation: objects of all tile programs, and a launcher in C for every operation, for one shared library.

A launcher is what the launch plan says, as code: it picks the programs for the rows of the call, takes scratch for the
buffers between them, and runs their grids one after another. Integers that the host graph carries as int64 are int32
within. The objects are linked into the artifact's library, where the host graph's functions call the launchers.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from v4c.errors import OutputError
from v4c.progress import Progress
from v4c.runtime.whole_file import replacing

from .host_function import PREFIX
from .operation import Border, Dim, Operation, Variant
from .program import GridAxis, Polynomial, Role, TileProgram
from .tile_simulator import compile_c, compile_object

CPU = "x86-64-v3"
"""What the simulation is compiled for, as llc names it: it has conversions of float16."""

_HERE = Path(__file__).parent
_C_OPTIONS = ("-march=x86-64-v3", f"-I{_HERE}", "-Wall", "-Werror", "-Wno-unused-label", "-Wno-unused-variable")


def cache_folder() -> Path:
    """Where compiled programs and gate reports are kept: in ``$V4C_CACHE_DIR``, or in the user's cache."""
    given = os.environ.get("V4C_CACHE_DIR")
    if given:
        return Path(given, "ascend")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "v4c", "ascend")


def simulation_objects(
    operations: Mapping[str, Operation], folder: Path, progress: Progress | None = None
) -> list[str]:
    """Paths of the objects in `folder` that define the launchers of `operations`.

    Raises:
        SimulationError: a tool refuses a program.
        ToolMissing: a tool is not installed.
    """
    programs = {p.name: p for o in operations.values() for p in o.programs}
    objects = []
    for number, program in enumerate(programs.values()):
        if progress:
            progress("compile simulation", number, len(programs))
        objects.append(str(_program_object(program, folder)))
    launchers = folder / "launchers.c"
    launchers.write_text(launchers_text(operations.values()))
    for source in (launchers, _HERE / "tile_runtime.c"):
        objects.append(str(compile_c(source, folder, _C_OPTIONS)))
    return objects


def _program_object(program: TileProgram, folder: Path) -> Path:
    """The program's object, from the cache where the same text was compiled before."""
    code = (_HERE / "tile_simulator.py").read_bytes()
    key = hashlib.sha256(b"\0".join((program.name.encode(), program.text.encode(), CPU.encode(), code))).hexdigest()
    target, kept = folder / f"{program.name}.o", cache_folder() / f"{key}.o"
    if kept.is_file():
        shutil.copyfile(kept, target)
        return target
    with tempfile.TemporaryDirectory(prefix="v4c-tile-") as scratch:
        shutil.copyfile(compile_object(program, Path(scratch), CPU), target)
    with contextlib.suppress(OSError, OutputError):  # a cache that cannot be written costs time only
        kept.parent.mkdir(parents=True, exist_ok=True)
        with replacing(kept) as beside:
            shutil.copyfile(target, beside)
    return target


def launchers_text(operations: Iterable[Operation]) -> str:
    """The C source of all launchers."""
    operations = list(operations)
    programs = {p.name: p for o in operations for p in o.programs}
    parts = ['#include <math.h>\n#include "launch_runtime.c"\n']
    parts += [_program_text(p) for p in programs.values()]
    parts += [_operation_text(o) for o in operations]
    return "\n".join(parts)


def _program_text(program: TileProgram) -> str:
    """One program of a grid, called with descriptors instead of arguments."""
    buffers, scalars = len(program.arguments) + 2, len(program.scalars)
    types = ", ".join(["void *"] * buffers + ["int32_t"] * (scalars + 6))
    arguments = [
        *(f"&m[{i}]" for i in range(buffers)),
        *(f"s[{i}]" for i in range(scalars)),
        *(f"p[{i}]" for i in range(6)),
    ]
    return (
        f"void _mlir_ciface_{program.name}({types});\n"
        f"static void run_{program.name}(struct v4c_memref *m, const int32_t *s, const int32_t *p) {{\n"
        f"    _mlir_ciface_{program.name}({', '.join(arguments)});\n}}\n"
    )


def _operation_text(operation: Operation) -> str:
    names = {b.name for b in operation.borders}
    parameters = [*(f"char *g_{b.name}" for b in operation.borders), *(f"int64_t {d}" for d in operation.dims)]
    lines = [f"int {PREFIX}{operation.name}({', '.join(parameters)}) {{", "    int status = 0;"]
    if "rows" not in operation.dims:
        sides = [d for d in ("batch", "chunk") if d in operation.dims]
        lines.append(f"    int64_t rows = {' * '.join(sides) or '1'};")
    for border in operation.borders:
        lines.append(f"    int64_t n_{border.name} = {_elements(border.shape)};")
        lines.append(f"    char *b_{border.name} = {_border(border)};")
    for variant in operation.variants:
        condition = "1" if variant.most_rows is None else f"rows <= {variant.most_rows}"
        lines.append(f"    if ({condition}) {{")
        lines += [f"        {line}" for line in _variant_lines(operation, variant, names)]
        lines += ["        goto done;", "    }"]
    lines.append("done:")
    for border in operation.borders:
        if border.host_dtype != border.dtype and border.role is not Role.READ:
            lines.append(f"    if (!status) v4c_widen(b_{border.name}, g_{border.name}, n_{border.name});")
    lines += ["    v4c_scratch_release();", "    return status;", "}"]
    return "\n".join(lines) + "\n"


def _border(border: Border) -> str:
    if border.host_dtype == border.dtype:
        return f"g_{border.name}"
    assert (border.host_dtype, border.dtype) == ("int64", "int32")
    if border.role is Role.WRITE:
        return f"v4c_scratch(4 * n_{border.name})"
    return f"v4c_narrowed(g_{border.name}, n_{border.name})"


def _variant_lines(operation: Operation, variant: Variant, names: set[str]) -> list[str]:
    lines = []
    for argument in operation.scratch(variant):
        lines.append(f"int64_t n_{argument.name} = {_elements(argument.shape)};")
        size = np.dtype(argument.dtype).itemsize
        lines.append(f"char *b_{argument.name} = v4c_scratch({size} * n_{argument.name});")
    for program in variant.programs:
        grid = [_axis(axis) for axis in program.grid] or ["1"]
        grid += ["1"] * (3 - len(grid))
        buffers = [f"{{b_{a.name}, b_{a.name}, 0, n_{a.name}, 1}}" for a in program.arguments]
        lines += [
            "{",
            f"    int64_t g[] = {{{', '.join(grid)}}};",
            f"    int64_t space = {max(program.workspace, 1)} * g[0] * g[1] * g[2] + 64;",
            "    char *lock = v4c_scratch(4096), *work = v4c_scratch(space);",
            "    struct v4c_memref m[] = {{lock, lock, 0, 4096, 1}, {work, work, 0, space, 1}, "
            + ", ".join(buffers)
            + "};",
            f"    int32_t s[] = {{{', '.join(f'(int32_t){n}' for n in program.scalars) or '0'}}};",
            f'    status = v4c_launch("{program.name}", run_{program.name}, {len(program.arguments)}, m, s, g);',
            "    if (status) goto done;",
            "}",
        ]
    return lines


def _elements(shape: Iterable[Dim | Polynomial]) -> str:
    constant, factors = 1, []
    for extent in shape:
        if isinstance(extent, int):
            constant *= extent
        else:
            factors.append(extent if isinstance(extent, str) else _number(extent))
    return " * ".join([f"(int64_t){constant}", *factors])


def _number(polynomial: Polynomial) -> str:
    terms = [" * ".join([repr(float(c)), *names]) for c, names in polynomial.terms]
    return f"(int64_t)ceil({' + '.join(terms) or '0.0'})"


def _axis(axis: GridAxis) -> str:
    terms = [" * ".join([repr(float(c)), *names]) for c, names in axis.count.terms]
    return f"(int64_t)ceil(({' + '.join(terms) or '0.0'}) / {axis.tile})"
