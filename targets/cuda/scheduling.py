"""Which CUDA kernels have a schedule (`v4c.targets.scheduler`), and of which kind.

In a tuning database a record's ``level`` is the architecture, its machine's ``cpu`` the GPU's name and ``cores`` the
number of its processors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from v4c.passes.relax.kernels import Kernel

from ..scheduler import Scheduler, Tunable, key
from ..tuning_database import TuningDatabase
from .architectures import find
from .kernels.attention import compressed_sparse_attention, heavily_compressed_attention, sliding_window_attention
from .kernels.experts import grouped_experts, mixture_of_experts
from .kernels.index import lightning_index
from .kernels.mhc import mhc_head, mhc_post_pre_norm, mhc_pre, mhc_pre_norm
from .kernels.products import grouped_linear, merged_linear
from .kernels.routing import topk_router
from .schedule import AttentionSchedule, ExpertSchedule, IndexSchedule, MHCSchedule, ProductSchedule, TemplateSchedule

FAMILIES: dict[Callable[..., Any], type[TemplateSchedule]] = {
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

_SEARCHED: dict[tuple[type[TemplateSchedule], str], tuple[str, ...]] = {
    (AttentionSchedule, "float32"): ("split_tokens", "splits", "warps"),
    (AttentionSchedule, "bfloat16"): ("split_tokens", "splits", "tile_keys"),
}
"""The numbers that make a difference, where not all of a schedule do: by the kernel's dtype."""

BY_NAME = {factory.__name__: factory for factory in FAMILIES}


def tunable(kernel: Kernel, architecture: str) -> Tunable | None:
    """`kernel` for an architecture; None if it has no schedule."""
    kind = FAMILIES.get(kernel.factory)
    if kind is None:
        return None
    found = key(kernel, architecture)
    searched = _SEARCHED.get((kind, found.dtype))
    return Tunable(found, kernel, kind.suited(find(architecture).shared_bytes), searched)


def scheduler(architecture: str, tuning: TuningDatabase | None = None) -> Scheduler:
    """Of CUDA kernels for an architecture."""
    return Scheduler(lambda kernel: tunable(kernel, architecture), tuning)
