"""Which schedule a kernel gets: one that was found by tuning its shape, or the default of its x86-64 level.

`FAMILIES` is the one list of kernels that have a schedule. A kernel's key leaves out what makes no difference to how
its work is cut: the numbers of a formula, such as epsilons, and whether a norm goes first.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from v4c.errors import UnsupportedError
from v4c.passes.relax.kernels import Kernel

from .kernels.attention import compressed_sparse_attention, heavily_compressed_attention, sliding_window_attention
from .kernels.experts import grouped_experts, mixture_of_experts
from .kernels.grouped_linear import grouped_linear
from .kernels.index import lightning_index
from .kernels.linear import merged_linear
from .kernels.linear_unpacked import linear_unpacked
from .kernels.mhc import mhc_head, mhc_post, mhc_pre
from .kernels.mhc_fused import mhc_post_pre_norm, mhc_pre_norm
from .kernels.packing import panels
from .kernels.quant_packing import QUANTISED
from .kernels.routers import topk_router
from .levels import psabi
from .schedule import (
    AttentionSchedule,
    ExpertSchedule,
    IndexSchedule,
    MHCSchedule,
    ProductSchedule,
    Schedule,
    UnpackedSchedule,
)
from .tuning_database import KernelKey, Record, TuningDatabase, TuningError, digest, processor, shipped

SCHEDULE = "schedule"
"""The factories' argument."""

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """Kernels that are cut by one kind of schedule.

    Attributes:
        schedule: its class.
        outputs: of a product with packed weights, its panels of outputs and its inputs, from the factory's arguments.
        searched: numbers that a search tries; all of the class if None.
    """

    schedule: type[Schedule]
    outputs: Callable[[Arguments], tuple[int, int]] | None = None
    searched: tuple[str, ...] | None = None

    def default(self, arguments: Arguments, level: str) -> Schedule:
        """The default for a kernel."""
        schedule = self.schedule.of(level)
        if isinstance(schedule, ProductSchedule):
            assert self.outputs is not None
            return schedule.for_shape(*self.outputs(arguments))
        return schedule


FAMILIES: dict[Callable[..., Any], Family] = {
    merged_linear: Family(ProductSchedule, lambda a: (sum(panels(n) for n in a["sizes"]), a["k"])),
    grouped_linear: Family(ProductSchedule, lambda a: (a["groups"] * panels(a["n"]), a["k"])),
    topk_router: Family(ProductSchedule, lambda a: (panels(a["experts"]), a["d"])),
    linear_unpacked: Family(UnpackedSchedule),
    sliding_window_attention: Family(AttentionSchedule),
    compressed_sparse_attention: Family(AttentionSchedule),
    heavily_compressed_attention: Family(AttentionSchedule),
    lightning_index: Family(IndexSchedule),
    grouped_experts: Family(ExpertSchedule),
    mixture_of_experts: Family(ExpertSchedule),
    mhc_pre: Family(MHCSchedule),
    mhc_pre_norm: Family(MHCSchedule),
    mhc_post_pre_norm: Family(MHCSchedule),
    mhc_head: Family(MHCSchedule),
    mhc_post: Family(MHCSchedule, searched=("serial_rows",)),
}
"""Every factory whose last argument is a schedule."""

BY_NAME = {factory.__name__: factory for factory in FAMILIES}


@dataclass(frozen=True)
class Tunable:
    """A kernel that has a schedule.

    Attributes:
        key: what its schedule is chosen by.
        kernel: factory and arguments, without the schedule.
        default: the schedule it has untuned: what comes with v4c for its shape, or its level's.
        shipped: the record with v4c that says so, if there is one.
    """

    key: KernelKey
    kernel: Kernel
    default: Schedule
    shipped: Record | None

    @classmethod
    def of(cls, kernel: Kernel, level: str) -> Tunable | None:
        """`kernel` for an x86-64 level; None if it has no schedule."""
        family = FAMILIES.get(kernel.factory)
        if family is None:
            return None
        arguments = named(kernel)
        key = _key(kernel, arguments, level)
        record = shipped().find(key)
        if record is None or record.parameters is None:
            return cls(key, kernel, family.default(arguments, level), None)
        return cls(key, kernel, family.schedule.from_parameters(record.parameters, f"shipped {key}"), record)

    @property
    def choices(self) -> dict[str, tuple[int, ...]]:
        """What a search tries, by number; the default's own value is always among it."""
        family = FAMILIES[self.kernel.factory]
        names = family.searched
        if names is None and self.key.dtype in (
            *QUANTISED,
            "fp4",
        ):  # its sums are integers, which `quant_product` places
            names = ("row_block", "block_bytes", "rows_per_task")
        own, tried = self.default.parameters, family.schedule.choices()
        return {
            name: tuple(sorted({*values, own[name]})) if names is None or name in names else (own[name],)
            for name, values in tried.items()
        }

    def schedule(self, parameters: Mapping[str, Any]) -> Schedule:
        """A schedule of its kind; UnsupportedError if these are not its numbers."""
        return FAMILIES[self.kernel.factory].schedule.from_parameters(parameters, str(self.key))

    def with_arguments(self, arguments: Arguments) -> Tunable:
        """The same for other static sizes, by name, and with the same default."""
        return replace(self, kernel=Kernel(self.kernel.factory, tuple(arguments.values())))

    def scheduled(self, schedule: Schedule) -> Kernel:
        """The kernel with that schedule."""
        bound = inspect.signature(self.kernel.factory).bind(*self.kernel.arguments)
        bound.apply_defaults()
        bound.arguments[SCHEDULE] = schedule
        return Kernel(self.kernel.factory, bound.args)


def named(kernel: Kernel) -> dict[str, Any]:
    """A factory's arguments by name, without the schedule."""
    bound = inspect.signature(kernel.factory).bind(*kernel.arguments)
    bound.apply_defaults()
    return {name: value for name, value in bound.arguments.items() if name != SCHEDULE}


def _key(kernel: Kernel, arguments: Arguments, level: str) -> KernelKey:
    sizes = {
        name: tuple(value) if isinstance(value, tuple | list) else value
        for name, value in arguments.items()
        if isinstance(value, tuple | list) or type(value) is int
    }
    dtype = next((value for value in arguments.values() if isinstance(value, str)), "float32")
    # Only products with quantised weights have code of their own at the level that extends the psABI's.
    found = level if dtype in (*QUANTISED, "fp4") else psabi(level)
    return KernelKey(kernel.factory.__name__, tuple(sorted(sizes.items())), dtype, found)


class Scheduler:
    """Schedules kernels as they are asked for, and keeps account of it.

    Args:
        level: x86-64 level of the code.
        tuning: records to prefer to those that come with v4c.

    Attributes:
        tunable: the kernels that have a schedule, by key, in the order in which they were first asked for.
    """

    def __init__(self, level: str, tuning: TuningDatabase | None) -> None:
        self._level = level
        self._tuning = tuning
        self.tunable: dict[KernelKey, Tunable] = {}
        self._used: dict[KernelKey, Record] = {}

    def scheduled(self, kernel: Kernel) -> Kernel:
        """The kernel with its schedule, or as it is if it has none.

        Raises:
            TuningError: the database has a record for it that does not fit it.
        """
        tunable = Tunable.of(kernel, self._level)
        if tunable is None:
            return kernel
        self.tunable.setdefault(tunable.key, tunable)
        record = None if self._tuning is None else self._tuning.find(tunable.key, processor())
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
