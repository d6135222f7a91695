"""The CPU target: which x86-64 level code is made for, and the compilation of a Relax module into a library."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from v4c.errors import UnsupportedError
from v4c.passes.pipeline import PassOptions, relax_pipeline
from v4c.passes.relax.kernel_table import kernel_table
from v4c.passes.relax.layouts import WeightSpec

from ..tuning_database import TuningDatabase
from .levels import GENERIC, LEVELS, machine_features, psabi
from .lowering import CPUKernels
from .packing import pack, pack_unit
from .stack import on_stack


@dataclass(frozen=True)
class CPUTarget:
    """Code for one x86-64 level, or for the baseline of another architecture (``generic``).

    Attributes:
        level: name of the level.
        tuning: schedules to prefer to those that come with v4c.
    """

    level: str
    tuning: TuningDatabase | None = field(default=None, compare=False)

    @classmethod
    def parse(cls, variant: str, tuning: TuningDatabase | None = None) -> CPUTarget:
        """``""`` is the highest level this machine has; otherwise a level's name."""
        if variant == "":
            if platform.machine() not in ("x86_64", "AMD64"):
                return cls(GENERIC, tuning)
            have = machine_features()
            return cls(next(level for level, flags in reversed(LEVELS.items()) if have.issuperset(flags)), tuning)
        if variant not in (*LEVELS, GENERIC):
            raise UnsupportedError(f"target cpu:{variant}: expected one of {', '.join((*LEVELS, GENERIC))}")
        return cls(variant, tuning)

    @property
    def name(self) -> str:
        return f"cpu:{self.level}"

    @property
    def features(self) -> tuple[str, ...]:
        return LEVELS.get(self.level, ())

    @property
    def psabi_level(self) -> str:
        """The level of the psABI that this one is or extends."""
        return psabi(self.level)

    @cached_property
    def kernels(self) -> CPUKernels:
        return CPUKernels(self.level, self.tuning)

    @property
    def notes(self) -> dict[str, Any]:
        return {"tuning": self.kernels.scheduler.notes()}

    def pack(self, weight: WeightSpec, array: np.ndarray) -> np.ndarray:
        return pack(weight, array)

    def pack_unit(self, weight: WeightSpec) -> int | None:
        return pack_unit(weight)

    def llvm(self) -> Any:
        """TVM's description of this target."""
        from tvm import target as tvm_target

        described: dict[str, Any] = {"kind": "llvm", "num-cores": os.cpu_count() or 1}
        if self.level != GENERIC:
            described["mcpu"] = self.psabi_level
        if "avx512f" in self.features:
            # LLVM's default for the level splits 512-bit vectors in two; the kernels are written for whole ones.
            described["mattr"] = ["-prefer-256-bit"]
        if "avx512_vnni" in self.features:
            described["mattr"].append("+avx512vnni")
        if "avx512_bf16" in self.features:
            described["mattr"].append("+avx512bf16")
        return tvm_target.Target(described)

    def build(self, module: Any, library: Path, options: PassOptions) -> dict[str, list[Any]]:
        from tvm import relax, tirx

        from .kernels.limits import limits
        from .kernels.pair_product import with_instruction

        target = self.llvm()
        for variable, function in module.functions.items():
            if isinstance(function, tirx.PrimFunc):
                module[variable] = with_instruction(on_stack(function))
        lowered = relax_pipeline(target, options)(module)
        kernels = kernel_table(lowered)
        for name, function in limits(self.psabi_level).items():
            lowered[name] = on_stack(function)
        relax.build(lowered, target=target, relax_pipeline=None).export_library(str(library))
        return kernels
