"""Targets by name: ``cpu``, ``cuda`` and ``ascend``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from v4c.errors import UnsupportedError

if TYPE_CHECKING:
    from v4c.progress import Progress

    from .ascend.tile_database import TileDatabase
    from .base import Target
    from .tuning_database import TuningDatabase

Kind = TypeVar("Kind")

NAMES = ("cpu", "cuda", "ascend")

_added: dict[str, Callable[[str], Target]] = {}


def add_target(name: str, parse: Callable[[str], Target]) -> None:
    """Have this process know another target.

    Args:
        name: what stands before the colon, such as ``mychip``; it must not be taken.
        parse: makes the target of what stands behind it, ``""`` where there is no colon.

    Raises:
        UnsupportedError: the name is taken, or holds a colon.
    """
    if name in (*NAMES, *_added) or not name or ":" in name:
        raise UnsupportedError(f"target {name!r}: expected a name of its own without a colon, found one that is taken")
    _added[name] = parse


def find(
    text: str,
    tuning: TuningDatabase | TileDatabase | None = None,
    strict: bool = False,
    progress: Progress | None = None,
) -> Target:
    """The target that a string such as ``cpu:x86-64-v3``, ``cuda:sm_90a`` or ``ascend:Ascend910B1`` names.

    Args:
        text: name, and after a colon the variant: an x86-64 level, an architecture, or a device.
        tuning: schedules of CPU or CUDA kernels to prefer to those that come with v4c, or tiles of Ascend products.
        strict: whether a kernel that the device does not take is an error, rather than left to the host.
        progress: told of what the target does on its own, such as checking kernels.

    Raises:
        UnsupportedError: no such target, which is listed, or variant, or something it needs is not installed.
    """
    name, _, variant = text.partition(":")
    if name == "cpu":
        from .cpu.target import CPUTarget
        from .tuning_database import TuningDatabase

        return CPUTarget.parse(variant, _of_kind(tuning, TuningDatabase, text))
    if name == "cuda":
        from .cuda.target import CUDATarget
        from .tuning_database import TuningDatabase

        return CUDATarget.parse(variant, _of_kind(tuning, TuningDatabase, text))
    if name == "ascend":
        from .ascend.target import AscendTarget
        from .ascend.tile_database import TileDatabase

        return AscendTarget.parse(variant, _of_kind(tuning, TileDatabase, text), strict, progress)
    if name in _added:
        return _added[name](variant)
    raise UnsupportedError(f"target {text!r}: expected one of {', '.join((*NAMES, *_added))} (optionally :variant)")


def _of_kind(tuning: Any, kind: type[Kind], text: str) -> Kind | None:
    """`tuning` if it is of the target's kind; UnsupportedError where it was made for another target."""
    if tuning is None or isinstance(tuning, kind):
        return tuning
    raise UnsupportedError(f"tuning: expected a {kind.__name__} for target {text}, found a {type(tuning).__name__}")
