"""The x86-64 levels that code is made for, and what this machine's processor has."""

from __future__ import annotations

from pathlib import Path

_V2 = ("ssse3", "sse4_1", "sse4_2", "popcnt", "cx16")
_V3 = (*_V2, "avx", "avx2", "fma", "bmi1", "bmi2", "f16c", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_V4_VNNI = (*_V4, "avx512_vnni")
LEVELS: dict[str, tuple[str, ...]] = {
    "x86-64": (),
    "x86-64-v2": _V2,
    "x86-64-v3": _V3,
    "x86-64-v4": _V4,
    "x86-64-v4-vnni": _V4_VNNI,
}
"""Microarchitecture levels of the x86-64 psABI, and the ``/proc/cpuinfo`` flags each stands for.

The last is none of the psABI's: ``x86-64-v4`` with the 8-bit products that quantised weights are multiplied with.
"""

GENERIC = "generic"
"""The baseline of another architecture."""


def psabi(level: str) -> str:
    """The level of the psABI that `level` is or extends."""
    return level.removesuffix("-vnni")


def has_vnni(level: str) -> bool:
    """Whether code for `level` may use AVX512-VNNI."""
    return "avx512_vnni" in LEVELS.get(level, ())


def machine_features() -> frozenset[str]:
    """Flags of this machine's processor, as Linux names them (empty elsewhere)."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    return frozenset()
