"""What the schedules of all targets share: named numbers by which kernels cut their work, with choices for a search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from v4c.errors import UnsupportedError


def knob(default: int, *choices: int) -> Any:
    """A number of a schedule with the values that a search tries."""
    return field(default=default, metadata={"choices": choices})


@dataclass(frozen=True)
class Schedule:
    """Numbers of one family of kernels, all positive; its form for JSON, and the choices of a search."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if type(value) is not int or value < 1:
                raise UnsupportedError(f"{type(self).__name__}: {name}: expected a positive integer, found {value!r}")
        problem = self.problem()
        if problem is not None:
            raise UnsupportedError(f"{type(self).__name__}: {problem}")

    def problem(self) -> str | None:
        """Why no kernel can be made by these numbers, or None."""
        return None

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any], where: str) -> Self:
        """From the numbers by name; UnsupportedError, which begins with `where`, if they are not those of the class."""
        expected = [f.name for f in fields(cls)]
        if sorted(parameters) != sorted(expected):
            raise UnsupportedError(
                f"{where}: expected the numbers {', '.join(expected)}, found {', '.join(sorted(parameters)) or 'none'}"
            )
        try:
            return cls(**parameters)
        except UnsupportedError as error:
            raise UnsupportedError(f"{where}: {error}") from None

    @property
    def parameters(self) -> dict[str, int]:
        """The numbers by name."""
        return asdict(self)

    @classmethod
    def choices(cls) -> dict[str, tuple[int, ...]]:
        """The values that a search tries, by name."""
        return {f.name: f.metadata["choices"] for f in fields(cls)}
