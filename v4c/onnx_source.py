"""An ONNX file that v4c exported, as a source of the graph and of the weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from v4c.errors import CheckpointError, UnsupportedError
from v4c.frontend.config import ModelConfig
from v4c.frontend.mtp_graph import STREAMS


class OnnxSource:
    """An ONNX file that `v4c.export` wrote.

    Raises:
        CheckpointError: the file is missing or not ONNX.
        UnsupportedError: it was not exported by v4c.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise CheckpointError(f"{path}: expected an ONNX file, found none")
        try:
            self.model = ir.load(path)
        except Exception as error:  # protobuf raises its own kinds for any damage
            raise CheckpointError(f"{path}: expected an ONNX file, found {type(error).__name__}: {error}") from error
        if "v4c.config" not in self.model.metadata_props:
            raise UnsupportedError(f"{path}: expected a model exported by v4c (metadata v4c.config), found none")
        if any(value.name == STREAMS for value in self.model.graph.inputs):
            raise UnsupportedError(f"{path}: expected a model, found an MTP layer: compile the checkpoint instead")
        for value in [v for v in self.model.graph.outputs if v.name == STREAMS]:  # exported for an MTP layer
            self.model.graph.outputs.remove(value)
        self.config = ModelConfig.from_dict(json.loads(self.model.metadata_props["v4c.config"]), str(path))
        self._tensors = {name: value.const_value for name, value in self.model.graph.initializers.items()}

    @property
    def has_weights(self) -> bool:
        """False for a graph exported without weights."""
        return not {v.name for v in self.model.graph.inputs}.intersection(self.names())

    def names(self) -> list[str]:
        """Names of the weights."""
        return list(json.loads(self.model.metadata_props["v4c.weights"]))

    def load(self, name: str, dtype: str | None = None) -> np.ndarray:
        """One weight; float32 when `dtype` is ``f32``, else as stored."""
        array = self.tensor(name).read()
        return array.astype(np.float32) if dtype == "f32" and array.dtype != np.float32 else array

    def tensor(self, name: str) -> OnnxRows:
        """A weight that is read in slices."""
        value = self._tensors.get(name)
        if value is None:
            raise CheckpointError(f"{self.path}: weight {name}: expected an initializer, found none")
        return OnnxRows(self.path, name, value)

    def identity(self) -> list[Any]:
        """What the weights are read from: path, size and time of change of each file."""
        external = [t for t in self._tensors.values() if isinstance(t, ir.ExternalTensor)]
        files = {self.path, *(Path(tensor.path) for tensor in external)}
        found = [(file, file.stat()) for file in sorted(files) if file.exists()]
        return [[str(file.resolve()), stat.st_size, stat.st_mtime_ns] for file, stat in found]


@dataclass(frozen=True)
class OnnxRows:
    """One weight, read in slices; the file is mapped for each slice only, so that what was read does not stay."""

    path: Path
    name: str
    value: ir.TensorProtocol

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(self.value.shape.numpy())

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Elements ``[start, stop)`` of the first axis, as stored; a copy.

        Raises:
            CheckpointError: the data file is missing, too short, or outside the model's folder.
        """
        try:
            array = self.value.numpy()
            taken = np.array(array[start:stop] if array.ndim else array)
            if isinstance(self.value, ir.ExternalTensor):
                del array  # the map cannot be closed while arrays look into it
                self.value.release()
            return taken
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: weight {self.name}: its data cannot be read: {error}") from error
