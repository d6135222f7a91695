"""The launch plan: which programs run in which order on which buffers, as data that a runtime on the device can follow.

It is JSON, in the artifact: operations with their buffers, scratch, programs, grids and costs, and for every entry
point the order of calls. Numbers that a call decides are polynomials ``[[coefficient, [names]], ...]`` over its
dimensions, rounded up.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from v4c.errors import UnsupportedError

from .devices import Device
from .gates import GATES
from .operation import Operation, Variant, scalars_of
from .partition import Partition
from .program import Argument, GridAxis, Polynomial, Role, TileProgram, Work
from .toolchain import PACKAGE
from .toolchain import find as find_toolchain

FORMAT = 1
FILE = "launch-plan.json"
HIVM_SUFFIX = ".mlir"
TILE_SUFFIX = ".linalg"


def launch_plan(
    module: Any, operations: Mapping[str, Operation], partition: Partition, device: Device
) -> dict[str, Any]:
    """The plan of a host graph as it was imported.

    Returns:
        ``format``; ``device``; ``compiler``; ``gates``, the names of all; ``operations`` by name: ``op``, ``runs_on``
        (``device`` or ``host``), ``reason``, ``buffers``, and per variant ``most_rows``, ``scratch`` and the names of
        its programs in order; ``programs`` by name: work, arguments, scalars, grid, workspace, costs, gates passed and
        file names; ``functions`` by name: the calls in order, those of entry points among them.

    Raises:
        UnsupportedError: a dimension of a call is no product of dimensions.
    """
    programs = {p.name: p for o in operations.values() for p in o.programs}
    return {
        "format": FORMAT,
        "device": device.name,
        "compiler": f"{PACKAGE} {find_toolchain().version}",
        "gates": list(GATES),
        "operations": {name: _operation(o, partition) for name, o in operations.items()},
        "programs": {name: _program(p, partition) for name, p in programs.items()},
        "functions": calls(module, operations),
    }


def _operation(operation: Operation, partition: Partition) -> dict[str, Any]:
    return {
        "op": operation.op,
        "runs_on": "host" if operation.name in partition.fallbacks else "device",
        "reason": partition.fallbacks.get(operation.name, ""),
        "buffers": [
            {"name": b.name, "shape": list(b.shape), "dtype": b.dtype, "role": b.role.value, "host_dtype": b.host_dtype}
            for b in operation.borders
        ],
        "variants": [_variant(operation, v) for v in operation.variants],
    }


def _variant(operation: Operation, variant: Variant) -> dict[str, Any]:
    scratch = [{"name": a.name, "shape": _shape(a.shape), "dtype": a.dtype} for a in operation.scratch(variant)]
    return {"most_rows": variant.most_rows, "scratch": scratch, "programs": [p.name for p in variant.programs]}


def _program(program: TileProgram, partition: Partition) -> dict[str, Any]:
    report = partition.reports.get(program.name)
    return {
        "work": program.work.value,
        "arguments": [
            {"name": a.name, "shape": _shape(a.shape), "dtype": a.dtype, "role": a.role.value}
            for a in program.arguments
        ],
        "scalars": list(program.scalars),
        "grid": [{"count": _polynomial(axis.count), "tile": axis.tile} for axis in program.grid],
        "workspace": program.workspace,
        "costs": {n: _polynomial(getattr(program, n)) for n in ("reads", "writes", "cube", "vector")},
        "notes": list(program.notes),
        "gates_passed": list(report.passed) if report else [],
        "failures": [f"{f.gate}: {f.cause}" for f in report.failures] if report else [],
        "tile_program": program.name + TILE_SUFFIX,
        "hivm": program.name + HIVM_SUFFIX if report and report.ok and report.hivm else None,
    }


def _shape(shape: tuple[int | str | Polynomial, ...]) -> list[Any]:
    return [_polynomial(e) if isinstance(e, Polynomial) else e for e in shape]


def _polynomial(polynomial: Polynomial) -> list[Any]:
    return [[coefficient, list(names)] for coefficient, names in polynomial.terms]


def _polynomial_of(stored: list[Any]) -> Polynomial:
    return Polynomial(tuple((float(c), tuple(names)) for c, names in stored))


def program_of(plan: Mapping[str, Any], name: str, op: str = "") -> TileProgram:
    """A program as the plan describes it, without its text."""
    stored = plan["programs"][name]
    arguments = tuple(
        Argument(a["name"], tuple(_polynomial_of(e) if isinstance(e, list) else e for e in a["shape"]), a["dtype"],
                 Role(a["role"]))
        for a in stored["arguments"]
    )  # fmt: skip
    grid = tuple(GridAxis(_polynomial_of(axis["count"]), axis["tile"]) for axis in stored["grid"])
    costs = {n: _polynomial_of(c) for n, c in stored["costs"].items()}
    return TileProgram(
        name, op, "", Work(stored["work"]), arguments, tuple(stored["scalars"]), grid, stored["workspace"], **costs,
        notes=tuple(stored["notes"]),
    )  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One launch of a program: the operation and op it belongs to, and the program's integers."""

    operation: str
    op: str
    program: str
    scalars: Mapping[str, int]


