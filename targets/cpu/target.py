"""The CPU target: which x86-64 level code is made for, and the compilation of a Relax module into a library."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from v4c.errors import UnsupportedError
from v4c.passes.pipeline import PassOptions, relax_pipeline
from v4c.passes.relax.kernel_table import kernel_table
from v4c.passes.relax.layouts import WeightSpec

from .lowering import CPUKernels
from .packing import pack
from .stack import on_stack

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


def machine_features() -> frozenset[str]:
    """Flags of this machine's processor, as Linux names them (empty elsewhere)."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    return frozenset()


@dataclass(frozen=True)
class CPUTarget:
    """Code for one x86-64 level, or for the baseline of another architecture (``generic``)."""

    level: str

    @classmethod
    def parse(cls, variant: str) -> CPUTarget:
        """``""`` is the highest level this machine has; otherwise a level's name."""
        if variant == "":
            if platform.machine() not in ("x86_64", "AMD64"):
                return cls("generic")
            have = machine_features()
            return cls(next(level for level, flags in reversed(LEVELS.items()) if have.issuperset(flags)))
        if variant not in (*LEVELS, "generic"):
            raise UnsupportedError(f"target cpu:{variant}: expected one of {', '.join((*LEVELS, 'generic'))}")
        return cls(variant)

    @property
    def name(self) -> str:
        return f"cpu:{self.level}"

    @property
    def features(self) -> tuple[str, ...]:
        return LEVELS.get(self.level, ())

    @property
    def psabi_level(self) -> str:
        """The level of the psABI that this one is or extends."""
        return self.level.removesuffix("-vnni")

    @property
    def kernels(self) -> CPUKernels:
        return CPUKernels(vnni="avx512_vnni" in self.features)

    def pack(self, weight: WeightSpec, array: np.ndarray) -> np.ndarray:
        return pack(weight, array)

    def build(self, module: Any, library: Path, options: PassOptions) -> dict[str, list[Any]]:
        from tvm import relax, tirx
        from tvm import target as tvm_target

        from .kernels.limits import limits

        described: dict[str, Any] = {"kind": "llvm", "num-cores": os.cpu_count() or 1}
        if self.level != "generic":
            described["mcpu"] = self.psabi_level
        if "avx512f" in self.features:
            # LLVM's default for the level splits 512-bit vectors in two; the kernels are written for whole ones.
            described["mattr"] = ["-prefer-256-bit"]
        if "avx512_vnni" in self.features:
            described["mattr"].append("+avx512vnni")
        target = tvm_target.Target(described)
        for variable, function in module.functions.items():
            if isinstance(function, tirx.PrimFunc):
                module[variable] = on_stack(function)
        lowered = relax_pipeline(target, options)(module)
        kernels = kernel_table(lowered)
        for name, function in limits(self.psabi_level).items():
            lowered[name] = on_stack(function)
        relax.build(lowered, target=target, relax_pipeline=None).export_library(str(library))
        return kernels
