"""The x86-64 levels that code is made for, and what this machine's processor has."""

from __future__ import annotations

from pathlib import Path

from v4c.passes.relax.layouts import PAIRS

_V2 = ("ssse3", "sse4_1", "sse4_2", "popcnt", "cx16")
_V3 = (*_V2, "avx", "avx2", "fma", "bmi1", "bmi2", "f16c", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_V4_VNNI = (*_V4, "avx512_vnni")
_V4_BF16 = (*_V4_VNNI, "avx512_bf16")
LEVELS: dict[str, tuple[str, ...]] = {
    "x86-64": (),
    "x86-64-v2": _V2,
    "x86-64-v3": _V3,
    "x86-64-v4": _V4,
    "x86-64-v4-vnni": _V4_VNNI,
    "x86-64-v4-bf16": _V4_BF16,
}
"""Microarchitecture levels of the x86-64 psABI, and the ``/proc/cpuinfo`` flags each stands for.

The last two are none of the psABI's: ``x86-64-v4`` with the 8-bit products that quantised weights are multiplied with,
and with those of bfloat16 too.
"""

GENERIC = "generic"
"""The baseline of another architecture."""


def psabi(level: str) -> str:
    """The level of the psABI that `level` is or extends."""
    return level.removesuffix("-vnni").removesuffix("-bf16")


_DOTS = {"int8": "avx512_vnni", "int4": "avx512_vnni", "fp4": "avx512_vnni", PAIRS: "avx512_bf16"}
"""By storage dtype of the weights, what multiplies them with rows of few bits, several inputs at a time."""


def dots(level: str, dtype: str) -> bool:
    """Whether code for `level` may use the instruction that sums up products of weights stored as `dtype`."""
    return _DOTS.get(dtype) in LEVELS.get(level, ())


def dot_level(level: str, dtype: str) -> str:
    """The lowest level whose products of weights stored as `dtype` are those of `level`."""
    if not dots(level, dtype):
        return psabi(level)
    return next(name for name, flags in LEVELS.items() if _DOTS[dtype] in flags)


def machine_features() -> frozenset[str]:
    """Flags of this machine's processor, as Linux names them (empty elsewhere)."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    return frozenset()