def launches(plan: Mapping[str, Any], function: str, dims: Mapping[str, int]) -> Iterator[Launch]:
    """The launches of one call of a function of the host graph, in order; operations the host runs are left out.

    Args:
        plan: as `launch_plan` made it, or read from an artifact.
        function: its name, such as an entry point's.
        dims: what the function's dimensions are: ``batch``, ``chunk``, and rows of caches such as ``rows4``.
    """
    for step in plan["functions"][function]:
        if "function" in step:
            yield from launches(plan, step["function"], dims)
        elif "operation" in step:
            operation = plan["operations"][step["operation"]]
            if operation["runs_on"] != "device":
                continue
            scalars = scalars_of({n: math.ceil(_polynomial_of(p)(dims)) for n, p in step["dims"].items()})
            variant = next(
                v for v in operation["variants"] if v["most_rows"] is None or scalars["rows"] <= v["most_rows"]
            )
            for program in variant["programs"]:
                yield Launch(step["operation"], operation["op"], program, scalars)


def calls(module: Any, operations: Mapping[str, Operation]) -> dict[str, list[dict[str, Any]]]:
    """Per function of the host graph its calls in order: ``operation``, ``function``, or ``host`` with an operator.

    An operation comes with its ``dims`` over those of the function. Reshapes are left out: they move nothing.
    """
    from tvm import relax

    found = {}
    for variable, function in module.functions.items():
        if isinstance(function, relax.Function):
            values = (binding.value for block in function.body.blocks for binding in block.bindings)
            found[variable.name_hint] = [step for value in values if (step := _call(value, operations))]
    return dict(sorted(found.items()))


def _call(value: Any, operations: Mapping[str, Operation]) -> dict[str, Any] | None:
    from tvm import relax
    from tvm.ir import GlobalVar, Op

    if not isinstance(value, relax.Call):
        return None
    if isinstance(value.op, GlobalVar):
        return {"function": value.op.name_hint}
    if not isinstance(value.op, Op):
        return None
    name = value.op.name.removeprefix("relax.")
    if name in ("call_tir", "call_tir_inplace"):
        operation = operations[value.args[0].name_hint]
        return {"operation": operation.name, "dims": _dims(operation, value.args[1])}
    return None if name == "reshape" else {"host": name}


def _dims(operation: Operation, arguments: Any) -> dict[str, Any]:
    """What the operation's dimensions are in terms of the calling function's."""
    dims: dict[str, Any] = {}
    for border, argument in zip(operation.borders, arguments, strict=False):  # inputs come first
        for name, extent in zip(border.shape, argument.ty.shape.values, strict=True):
            if isinstance(name, str):
                dims.setdefault(name, _polynomial(_product(extent)))
    return dims


def _product(extent: Any) -> Polynomial:
    """An extent of the host graph: numbers and names, multiplied."""
    from tvm import tirx

    if isinstance(extent, tirx.IntImm):
        return Polynomial.of(int(extent))
    if isinstance(extent, tirx.Mul):
        return _product(extent.a) * _product(extent.b)
    if isinstance(extent, tirx.Var):
        return Polynomial.of(1, extent.name)
    raise UnsupportedError(f"launch plan: expected an extent that is a product of names, found {extent}")


def plan_files(plan: Mapping[str, Any], operations: Mapping[str, Operation], partition: Partition) -> dict[str, bytes]:
    """Files of the artifact: the plan, and of every program its text and, where it passed the gates, its HIVM."""
    files = {FILE: (json.dumps(plan, indent=1) + "\n").encode()}
    for operation in operations.values():
        for program in operation.programs:
            described = plan["programs"][program.name]
            files[described["tile_program"]] = program.text.encode()
            if described["hivm"]:
                files[described["hivm"]] = partition.reports[program.name].hivm.encode()
    return files
