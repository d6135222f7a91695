"""The tuner's database: for each kernel and machine, the schedule that was found and every trial that led to it.

A record's key is an operator, its shape, the dtype of its weights and the x86-64 level or GPU architecture. Files are
JSON; reading and writing them is the driver's (`v4c.tuning`), what they may say is checked here.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from v4c.errors import Error

FORMAT_VERSION = 1
T = TypeVar("T")
Size = int | tuple[int, ...]


class TuningError(Error):
    """A tuning database that is damaged, of another version, or does not fit the kernels."""


def processor() -> str:
    """This machine's processor model."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class KernelKey:
    """What a schedule is chosen by.

    Attributes:
        op: name of the kernel's factory, such as ``merged_linear``.
        shape: its static sizes by name, sorted.
        dtype: of its weights: ``float32``, ``bfloat16``, ``int8`` or ``int4``.
        level: x86-64 level of the code (`cpu.levels.LEVELS`), or GPU architecture.
    """

    op: str
    shape: tuple[tuple[str, Size], ...]
    dtype: str
    level: str

    def __str__(self) -> str:
        sizes = " ".join(f"{k}={'+'.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in self.shape)
        return f"{self.op} {sizes} {self.dtype} {self.level}"


@dataclass(frozen=True)
class Machine:
    """Where times were measured: processor model (or GPU), cores (or its processors), threads per kernel."""

    cpu: str
    cores: int
    threads: int

    @classmethod
    def this(cls, threads: int) -> Machine:
        """This machine."""
        return cls(processor(), os.cpu_count() or 1, threads)


@dataclass(frozen=True)
class Trial:
    """One measured candidate.

    Attributes:
        parameters: its numbers.
        ratio: geometric mean over the row counts of its time over the default's; None if it failed.
        failed: why, or None.
    """

    parameters: Mapping[str, int]
    ratio: float | None
    failed: str | None = None


@dataclass(frozen=True)
class Record:
    """What is known about one kernel on one machine.

    Attributes:
        key, machine: of what.
        parameters: the schedule that beat the default, or None where none did or none is known yet.
        default_us, tuned_us: median times of both in microseconds, by row count as text, taken in turns; empty until
            the search is finished. Equal where the default is kept.
        trials: everything that was tried.
        finished: whether the search is complete.
    """

    key: KernelKey
    machine: Machine
    parameters: Mapping[str, int] | None = None
    default_us: Mapping[str, float] = field(default_factory=dict)
    tuned_us: Mapping[str, float] = field(default_factory=dict)
    trials: tuple[Trial, ...] = ()
    finished: bool = False

    @property
    def gain(self) -> float:
        """How many times as fast the tuned kernel is, the geometric mean over the row counts; 1 for the default."""
        if not self.default_us:
            return 1.0
        product = 1.0
        for rows, time in self.default_us.items():
            product *= time / self.tuned_us[rows]
        return float(product ** (1 / len(self.default_us)))

    def document(self) -> dict[str, Any]:
        """For JSON."""
        shape = {name: list(size) if isinstance(size, tuple) else size for name, size in self.key.shape}
        return {
            "op": self.key.op, "shape": shape, "dtype": self.key.dtype, "level": self.key.level,
            "machine": asdict(self.machine), "finished": self.finished,
            "parameters": None if self.parameters is None else dict(self.parameters),
            "default_us": dict(self.default_us), "tuned_us": dict(self.tuned_us),
            "trials": [{"parameters": dict(t.parameters), "ratio": t.ratio, "failed": t.failed} for t in self.trials],
        }  # fmt: skip


class TuningDatabase:
    """Records by key and machine."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._records: dict[tuple[KernelKey, Machine], Record] = {(r.key, r.machine): r for r in records}

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records.values())

    def __len__(self) -> int:
        return len(self._records)

    def put(self, record: Record) -> None:
        """Add a record, or replace the one of the same key and machine."""
        self._records[record.key, record.machine] = record

    def get(self, key: KernelKey, machine: Machine) -> Record | None:
        """The record of exactly this key and machine."""
        return self._records.get((key, machine))

    def find(self, key: KernelKey, cpu: str | None = None) -> Record | None:
        """The finished record to compile by: one measured on processor model `cpu` if there is any, else the first."""
        found = [r for (k, _), r in self._records.items() if k == key and r.finished]
        return next((r for r in found if r.machine.cpu == cpu), found[0] if found else None)

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return {"format_version": FORMAT_VERSION, "records": [r.document() for r in self]}

    @classmethod
    def from_document(cls, document: Mapping[str, Any], where: str) -> TuningDatabase:
        """From parsed JSON; `where` names it in messages.

        Raises:
            TuningError: it is no database of this version.
        """
        version = document.get("format_version")
        if version != FORMAT_VERSION:
            raise TuningError(f"{where}: expected tuning format_version {FORMAT_VERSION}, found {version!r}")
        top = _Reader(document, where, ("format_version", "records"))
        return cls(_record(r, f"{where}: records[{i}]") for i, r in enumerate(top.take("records", list, "a list")))


def digest(records: Sequence[Record]) -> str:
    """SHA-256 of what compiling by these records depends on: keys and parameters."""
    lines = sorted(json.dumps([str(r.key), dict(sorted((r.parameters or {}).items()))]) for r in records)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class _Reader:
    """An object of a database, whose keys must be exactly `keys`."""

    def __init__(self, value: Any, where: str, keys: Sequence[str]) -> None:
        if not isinstance(value, Mapping):
            raise TuningError(f"{where}: expected an object, found {type(value).__name__}")
        if set(value) != set(keys):
            raise TuningError(f"{where}: expected the keys {', '.join(keys)}, found {', '.join(map(str, value))}")
        self.value, self.where = value, where

    def take(self, key: str, kind: type[T], expected: str) -> T:
        value = self.value[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise TuningError(f"{self.where}: {key}: expected {expected}, found {value!r}")
        return value

    def text(self, key: str) -> str:
        return self.take(key, str, "a string")

    def times(self, key: str) -> dict[str, float]:
        found = self.take(key, dict, "an object")
        for rows, time in found.items():
            if not rows.isdecimal() or isinstance(time, bool) or not isinstance(time, int | float) or not time > 0:
                raise TuningError(f"{self.where}: {key}: expected microseconds by row count, found {rows!r}: {time!r}")
        return found

    def parameters(self, key: str) -> dict[str, int]:
        found = self.take(key, dict, "an object")
        for name, value in found.items():
            if type(value) is not int:
                raise TuningError(f"{self.where}: {key}: {name}: expected an integer, found {value!r}")
        return found


_RECORD = (
    "op", "shape", "dtype", "level", "machine", "finished", "parameters", "default_us", "tuned_us", "trials",
)  # fmt: skip


def _record(value: Any, where: str) -> Record:
    fields = _Reader(value, where, _RECORD)
    shape = []
    for name, size in sorted(fields.take("shape", dict, "an object").items()):
        sizes = size if isinstance(size, list) else [size]
        if any(type(s) is not int for s in sizes):
            raise TuningError(f"{where}: shape: {name}: expected an integer or a list of them, found {size!r}")
        shape.append((name, tuple(size) if isinstance(size, list) else size))
    machine = _Reader(value["machine"], f"{where}: machine", ("cpu", "cores", "threads"))
    default_us, tuned_us = fields.times("default_us"), fields.times("tuned_us")
    if set(default_us) != set(tuned_us):
        raise TuningError(f"{where}: tuned_us: expected times of the row counts of default_us")
    return Record(
        KernelKey(fields.text("op"), tuple(shape), fields.text("dtype"), fields.text("level")),
        Machine(machine.text("cpu"), machine.take("cores", int, "a count"), machine.take("threads", int, "a count")),
        None if value["parameters"] is None else fields.parameters("parameters"),
        default_us, tuned_us,
        tuple(_trial(t, f"{where}: trials[{i}]") for i, t in enumerate(fields.take("trials", list, "a list"))),
        fields.take("finished", bool, "true or false"),
    )  # fmt: skip


def _trial(value: Any, where: str) -> Trial:
    fields = _Reader(value, where, ("parameters", "ratio", "failed"))
    ratio, failed = value["ratio"], value["failed"]
    if (ratio is None) == (failed is None):
        raise TuningError(f"{where}: expected either a ratio or why it failed, found {ratio!r} and {failed!r}")
    if ratio is not None and (isinstance(ratio, bool) or not isinstance(ratio, int | float) or not ratio > 0):
        raise TuningError(f"{where}: ratio: expected a positive number, found {ratio!r}")
    return Trial(fields.parameters("parameters"), ratio, None if failed is None else fields.text("failed"))
