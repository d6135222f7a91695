"""How kernels cut their work: the numbers that tuning searches, with defaults for a chip of 100 to 150 processors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from ..schedule import Schedule, knob


@dataclass(frozen=True)
class TemplateSchedule(Schedule):
    """A schedule whose numbers become template arguments: the device functions are made for the choices alone."""

    @classmethod
    def suited(cls, shared_bytes: int) -> Self:
        """The default on chips on which a block may have so much shared memory."""
        return cls()

    def problem(self) -> str | None:
        for name, choices in self.choices().items():
            if getattr(self, name) not in choices:
                return f"{name}: expected one of {', '.join(map(str, choices))}, found {getattr(self, name)}"
        return None


@dataclass(frozen=True)
class ProductSchedule(TemplateSchedule):
    """A product with a weight.

    Attributes:
        few_rows: up to so many rows, outputs are computed by warps that read each weight once; above, in tiles.
        warp_outputs: outputs of a warp with one row, at most: independent reads under way.
        fill: warps that must be left when a warp takes several outputs, in hundreds.
        small_tile_rows: up to so many rows, tiles of 64 rows rather than 128.
    """

    few_rows: int = knob(8, 1, 2, 4, 8)
    warp_outputs: int = knob(4, 1, 2, 4)
    fill: int = knob(10, 2, 5, 10, 20)
    small_tile_rows: int = knob(64, 64, 128, 256)

    def outputs_per_warp(self, outputs: int, rows: int) -> int:
        """Outputs a warp computes for up to `rows` rows: several reads under way, but warps for every processor."""
        found = 1
        while (
            found * 2 <= max(1, self.warp_outputs // (2 if rows > 2 else 1))
            and outputs // (found * 2) >= self.fill * 100
        ):
            found *= 2
        return found


TILE_MEMORY = {32: 163 << 10, 64: 227 << 10}
"""Bytes of shared memory that tiles of attention may take, by the most keys that they may have."""


@dataclass(frozen=True)
class AttentionSchedule(TemplateSchedule):
    """Attention.

    Attributes:
        split_tokens: up to so many tokens, the keys of each are split over blocks.
        splits: into so many.
        warps: of a block, each of two heads, at most (in float32).
        tile_keys: keys of a prompt's tile on tensor cores, at most: `TILE_MEMORY` says what they need.
    """

    split_tokens: int = knob(16, 4, 8, 16, 32)
    splits: int = knob(32, 4, 8, 16, 32, 64)
    warps: int = knob(8, 2, 4, 8)
    tile_keys: int = knob(32, 32, 64)

    @classmethod
    def suited(cls, shared_bytes: int) -> Self:
        return cls(tile_keys=max(keys for keys, needed in TILE_MEMORY.items() if needed <= shared_bytes))


@dataclass(frozen=True)
class ExpertSchedule(TemplateSchedule):
    """Routed experts.

    Attributes:
        few_tokens: up to so many tokens, outputs are computed by warps, pair by pair; above, in tiles of sorted pairs.
        tile_rows: pairs in a tile on the tensor cores.
    """

    few_tokens: int = knob(8, 2, 4, 8, 16, 32)
    tile_rows: int = knob(64, 64, 128)


@dataclass(frozen=True)
class IndexSchedule(TemplateSchedule):
    """The lightning indexer.

    Attributes:
        tokens: tokens whose scores are held at once: memory is so many times the compressed rows of the capacity.
    """

    tokens: int = knob(32, 8, 16, 32, 64)


@dataclass(frozen=True)
class MHCSchedule(TemplateSchedule):
    """Hyper-connections.

    Attributes:
        columns: of each stream that one block takes of the product.
    """

    columns: int = knob(512, 256, 512, 1024, 2048)

    def splits(self, width: int) -> int:
        """Blocks per token."""
        return max(1, width // self.columns)
