"""GPU architectures that code is made for, and what a chip needs to run it."""

from __future__ import annotations

from dataclasses import dataclass

from v4c.errors import UnsupportedError


@dataclass(frozen=True)
class Architecture:
    """One real architecture.

    Attributes:
        name: as nvcc names it.
        virtual: the PTX that is kept beside the machine code: what newer chips translate when the library is loaded.
        shared_bytes: shared memory a block may have (CUDA C++ Programming Guide, table of technical specifications).
    """

    name: str
    virtual: str
    shared_bytes: int

    @property
    def capability(self) -> tuple[int, int]:
        """Major and minor number of the chips that run its machine code."""
        digits = self.name.removeprefix("sm_").rstrip("af")
        return int(digits[:-1]), int(digits[-1])


ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("sm_80", "compute_80", 163 << 10),
        Architecture("sm_90a", "compute_90", 227 << 10),
        Architecture("sm_100a", "compute_100", 227 << 10),
    )
}
"""By name. Code for names that end in ``a`` runs on that one generation; the PTX beside it runs on newer ones."""

DEFAULT = "sm_90a"


def find(name: str) -> Architecture:
    """The architecture that a target string names after its colon; UnsupportedError lists them."""
    if name not in ARCHITECTURES:
        raise UnsupportedError(f"target cuda:{name}: expected one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]
