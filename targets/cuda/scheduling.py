"""Which schedule a kernel gets: one that was found by tuning its shape on a GPU, or the default.

The database is the CPU's (`v4c.targets.cpu.tuning_database`): a record's ``level`` is the architecture, its machine's
``cpu`` the GPU's name and ``cores`` the number of its processors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from v4c.errors import UnsupportedError
from v4c.passes.relax.kernels import Kernel

from ..cpu.tuning_database import KernelKey, Record, TuningDatabase, TuningError, digest
from .kernels.attention import compressed_sparse_attention, heavily_compressed_attention, sliding_window_attention
from .kernels.experts import grouped_experts, mixture_of_experts
from .kernels.index import lightning_index
from .kernels.mhc import mhc_head, mhc_post_pre_norm, mhc_pre, mhc_pre_norm
from .kernels.products import grouped_linear, merged_linear
from .kernels.routing import topk_router
from .schedule import AttentionSchedule, ExpertSchedule, IndexSchedule, MHCSchedule, ProductSchedule, Schedule

SCHEDULE = "schedule"
"""The factories' last argument."""

FAMILIES: dict[Callable[..., Any], type[Schedule]] = {
    merged_linear: ProductSchedule,
    grouped_linear: ProductSchedule,
    topk_router: ProductSchedule,
    sliding_window_attention: AttentionSchedule,
    compressed_sparse_attention: AttentionSchedule,
    heavily_compressed_attention: AttentionSchedule,
    lightning_index: IndexSchedule,
    grouped_experts: ExpertSchedule,
    mixture_of_experts: ExpertSchedule,
    mhc_pre: MHCSchedule,
    mhc_pre_norm: MHCSchedule,
    mhc_post_pre_norm: MHCSchedule,
    mhc_head: MHCSchedule,
}
"""Every factory whose last argument is a schedule, and of which kind."""


@dataclass(frozen=True)
class Tunable:
    """A kernel that has a schedule: what it is chosen by, the kernel without one, and the default."""

    key: KernelKey
    kernel: Kernel
    default: Schedule

    @classmethod
    def of(cls, kernel: Kernel, architecture: str) -> Tunable | None:
        """`kernel` for an architecture; None if it has no schedule."""
        kind = FAMILIES.get(kernel.factory)
        return None if kind is None else cls(_key(kernel, architecture), kernel, kind())

    @property
    def choices(self) -> dict[str, tuple[int, ...]]:
        """What a search tries, by number."""
        return self.default.choices()

    def schedule(self, parameters: Any) -> Schedule:
        """A schedule of its kind; UnsupportedError if these are not its numbers."""
        return type(self.default).from_parameters(parameters, str(self.key))

    def scheduled(self, schedule: Schedule) -> Kernel:
        """The kernel with that schedule."""
        return replace(self.kernel, arguments=(*self.kernel.arguments, schedule))


def _key(kernel: Kernel, architecture: str) -> KernelKey:
    """Sizes and dtype; the numbers of a formula, such as epsilons, make no difference to how work is cut."""
    names = [name for name in inspect.signature(kernel.factory).parameters if name != SCHEDULE]
    named = dict(zip(names, kernel.arguments, strict=True))
    sizes = {k: v for k, v in named.items() if isinstance(v, tuple) or type(v) is int}
    dtype = next((v for v in named.values() if isinstance(v, str)), "float32")
    return KernelKey(kernel.factory.__name__, tuple(sorted(sizes.items())), dtype, architecture)


class Scheduler:
    """Schedules kernels as they are asked for, and keeps account of it.

    Attributes:
        tunable: the kernels that have a schedule, by key, in the order in which they were first asked for.
    """

    def __init__(self, architecture: str, tuning: TuningDatabase | None) -> None:
        self._architecture = architecture
        self._tuning = tuning
        self.tunable: dict[KernelKey, Tunable] = {}
        self._used: dict[KernelKey, Record] = {}

    def scheduled(self, kernel: Kernel) -> Kernel:
        """The kernel with its schedule, or as it is if it has none.

        Raises:
            TuningError: the database has a record for it that does not fit it.
        """
        tunable = Tunable.of(kernel, self._architecture)
        if tunable is None:
            return kernel
        self.tunable.setdefault(tunable.key, tunable)
        record = None if self._tuning is None else self._tuning.find(tunable.key)
        if record is None or record.parameters is None:
            return tunable.scheduled(tunable.default)
        self._used[tunable.key] = record
        try:
            return tunable.scheduled(tunable.schedule(record.parameters))
        except UnsupportedError as error:
            raise TuningError(f"tuning database: {error}; tune again") from None

    def notes(self) -> dict[str, Any]:
        """For the manifest: how many kernels have a schedule, and how many of a tuning database."""
        used = list(self._used.values())
        return {"kernels": len(self.tunable), "records": len(used), "sha256": digest(used) if used else None}
