"""How kernels cut their work: the numbers that tuning searches, with defaults for a chip of 100 to 150 processors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Self

from v4c.errors import UnsupportedError


def _knob(default: int, *choices: int) -> Any:
    return field(default=default, metadata={"choices": (default, *choices) if default not in choices else choices})


@dataclass(frozen=True)
class Schedule:
    """Numbers of one kind of kernel."""

    @classmethod
    def choices(cls) -> dict[str, tuple[int, ...]]:
        """What a search tries, by number."""
        return {f.name: f.metadata["choices"] for f in fields(cls)}

    @property
    def parameters(self) -> dict[str, int]:
        """The numbers by name."""
        return asdict(self)

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any], where: str) -> Self:
        """A schedule from a database's numbers; UnsupportedError names `where` and what is wrong."""
        expected = {f.name for f in fields(cls) if f.default is not MISSING}
        if set(parameters) != expected:
            raise UnsupportedError(f"{where}: expected {sorted(expected)}, found {sorted(parameters)}")
        for name, value in parameters.items():
            if type(value) is not int or value not in cls.choices()[name]:
                raise UnsupportedError(f"{where}: {name}: expected one of {cls.choices()[name]}, found {value!r}")
        return cls(**parameters)


@dataclass(frozen=True)
class ProductSchedule(Schedule):
    """A product with a weight.

    Attributes:
        few_rows: up to so many rows, outputs are computed by warps that read each weight once; above, in tiles.
        warp_outputs: outputs of a warp with one row, at most: independent reads under way.
        fill: warps that must be left when a warp takes several outputs, in hundreds.
        small_tile_rows: up to so many rows, tiles of 64 rows rather than 128.
    """

    few_rows: int = _knob(8, 1, 2, 4, 8)
    warp_outputs: int = _knob(4, 1, 2, 4)
    fill: int = _knob(10, 2, 5, 10, 20)
    small_tile_rows: int = _knob(64, 64, 128, 256)

    def outputs_per_warp(self, outputs: int, rows: int) -> int:
        """Outputs a warp computes for up to `rows` rows: several reads under way, but warps for every processor."""
        found = 1
        while (
            found * 2 <= max(1, self.warp_outputs // (2 if rows > 2 else 1))
            and outputs // (found * 2) >= self.fill * 100
        ):
            found *= 2
        return found


@dataclass(frozen=True)
class AttentionSchedule(Schedule):
    """Attention.

    Attributes:
        split_tokens: up to so many tokens, the keys of each are split over blocks.
        splits: into so many.
        warps: of a block, each of two heads, at most.
    """

    split_tokens: int = _knob(16, 4, 8, 16, 32)
    splits: int = _knob(16, 4, 8, 16, 32, 64)
    warps: int = _knob(8, 2, 4, 8)


@dataclass(frozen=True)
class ExpertSchedule(Schedule):
    """Routed experts.

    Attributes:
        few_tokens: up to so many tokens, outputs are computed by warps, pair by pair; above, in tiles of sorted pairs.
        tile_rows: pairs in a tile on the tensor cores.
    """

    few_tokens: int = _knob(8, 2, 4, 8, 16, 32)
    tile_rows: int = _knob(64, 64, 128)


@dataclass(frozen=True)
class IndexSchedule(Schedule):
    """The lightning indexer.

    Attributes:
        tokens: tokens whose scores are held at once: memory is so many times the compressed rows of the capacity.
    """

    tokens: int = _knob(32, 8, 16, 32, 64)


@dataclass(frozen=True)
class MHCSchedule(Schedule):
    """Hyper-connections.

    Attributes:
        columns: of each stream that one block takes of the product.
    """

    columns: int = _knob(512, 256, 512, 1024, 2048)

    def splits(self, width: int) -> int:
        """Blocks per token."""
        return max(1, width // self.columns)
