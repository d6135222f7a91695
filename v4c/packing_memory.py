"""How much memory packing takes, from sizes alone: what ``--dry-run`` and ``v4c inspect --preset`` say."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from v4c.frontend.config import ModelConfig

SLICE_BYTES = 128 << 20
"""Most bytes of a slice as float32, where the target's smallest run of rows is not larger."""
_COPIES = 5
"""Arrays as large as a slice that are alive at once: as stored, dequantised, converted, packed, and one in between."""
_BASE_BYTES = 800 << 20
"""Resident before the first weight is read: Python, torch, TVM and the module (measured 0.5 to 0.8 GiB)."""


def peak_bytes_for(slice_bytes: int) -> int:
    """About how much memory a compilation takes whose largest slice is this large, libraries included."""
    return _BASE_BYTES + _COPIES * slice_bytes


def peak_bytes_of(config: ModelConfig) -> int:
    """`peak_bytes_for` a model: its largest slice is an expert, the shared one, or `SLICE_BYTES`."""
    from v4c.frontend.names import tensor_specs

    expert = 4 * 2 * config.moe_intermediate_size * config.hidden_size
    largest = max(4 * info.size for info in tensor_specs(config).values())
    return peak_bytes_for(min(largest, max(expert, SLICE_BYTES)))
