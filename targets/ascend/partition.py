"""Which operations the device takes: every program of one through all gates, or the host runs it, with the reason.

An operation that a gate refuses is run by the host whole, as the same tile programs compiled for it. So weights and
caches have one layout and one precision whichever side runs, and a refusal changes no result.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from v4c.errors import OutputError
from v4c.progress import Progress

from .devices import Device
from .gates import Example, GateError, GateReport, check, gate_code, read_report, write_report
from .library import cache_folder
from .operation import Operation, Variant, example_arrays, example_bytes, example_dims, scalars_of
from .program import Role, TileProgram
from .tile_simulator import SimulationError, simulate
from .toolchain import fingerprint

MOST_EXAMPLE_BYTES = 32 << 20
"""Operations whose smallest call takes more (the experts of a large model) are compiled, linked and checked for sanity
only: their numbers are those of the same programs at smaller sizes."""


@dataclass(frozen=True)
class Partition:
    """The outcome for all operations of an artifact.

    Attributes:
        reports: of every program by name: that of the first operation it belongs to.
        fallbacks: operations that the host runs, with the reason.
    """

    reports: Mapping[str, GateReport] = field(default_factory=dict)
    fallbacks: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, operations: Mapping[str, Operation], too_large: Mapping[str, str], device: Device, strict: bool = False,
        progress: Progress | None = None,
    ) -> Partition:  # fmt: skip
        """Take every operation through the gates.

        Args:
            operations: by name.
            too_large: operations for whose rows the device has no tiles, with the reason.
            device: whose gates.
            strict: whether a refusal is an error.
            progress: told of every operation, and of every one that the host takes over.

        Raises:
            GateError: a refusal, with `strict`: kernel, device, gate and cause, and how many more there are.
            ToolMissing: a tool is not installed.
        """
        reports: dict[str, GateReport] = {}
        fallbacks: dict[str, str] = {}
        for number, operation in enumerate(operations.values()):
            if progress:
                progress("check kernels", number, len(operations))
            if operation.name in too_large:
                fallbacks[operation.name] = too_large[operation.name]
                continue
            for report in check_operation(operation, device):
                reports.setdefault(report.kernel, report)
                if not report.ok:
                    fallbacks.setdefault(operation.name, str(report.failures[0]))
        if progress:
            for name, reason in fallbacks.items():
                progress(f"{name} on the host: {reason}", 0, 0)
        if strict and fallbacks:
            more = f" (and {len(fallbacks) - 1} more)" if len(fallbacks) > 1 else ""
            raise GateError(f"{next(iter(fallbacks.values()))}{more}")
        return cls(reports, fallbacks)


def check_operation(operation: Operation, device: Device, seed: int = 0) -> list[GateReport]:
    """A report for every program, on the buffers it meets in a small call of its operation.

    Reports are kept between processes; a program whose operation an earlier one has failed is not run, only compiled.
    """
    found: dict[str, GateReport] = {}
    for variant in operation.variants:
        paths = {p.name: cache_folder() / f"{_key(operation, variant, p, device, seed)}.json" for p in variant.programs}
        stored = {name: read_report(path) for name, path in paths.items()}
        if all(stored.values()):
            found |= {n: r for n, r in stored.items() if r is not None and n not in found}
            continue
        for name, report in _check_variant(operation, variant, device, seed).items():
            with contextlib.suppress(OSError, OutputError):  # a cache that cannot be written costs time only
                write_report(paths[name], report)
            found.setdefault(name, report)
    return list(found.values())


def _key(operation: Operation, variant: Variant, program: TileProgram, device: Device, seed: int) -> str:
    texts = [(p.name, fingerprint(p.text, device)) for p in variant.programs]
    described = (
        gate_code(),
        _example_code(),
        operation.borders,
        operation.ratio,
        variant.most_rows,
        texts,
        program.name,
        seed,
    )
    return hashlib.sha256(repr(described).encode()).hexdigest()


@functools.cache
def _example_code() -> str:
    """A hash of the code that draws the calls."""
    files = (Path(__file__), Path(__file__).with_name("operation.py"))
    return hashlib.sha256(b"\0".join(f.read_bytes() for f in files)).hexdigest()


def _check_variant(operation: Operation, variant: Variant, device: Device, seed: int) -> dict[str, GateReport]:
    rows = 3 if variant.most_rows is not None or len(operation.variants) == 1 else 18
    dims = example_dims(operation, rows)
    scalars = scalars_of(dims)
    buffers: dict[str, np.ndarray] | None = None
    if example_bytes(operation, dims) <= MOST_EXAMPLE_BYTES:
        buffers = example_arrays(operation, dims, seed)
    reports: dict[str, GateReport] = {}
    for program in variant.programs:
        inputs = None if buffers is None else _inputs(program, buffers, scalars)
        example = None if inputs is None else Example(inputs, scalars)
        reports[program.name] = check(program, device, example)
        if buffers is None or inputs is None:
            continue
        try:
            buffers |= simulate(program, inputs, scalars)
        except SimulationError:
            buffers = None
    return reports


def _inputs(
    program: TileProgram, buffers: Mapping[str, np.ndarray], scalars: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """What the program reads, in its own shapes: buffers are shared by name."""
    return {
        a.name: np.ascontiguousarray(buffers[a.name]).reshape(a.extents(scalars))
        for a in program.arguments
        if a.name in buffers and a.role is not Role.WRITE
    }
