"""The layout of ``weights-00001.safetensors`` and its successors: which weight lies where, and each file's header.

safetensors allows no gaps between tensors, so where a weight does not end on a 64-byte boundary a small ``uint8``
tensor of zeros named ``padding.N`` fills the space; any safetensors reader opens the files.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from v4c.runtime.dtypes import DTYPES
from v4c.runtime.manifest import ALIGNMENT, StoredWeight, WeightSpec


@dataclass(frozen=True)
class Shard:
    """One weights file: its name, its leading bytes, and its weights in order."""

    file: str
    header: bytes
    weights: tuple[StoredWeight, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self.weights[-1].offset + self.weights[-1].nbytes


def plan_shards(specs: Sequence[WeightSpec], shard_bytes: int) -> list[Shard]:
    """Divide ``specs``, in order, into files of at most ``shard_bytes`` bytes of tensors, and at least one tensor."""
    groups: list[list[WeightSpec]] = []
    filled = 0
    for spec in specs:
        size = _padded(spec.nbytes)
        if not groups or filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += size
    return [_shard(f"weights-{number:05d}.safetensors", group) for number, group in enumerate(groups, start=1)]


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _shard(file: str, specs: Sequence[WeightSpec]) -> Shard:
    entries: dict[str, dict[str, object]] = {}
    starts: list[int] = []
    end = 0
    for spec in specs:
        start = _padded(end)
        if start > end:
            entries[f"padding.{len(starts)}"] = _entry("U8", (start - end,), end, start)
        end = start + spec.nbytes
        entries[spec.name] = _entry(DTYPES[spec.dtype].safetensors, spec.shape, start, end)
        starts.append(start)
    text = json.dumps(entries, separators=(",", ":")).encode()
    # Trailing spaces, which the format allows, bring the first tensor to the boundary as well.
    text += b" " * (_padded(8 + len(text)) - 8 - len(text))
    header = struct.pack("<Q", len(text)) + text
    weights = tuple(
        StoredWeight(spec.name, spec.dtype, tuple(spec.shape), file, len(header) + start, on_host=spec.on_host)
        for spec, start in zip(specs, starts, strict=True)
    )
    return Shard(file, header, weights)


def _entry(code: str, shape: Sequence[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
