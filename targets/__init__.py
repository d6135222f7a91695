"""Targets by name: ``cpu``, and in later versions ``cuda`` and ``ascend``."""

from __future__ import annotations

from v4c.errors import UnsupportedError

from .base import Target

NAMES = ("cpu",)


def find(text: str) -> Target:
    """The target a string such as ``cpu`` or ``cpu:x86-64-v3`` names; UnsupportedError lists what there is."""
    name, _, variant = text.partition(":")
    if name == "cpu":
        from .cpu.target import CPUTarget

        return CPUTarget.parse(variant)
    raise UnsupportedError(f"target {text!r}: expected one of {', '.join(NAMES)} (optionally :variant)")
