"""Runs an exported MLIR file in IREE, a compiler that shares nothing with v4c, with the caches its header lists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np


def header(path: Path, key: str) -> Any:
    """What the comment line ``// v4c.<key>`` of an exported file says."""
    start = f"// v4c.{key} = "
    line = next(line for line in path.read_text().splitlines() if line.startswith(start))
    return json.loads(line.removeprefix(start))


class IreeSession:
    """One exported file, compiled for this processor, and the caches of a batch, updated by every call."""

    def __init__(self, path: Path, batch: int, capacity: int, fill: float = 0.0) -> None:
        from iree import compiler, runtime

        code = compiler.compile_file(
            str(path),
            target_backends=["llvm-cpu"],
            extra_args=["--iree-llvmcpu-target-cpu=host", "--iree-llvmcpu-debug-symbols=false"],
        )
        config = runtime.Config("local-task")
        modules = [runtime.create_hal_module(config.vm_instance, config.device)]
        if (file := header(path, "mlir")["weights_file"]) is not None:
            weights = runtime.ParameterIndex()
            weights.load(str(path.parent / file))
            modules.insert(0, runtime.create_io_parameters_module(config.vm_instance, weights.create_provider("model")))
        modules.append(runtime.VmModule.copy_buffer(config.vm_instance, code))
        self._context = runtime.SystemContext(vm_modules=modules, config=config)
        self._main = self._context.modules.module.main
        self._specs = header(path, "caches")
        self.reset(batch, capacity, fill)

    def reset(self, batch: int, capacity: int, fill: float = 0.0) -> None:
        """New caches of `batch` rows for `capacity` tokens; float ones hold `fill`."""
        self.caches = []
        for spec in self._specs:
            shape = [
                batch if d == "batch" else -(-capacity // int(d.removeprefix("rows"))) if isinstance(d, str) else d
                for d in spec["shape"]
            ]
            self.caches.append(np.full(shape, fill if spec["dtype"] == "float32" else 0, spec["dtype"]))

    def step(self, ids: np.ndarray, positions: Any, lengths: Any, weights: tuple[np.ndarray, ...] = ()) -> np.ndarray:
        """Logits of ``ids [B, S]``; `positions` and `lengths` are ``[B]``, or one number for all rows."""
        rows = len(ids)
        where = [np.broadcast_to(np.asarray(v, np.int64), rows).copy() for v in (positions, lengths)]
        logits, *self.caches = map(np.asarray, self._main(np.ascontiguousarray(ids), *where, *self.caches, *weights))
        return logits
