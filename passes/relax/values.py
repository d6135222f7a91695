"""What stands for a value while a graph is imported, besides Relax variables and NumPy constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .layouts import WeightSpec


@dataclass(frozen=True)
class WeightUse:
    """A weight inside the graph being imported: its Relax parameter, and how it is packed."""

    var: Any
    spec: WeightSpec


class Shape(list[Any]):
    """An int64 vector known at import: ints and symbolic expressions. `scalar` marks a value of rank 0."""

    def __init__(self, values: Any, scalar: bool = False) -> None:
        super().__init__(values)
        self.scalar = scalar


@dataclass(frozen=True)
class Parts:
    """The outputs of a merged product: variables of one shape but for the last axis, along which the graph sees them
    joined. A Split of the same sizes takes them as they are."""

    tensors: tuple[Any, ...]

    @property
    def sizes(self) -> list[int]:
        """Width of every part."""
        return [int(t.ty.shape.values[-1]) for t in self.tensors]
