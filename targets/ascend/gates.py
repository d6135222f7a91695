"""What a kernel has to pass for one device before v4c takes it: compile-checked and simulated for Ascend.

Gates in order: ``compile`` (bishengir accepts it), ``link`` (its device-library calls exist), ``sanity`` (nothing was
dropped, no sync is missing, no vector work on global memory), and with an `Example` ``tile numerics`` (the program's
text on x86 against the expected values) and ``scheduled numerics`` (bishengir's scheduled HIVM, in every order the
hardware may run it, against the text). A gate that fails ends the row, except that link and sanity are both told.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from v4c.errors import Error
from v4c.runtime.whole_file import replacing

from .devices import Device, find_device
from .hivm_simulator import ORDERS, simulate_scheduled
from .link_check import missing_functions
from .mlir_text import MLIRTextError
from .program import Role, TileProgram
from .sanity import check_sanity
from .tile_simulator import SimulationError, simulate
from .toolchain import Compiled, Rejected, compile_program, fingerprint, portable

GATES = ("compile", "link", "sanity", "tile numerics", "scheduled numerics")


class GateError(Error):
    """A kernel that a gate refuses; the message is one line with kernel, device, gate and cause."""


@dataclass(frozen=True)
class Failure:
    """Why a gate refuses a kernel."""

    kernel: str
    device: str
    gate: str
    cause: str

    def __str__(self) -> str:
        return f"kernel {self.kernel}, {self.device}, {self.gate}: {self.cause}"


@dataclass(frozen=True)
class GateReport:
    """The outcome for one kernel and device.

    Attributes:
        passed: gates passed, in order.
        failures: causes, empty when the kernel is taken.
        omitted: gates not run, with the reason.
        hivm: HIVM text for `finish.py`, ``""`` unless compiled.
    """

    kernel: str
    device: str
    passed: tuple[str, ...]
    failures: tuple[Failure, ...] = ()
    omitted: tuple[tuple[str, str], ...] = ()
    hivm: str = field(default="", repr=False)

    @property
    def ok(self) -> bool:
        return not self.failures


@dataclass(frozen=True)
class Example:
    """One call of a kernel that the numeric gates make.

    Attributes:
        inputs: arrays by argument name: everything read or updated.
        scalars: values of ``program.scalars``.
        expected: what it should write, by argument name, from an independent reference; None: not compared.
        tolerance: largest difference allowed, relative to the largest expected magnitude; integers must be equal.
        scheduled_tolerance: the same between scheduled HIVM and program text.
    """

    inputs: Mapping[str, np.ndarray]
    scalars: Mapping[str, int] = field(default_factory=dict)
    expected: Mapping[str, np.ndarray] | None = None
    tolerance: float = 2e-2
    scheduled_tolerance: float = 5e-3

    @classmethod
    def draw(
        cls,
        program: TileProgram,
        scalars: Mapping[str, int] | None = None,
        limits: Mapping[str, int] | None = None,
        seed: int = 0,
    ) -> Example:
        """Normal numbers, and integers below `limits` (of an index argument: rows of its table; 1 where not given)."""
        generator, scalars = np.random.default_rng(seed), dict(scalars or {})
        inputs = {}
        for argument in program.arguments:
            if argument.role is Role.WRITE:
                continue
            shape, dtype = argument.extents(scalars), np.dtype(argument.dtype)
            if dtype.kind in "iu":
                inputs[argument.name] = generator.integers(0, (limits or {}).get(argument.name, 1), shape).astype(dtype)
            else:
                inputs[argument.name] = generator.standard_normal(shape).astype(dtype)
        return cls(inputs, scalars)


def check(
    program: TileProgram, device: Device | str, example: Example | None = None, cache: Path | None = None
) -> GateReport:
    """Runs the gates for one kernel and device. ToolMissing where a tool is not installed.

    Args:
        cache: a folder in which reports are kept by hash of program, device, tools, example and v4c's own gates.
    """
    device = find_device(device) if isinstance(device, str) else device
    key = _key(program, device, example)
    if key in _reports:
        return _reports[key]
    stored = cache / f"{key}.json" if cache is not None else None
    report = read_report(stored) if stored is not None else None
    if report is None:
        report = _check(program, device, example)
        if stored is not None:
            write_report(stored, report)
    _reports[key] = report
    return report


def check_all(
    programs: Iterable[tuple[TileProgram, Example | None]],
    devices: Iterable[Device | str],
    cache: Path | None = None,
    jobs: int = 1,
) -> list[GateReport]:
    """`check` for every program and device, `jobs` at a time; reports in the order of programs, then devices."""
    work = [(p, d, e) for p, e in programs for d in list(devices)]
    with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
        return list(pool.map(lambda item: check(item[0], item[1], item[2], cache), work))


def require(reports: Iterable[GateReport]) -> None:
    """GateError with the first failure, and how many more there are."""
    failures = [failure for report in reports for failure in report.failures]
    if failures:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise GateError(f"{failures[0]}{more}")


_reports: dict[str, GateReport] = {}


def _check(program: TileProgram, device: Device, example: Example | None) -> GateReport:
    passed: list[str] = []

    def report(gate: str, causes: Iterable[str], hivm: str = "") -> GateReport:
        failures = tuple(Failure(program.name, device.name, gate, cause) for cause in causes)
        return GateReport(program.name, device.name, tuple(passed), failures, (), hivm)

    try:
        compiled = compile_program(program.name, program.text, device)
    except Rejected as rejected:
        return report("compile", [rejected.cause])
    passed.append("compile")
    hivm = portable(compiled.final)
    missing = [f"{m.core} calls {m.name}, which the device library lacks" for m in missing_functions(compiled.final)]
    try:
        insane = check_sanity(program, compiled.scheduled)
    except MLIRTextError as error:
        insane = [str(error)]
    passed += ["link"] * (not missing) + ["sanity"] * (not insane)
    if missing or insane:
        failures = report("link", missing).failures + report("sanity", insane).failures
        return GateReport(program.name, device.name, tuple(passed), failures, (), hivm)
    if example is None:
        omitted = tuple((gate, "no example of a call was given") for gate in GATES[3:])
        return GateReport(program.name, device.name, tuple(passed), (), omitted, hivm)
    for gate, run in (("tile numerics", _tile_numerics), ("scheduled numerics", _scheduled_numerics)):
        cause = run(program, compiled, example)
        if cause is not None:
            return report(gate, [cause], hivm)
        passed.append(gate)
    return GateReport(program.name, device.name, tuple(passed), (), (), hivm)


def _tile_numerics(program: TileProgram, compiled: Compiled, example: Example) -> str | None:
    try:
        written = simulate(program, example.inputs, example.scalars)
    except SimulationError as error:
        return _without_kernel(program, error)
    for name, expected in (example.expected or {}).items():
        if name not in written:
            return f"{name} is expected, and no argument of that name is written"
        cause = difference(written[name], expected, example.tolerance)
        if cause is not None:
            return f"{name}: {cause}"
    return None


def _scheduled_numerics(program: TileProgram, compiled: Compiled, example: Example) -> str | None:
    text = simulate(program, example.inputs, example.scalars)
    for order in ORDERS[program.work]:
        try:
            written = simulate_scheduled(program, compiled, example.inputs, example.scalars, order)
        except SimulationError as error:
            return _without_kernel(program, error)
        for name, array in written.items():
            cause = difference(array, text[name], example.scheduled_tolerance)
            if cause is not None:
                return f"{name}, order {order}: {cause}"
    return None


def _without_kernel(program: TileProgram, error: SimulationError) -> str:
    return str(error).removeprefix(f"kernel {program.name}").lstrip(",: ")


def difference(found: np.ndarray, expected: np.ndarray, tolerance: float) -> str | None:
    """How `found` departs from `expected` beyond `tolerance`, None where it does not.

    Elements that are NaN in `expected` (never written, by the simulators' filling) are compared as NaN.
    """
    if found.shape != expected.shape:
        return f"expected shape {list(expected.shape)}, found {list(found.shape)}"
    if found.size == 0:
        return None
    if np.dtype(found.dtype).kind in "iub":
        wrong = int((found != expected).sum())
        return f"{wrong} of {found.size} integers differ" if wrong else None
    a, b = found.astype(np.float64), expected.astype(np.float64)
    same = (np.isnan(a) & np.isnan(b)) | (a == b)
    if not np.array_equal(np.isfinite(a) | same, np.ones(a.shape, np.bool_)):
        bad = ~np.isfinite(a) & ~same
        return f"{int(bad.sum())} of {a.size} elements are not finite"
    finite = np.abs(b[np.isfinite(b)])
    scale = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    with np.errstate(invalid="ignore"):
        apart = np.where(same, 0.0, np.abs(a - b))
    worst = float(np.nan_to_num(apart, nan=np.inf).max()) / scale
    return f"largest relative difference {worst:.2e}, allowed {tolerance:.0e}" if worst > tolerance else None


_GATE_FILES = (
    "devices", "gates", "hivm_memory", "hivm_ops", "hivm_scalars", "hivm_simulator", "hivm_steps", "link_check",
    "mlir_text", "program", "sanity", "tile_simulator", "toolchain",
)  # fmt: skip


@functools.cache
def gate_code() -> str:
    """A hash of the code the gates consist of: stored reports of another version of it are not read."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in (*(folder / f"{name}.py" for name in _GATE_FILES), folder / "tile_runtime.c"):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _key(program: TileProgram, device: Device, example: Example | None) -> str:
    digest = hashlib.sha256()
    described = (program.name, program.work.value, program.arguments, program.scalars, program.grid, program.workspace)
    digest.update(repr((gate_code(), fingerprint(program.text, device), described)).encode())
    if example is not None:
        digest.update(repr((sorted(example.scalars.items()), example.tolerance, example.scheduled_tolerance)).encode())
        for arrays in (example.inputs, example.expected or {}):
            for name, array in sorted(arrays.items()):
                digest.update(f"{name} {array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
            digest.update(b"\0")
    return digest.hexdigest()


def read_report(path: Path) -> GateReport | None:
    """A stored report; None where there is none or it is damaged."""
    try:
        stored: dict[str, Any] = json.loads(path.read_text())
        return GateReport(
            stored["kernel"],
            stored["device"],
            tuple(stored["passed"]),
            tuple(Failure(**failure) for failure in stored["failures"]),
            tuple((gate, reason) for gate, reason in stored["omitted"]),
            stored["hivm"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_report(path: Path, report: GateReport) -> None:
    """Stores a report."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        beside.write_text(json.dumps(asdict(report)))
