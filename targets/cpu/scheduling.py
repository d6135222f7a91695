"""Which CPU kernels have a schedule, and the default of each: what comes with v4c for its shape, or its level's.

`FAMILIES` is the one list of them; how a schedule is chosen is every target's (`v4c.targets.scheduler`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

from v4c.passes.relax.kernels import Kernel

from ..quantisation import QUANTISED
from ..schedule import Schedule
from ..scheduler import Arguments, Scheduler, Tunable, key, named
from ..tuning_database import Record, TuningDatabase, processor
from .kernels.attention import compressed_sparse_attention, heavily_compressed_attention, sliding_window_attention
from .kernels.experts import grouped_experts, mixture_of_experts
from .kernels.grouped_linear import grouped_linear
from .kernels.index import lightning_index
from .kernels.linear import merged_linear
from .kernels.linear_unpacked import linear_unpacked
from .kernels.mhc import mhc_head, mhc_post, mhc_pre
from .kernels.mhc_fused import mhc_post_pre_norm, mhc_pre_norm
from .kernels.packing import panels
from .kernels.routers import topk_router
from .levels import dot_level
from .schedule import (
    AttentionSchedule,
    ExpertSchedule,
    IndexSchedule,
    LeveledSchedule,
    MHCSchedule,
    ProductSchedule,
    UnpackedSchedule,
)


@dataclass(frozen=True)
class Family:
    """Kernels that are cut by one kind of schedule.

    Attributes:
        schedule: its class.
        outputs: of a product with packed weights, its panels of outputs and its inputs, from the factory's arguments.
        searched: numbers that a search tries; all of the class if None.
    """

    schedule: type[LeveledSchedule]
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


def tunable(kernel: Kernel, level: str) -> Tunable | None:
    """`kernel` for an x86-64 level; None if it has no schedule."""
    family = FAMILIES.get(kernel.factory)
    if family is None:
        return None
    found = key(kernel, level)
    found = replace(found, level=dot_level(level, found.dtype))
    searched = family.searched
    if found.dtype in (*QUANTISED, "fp4"):  # its sums are integers, which `quant_product` places
        searched = searched or ("row_block", "block_bytes", "rows_per_task")
    record = shipped().find(found)
    if record is None or record.parameters is None:
        return Tunable(found, kernel, family.default(named(kernel), level), searched)
    default = family.schedule.from_parameters(record.parameters, f"shipped {found}")
    return Tunable(found, kernel, default, searched, record)


@cache
def shipped() -> TuningDatabase:
    """The schedules that come with v4c, for common shapes."""
    records: list[Record] = []
    folder = resources.files(__package__).joinpath("tuned")
    for file in sorted(folder.iterdir(), key=lambda f: f.name):
        if file.name.endswith(".json"):
            records += TuningDatabase.from_document(json.loads(file.read_text()), file.name)
    return TuningDatabase(records)


def scheduler(level: str, tuning: TuningDatabase | None = None) -> Scheduler:
    """Of CPU kernels in code of an x86-64 level; records of this machine's processor are preferred."""
    return Scheduler(lambda kernel: tunable(kernel, level), tuning, processor())
