"""ONNX Runtime as a peer: the file that `v4c.export` writes, with every cache bound as input and output at once.

Bound so, a step writes its rows and copies nothing (docs/architecture.md, the aliasing rule).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort

from benchmarks.peer_engine import Engine, State


class OnnxRuntimeEngine(Engine):
    """A session over an exported file."""

    def __init__(self, path: Path, threads: int, storage: str) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        self.session = ort.InferenceSession(path, options)
        self.caches = json.loads(self.session.get_modelmeta().custom_metadata_map["v4c.caches"])
        self.vocab_size = int(self.session.get_outputs()[0].shape[-1])
        self.version = f"onnxruntime {ort.__version__}"

    def begin(self, capacity: int) -> State:
        return _OnnxRuntimeState(self, capacity)


class _OnnxRuntimeState(State):
    def __init__(self, engine: OnnxRuntimeEngine, capacity: int) -> None:
        self._session = engine.session
        self._position = 0
        self._binding = self._session.io_binding()
        self._binding.bind_output("logits")  # first, so that it comes back first
        for spec in engine.caches:
            shape = [_size(dim, capacity) for dim in spec["shape"]]
            memory = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, spec["dtype"]))
            self._binding.bind_ortvalue_input(f"past.{spec['name']}", memory)
            self._binding.bind_ortvalue_output(f"present.{spec['name']}", memory)

    def read(self, tokens: np.ndarray) -> np.ndarray:
        inputs = {
            "input_ids": np.ascontiguousarray(tokens[None], np.int64),
            "positions": np.array([self._position], np.int64),
            "lengths": np.array([len(tokens)], np.int64),
        }
        for name, array in inputs.items():
            self._binding.bind_cpu_input(name, array)
        self._session.run_with_iobinding(self._binding)
        self._position += len(tokens)
        return np.asarray(self._binding.get_outputs()[0].numpy()[0])

    def restart(self) -> None:
        self._position = 0  # what lies in the caches from before is masked by position


def _size(dim: str | int, capacity: int) -> int:
    if isinstance(dim, int):
        return dim
    return 1 if dim == "batch" else -(-capacity // int(dim.removeprefix("rows")))
