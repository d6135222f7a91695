"""The Ascend target: tile programs for one device, gated, and a library that simulates them on x86.

No x86 package makes device objects, so what is built is everything up to there: HIVM text per tile program, a launch
plan, and the host graph with the same programs compiled for x86, which `v4c.load` runs anywhere. `finish` turns the
HIVM text into objects on a machine with CANN.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from v4c.errors import UnsupportedError
from v4c.passes.pipeline import PassOptions, relax_pipeline
from v4c.passes.relax.kernel_table import kernel_table
from v4c.passes.relax.layouts import Storage, WeightSpec
from v4c.progress import Progress
from v4c.targets.cpu.stack import on_stack
from v4c.targets.cpu.target import CPUTarget

from . import packing
from .devices import Device, find_device
from .library import CPU, simulation_objects
from .lowering import CACHES, AscendKernels, Product
from .partition import Partition
from .plan import FILE, launch_plan, plan_files
from .tile_database import TileDatabase
from .tiles import ProductTiles
from .toolchain import find as find_toolchain
from .toolchain import tool

WITHOUT = (
    "fuse-topk-router", "split-hash-route", "fuse-shared-expert", "fuse-rotary-query-kv", "fuse-derotation",
    "fuse-index-rope", "merge-compressors", "fuse-mhc-norm", "merge-projections", "fuse-norm-projection",
    "open-layer-borders", "fuse-mhc-post-pre",
)  # fmt: skip
"""Passes that make operators for which there is no tile program."""

_HALVES = {"float32": "float16", "bfloat16": "bfloat16"}


@dataclass
class AscendTarget:
    """Tile programs for one device.

    Attributes:
        device: whose.
        strict: whether a program that a gate refuses is an error.
        progress: told of every step, and of every operation that the host takes over.
        tiles: of products, as `tune` found them.
        attachments: after `build`, the launch plan and the texts of all programs.
    """

    device: Device
    strict: bool = False
    progress: Progress | None = None
    tiles: Mapping[Product, ProductTiles] = field(default_factory=dict)
    attachments: Mapping[str, bytes] = field(default_factory=dict)
    _partition: Partition | None = None

    @classmethod
    def parse(
        cls, variant: str, tuning: TileDatabase | None = None, strict: bool = False, progress: Progress | None = None
    ) -> AscendTarget:
        """``""`` is `devices.DEFAULT`.

        Raises:
            ToolMissing: something is not installed; one line says what to install.
            UnsupportedError: no such device, or `tuning` is of another.
        """
        device = find_device(variant)
        tiles = {} if tuning is None else tuning.tiles(device)
        find_toolchain()
        for name, package in (("mlir-opt", "mlir-19-tools"), ("llc", "llvm-19")):
            tool(name, package)
        return cls(device, strict, progress, tiles)

    @property
    def name(self) -> str:
        return f"ascend-sim:{self.device.name}"

    @property
    def features(self) -> tuple[str, ...]:
        """Of the machine that simulates."""
        return self._host.features

    @cached_property
    def _host(self) -> CPUTarget:
        return CPUTarget(CPU)

    @cached_property
    def kernels(self) -> AscendKernels:
        return AscendKernels(self.device.limits, self.tiles)

    @property
    def without_passes(self) -> tuple[str, ...]:
        return WITHOUT

    @property
    def plan_file(self) -> str:
        return FILE

    @property
    def cache_dtypes(self) -> Mapping[str, str]:
        return CACHES

    def storage(self, asked: Storage) -> Storage:
        """Matrices and tables in half precision: the cube has no other product of weights that is worth its bytes."""
        for dtype in (asked.tables, asked.products):
            if dtype not in _HALVES:
                raise UnsupportedError(f"target ascend: weights stored as {dtype}: expected f32 or bf16, not quantised")
        return Storage(_HALVES[asked.tables], _HALVES[asked.products])

    @property
    def notes(self) -> dict[str, Any]:
        fallbacks = {} if self._partition is None else dict(self._partition.fallbacks)
        return {"device": self.device.name, "host_fallbacks": fallbacks}

    def pack(self, weight: WeightSpec, array: np.ndarray) -> np.ndarray:
        return packing.pack(weight, array)

    def pack_unit(self, weight: WeightSpec) -> int | None:
        return packing.pack_unit(weight)

    def build(self, module: Any, library: Path, options: PassOptions) -> dict[str, list[Any]]:
        from tvm import relax, tirx

        operations = self.kernels.operations
        self._partition = Partition.of(operations, self.kernels.too_large, self.device, self.strict, self.progress)
        plan = launch_plan(module, operations, self._partition, self.device)
        self.attachments = plan_files(plan, operations, self._partition)
        target = self._host.llvm()
        for variable, function in module.functions.items():
            if isinstance(function, tirx.PrimFunc):
                module[variable] = on_stack(function)
        lowered = relax_pipeline(target, options)(module)
        kernels = kernel_table(lowered)
        with tempfile.TemporaryDirectory(prefix="v4c-ascend-") as scratch:
            objects = simulation_objects(operations, Path(scratch), self.progress)
            built = relax.build(lowered, target=target, relax_pipeline=None)
            built.export_library(str(library), addons=objects, options=["-lm", "-Wl,-Bsymbolic"])
        return kernels
