"""Which schedule a kernel gets: one that was found by tuning its shape, or its default; the same for every target.

A kernel's key leaves out what makes no difference to how its work is cut: the numbers of a formula, such as epsilons,
and whether a norm goes first.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from v4c.errors import UnsupportedError
from v4c.passes.relax.kernels import Kernel

from .schedule import Schedule
from .tuning_database import KernelKey, Record, TuningDatabase, TuningError, digest

SCHEDULE = "schedule"
"""The factories' argument."""

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Tunable:
    """A kernel that has a schedule.

    Attributes:
        key: what its schedule is chosen by.
        kernel: factory and arguments, without the schedule.
        default: the schedule it has untuned: what comes with v4c for its shape, or the target's.
        searched: numbers that a search tries; all if None.
        shipped: the record with v4c that `default` is from, if there is one.
    """

    key: KernelKey
    kernel: Kernel
    default: Schedule
    searched: tuple[str, ...] | None = None
    shipped: Record | None = None

    @property
    def choices(self) -> dict[str, tuple[int, ...]]:
        """What a search tries, by number; the default's own value is always among it."""
        own = self.default.parameters
        return {
            name: tuple(sorted({*values, own[name]}))
            if self.searched is None or name in self.searched
            else (own[name],)
            for name, values in self.default.choices().items()
        }

    def schedule(self, parameters: Mapping[str, Any]) -> Schedule:
        """A schedule of its kind; UnsupportedError if these are not its numbers."""
        return type(self.default).from_parameters(parameters, str(self.key))

    def with_arguments(self, arguments: Arguments) -> Tunable:
        """The same for other static sizes, by name, and with the same default."""
        return replace(self, kernel=Kernel(self.kernel.factory, tuple(arguments.values())))

    def scheduled(self, schedule: Schedule) -> Kernel:
        """The kernel with that schedule."""
        bound = _bound(self.kernel)
        bound.arguments[SCHEDULE] = schedule
        return Kernel(self.kernel.factory, bound.args)


def named(kernel: Kernel) -> dict[str, Any]:
    """A factory's arguments by name, without the schedule."""
    return {name: value for name, value in _bound(kernel).arguments.items() if name != SCHEDULE}


def _bound(kernel: Kernel) -> inspect.BoundArguments:
    bound = inspect.signature(kernel.factory).bind_partial(*kernel.arguments)
    bound.apply_defaults()
    return bound


def key(kernel: Kernel, level: str) -> KernelKey:
    """What a schedule of `kernel` in code of `level` is chosen by."""
    arguments = named(kernel)
    sizes = {
        name: tuple(value) if isinstance(value, tuple | list) else value
        for name, value in arguments.items()
        if isinstance(value, tuple | list) or type(value) is int
    }
    dtype = next((value for value in arguments.values() if isinstance(value, str)), "float32")
    return KernelKey(kernel.factory.__name__, tuple(sorted(sizes.items())), dtype, level)


class Scheduler:
    """Schedules kernels as they are asked for, and keeps account of it.

    Args:
        describe: what a target knows of a kernel; None where the kernel has no schedule.
        tuning: records to prefer to the defaults.
        processor: model whose records are preferred to those of others.

    Attributes:
        tunable: the kernels that have a schedule, by key, in the order in which they were first asked for.
    """

    def __init__(
        self,
        describe: Callable[[Kernel], Tunable | None],
        tuning: TuningDatabase | None = None,
        processor: str | None = None,
    ) -> None:
        self._describe, self._tuning, self._processor = describe, tuning, processor
        self.tunable: dict[KernelKey, Tunable] = {}
        self._used: dict[KernelKey, Record] = {}

    def scheduled(self, kernel: Kernel) -> Kernel:
        """The kernel with its schedule, or as it is if it has none.

        Raises:
            TuningError: the database has a record for it that does not fit it.
        """
        tunable = self._describe(kernel)
        if tunable is None:
            return kernel
        self.tunable.setdefault(tunable.key, tunable)
        record = None if self._tuning is None else self._tuning.find(tunable.key, self._processor)
        if record is None or record.parameters is None:
            return tunable.scheduled(tunable.default)
        self._used[tunable.key] = record
        try:
            return tunable.scheduled(tunable.schedule(record.parameters))
        except UnsupportedError as error:
            raise TuningError(f"tuning database: {error}; tune again") from None

    def notes(self) -> dict[str, Any]:
        """For the manifest: how many kernels have a schedule, and where it is from.

        ``records`` and ``sha256`` are of the tuning database given, as far as it was used.
        """
        used = list(self._used.values())
        return {
            "kernels": len(self.tunable),
            "shipped": sum(t.shipped is not None for key, t in self.tunable.items() if key not in self._used),
            "records": len(used),
            "sha256": digest(used) if used else None,
        }
