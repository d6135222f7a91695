"""The CUDA target: one GPU architecture, and the compilation of a Relax module into a library with its machine code."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from v4c.errors import UnsupportedError
from v4c.passes.pipeline import PassOptions, relax_pipeline
from v4c.passes.relax.kernel_table import kernel_table
from v4c.passes.relax.layouts import Layout, Storage, WeightSpec
from v4c.runtime import cuda_library

from ..tuning_database import TuningDatabase
from . import packing, toolchain
from .architectures import ARCHITECTURES, DEFAULT, Architecture, find
from .device_module import Compiler, machine_code
from .kernels.limits import limits
from .kernels.products import WEIGHTS
from .launch import CTYPES, SCRATCH
from .lowering import CUDAKernels
from .scheduling import scheduler


@dataclass(frozen=True)
class CUDATarget:
    """Code for one GPU architecture, with PTX for chips after it.

    Attributes:
        architecture: of the machine code.
        tuning: schedules to prefer to the defaults.
        compiler: what makes machine code of CUDA source; None is nvcc or NVRTC.
    """

    architecture: Architecture
    tuning: TuningDatabase | None = field(default=None, compare=False)
    compiler: Compiler | None = field(default=None, compare=False)

    @classmethod
    def parse(cls, variant: str, tuning: TuningDatabase | None = None) -> CUDATarget:
        """``""`` is the architecture of this machine's GPU, or `DEFAULT` where there is none; otherwise its name."""
        return cls(find(variant or _own() or DEFAULT), tuning)

    @property
    def name(self) -> str:
        return f"cuda:{self.architecture.name}"

    @property
    def features(self) -> tuple[str, ...]:
        return ()

    @cached_property
    def kernels(self) -> CUDAKernels:
        return CUDAKernels(scheduler(self.architecture.name, self.tuning))

    @property
    def notes(self) -> dict[str, Any]:
        compiled: dict[str, Any] = {"tuning": self.kernels.scheduler.notes()}
        return compiled | ({"cuda": self._made} if self._made else {})

    @cached_property
    def _made(self) -> dict[str, Any]:
        """What `build` found: the compiler, and the most any kernel takes."""
        return {}

    def check_storage(self, storage: Storage) -> None:
        if storage.kv != "f32":
            raise UnsupportedError(f"kv {storage.kv!r}: expected f32 for target cuda")
        if storage.activations != "float32":
            raise UnsupportedError("activations bf16: expected f32 for target cuda, whose bfloat16 weights imply it")
        if storage.tables not in (*CTYPES, "native"):
            raise UnsupportedError(f"tables: expected float32 or bfloat16 for target cuda, found {storage.tables}")
        if storage.products not in (*WEIGHTS, "native"):
            raise UnsupportedError(
                f"weights: expected {', '.join(WEIGHTS)} or native for target cuda, found {storage.products}"
            )

    def on_host(self, weight: WeightSpec) -> bool:
        return weight.layout == Layout.ENGRAM_TABLE

    def pack(self, weight: WeightSpec, array: np.ndarray) -> np.ndarray:
        return packing.pack(weight, array)

    def pack_unit(self, weight: WeightSpec) -> int | None:
        return packing.pack_unit(weight)

    def tvm_target(self) -> Any:
        """TVM's description of this target, its host code for any machine of this kind."""
        from tvm import target as tvm_target

        described = {
            "kind": "cuda", "arch": self.architecture.name, "max_num_threads": 1024, "thread_warp_size": 32,
            "max_shared_memory_per_block": self.architecture.shared_bytes,
        }  # fmt: skip
        return tvm_target.Target(described, host={"kind": "llvm", "num-cores": os.cpu_count() or 1})

    def build(self, module: Any, library: Path, options: PassOptions) -> dict[str, list[Any]]:
        from tvm import relax

        from .loops import schedule_loops
        from .scratch import provide_scratch
        from .side_stream import run_beside

        target = self.tvm_target()
        compiler = self.compiler or (lambda source: toolchain.compile_source(source, self.architecture))
        lowered = relax_pipeline(target, options, run_beside)(provide_scratch(module))
        kernels = _kernels(lowered)
        schedule_loops(lowered)
        for name, function in limits().items():
            lowered[name] = function
        with machine_code(compiler) as made:
            relax.build(lowered, target=target, relax_pipeline=None).export_library(str(library))
        if not made:
            raise UnsupportedError(f"target {self.name}: expected kernels in the module, found none")
        self._made.update(_summary(made))
        return kernels


def _kernels(lowered: Any) -> dict[str, list[Any]]:
    """`kernel_table`, with how many of a kernel's last arguments are its own memory, where there are any."""
    table = kernel_table(lowered)
    for variable, function in lowered.functions.items():
        attributes = function.attrs or {}
        own = int(attributes[SCRATCH]) if SCRATCH in attributes else 0
        if own and variable.name_hint in table:
            table[variable.name_hint].append(own)
    return table


def _own() -> str | None:
    """The newest architecture that this machine's GPU runs; None where there is no GPU."""
    try:
        capability = cuda_library.find_device().capability
    except UnsupportedError:
        return None
    fitting = [a.name for a in ARCHITECTURES.values() if a.capability <= capability]
    exact = [a.name for a in ARCHITECTURES.values() if a.capability == capability]
    return (exact or fitting)[-1] if fitting else None


def _summary(made: list[toolchain.Binary]) -> dict[str, Any]:
    found = [r for binary in made for r in binary.resources.values()]
    return {
        "compiler": made[0].compiler,
        "kernels": len(found),
        "registers": max((r.registers for r in found), default=0),
        "spilled_bytes": max((r.spilled for r in found), default=0),
    }
