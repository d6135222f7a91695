"""A checkpoint folder as a set of named tensors, whatever naming scheme, sharding and number format it was saved in.

Opening reads headers only; `check` compares them with what the config calls for; `load` and `tensor` map what is asked
for, joining per-expert matrices and applying block scales. Weights come from outside, so every path stays inside the
folder and every id is range-checked.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from v4c.errors import CheckpointError, ConfigError, InputError

from .block_formats import FORMATS
from .config import ModelConfig
from .names import TensorInfo, canonical, expert_parts, expert_piece, is_mtp, mtp_specs, scaled_weight, tensor_specs
from .native_layout import check_quantization
from .safetensors_reader import StoredTensor
from .shard_index import INDEX_FILE, SINGLE_FILE, read_headers
from .strict_json import read_object, show
from .tensor_handle import StoredFormat, StoredMatrix, TensorHandle, stored_format

__all__ = ["INDEX_FILE", "SINGLE_FILE", "Checkpoint", "StoredFormat", "TensorHandle", "cast"]

_NUMPY_DTYPES: dict[str, np.dtype] = {
    "f32": np.dtype(np.float32),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f16": np.dtype(np.float16),
}


def cast(array: np.ndarray, info: TensorInfo, dtype: str | None) -> np.ndarray:
    """`array` in the dtype that `Checkpoint.load` promises; the same array where nothing changes.

    Only ``"weight"`` tensors follow `dtype`: the others are float32 or int64 always.
    """
    if info.kind == "int64":
        return array.astype(np.int64, copy=False)
    if info.kind == "fp32":
        return array.astype(np.float32, copy=False)
    return array if dtype is None else array.astype(_float_dtype(dtype), copy=False)


def _float_dtype(dtype: str) -> np.dtype:
    if dtype not in _NUMPY_DTYPES:
        raise InputError(f"dtype: expected one of {', '.join(_NUMPY_DTYPES)}, found {dtype!r}")
    return _NUMPY_DTYPES[dtype]


class Checkpoint:
    """An opened checkpoint. Make one with `open`.

    Attributes:
        folder: where it lies.
        config: its parsed ``config.json``.
        specs: tensors of the model by canonical name.
        mtp_specs: those of the MTP layers that the file holds whole; `tensor` reads them, the model does not use them.
        skipped: tensors of the MTP layers, in the file's spelling.
        unused: tensors that belong to nothing v4c knows, in the file's spelling.
    """

    def __init__(self, folder: Path, config: ModelConfig, stored: dict[str, StoredTensor]) -> None:
        """For `open`. `stored` goes by the file's own names."""
        self.folder, self.config = folder, config
        self.specs = tensor_specs(config)
        self.skipped = sorted(name for name in stored if is_mtp(config, name))
        self._stored: dict[str, StoredTensor] = {}
        self._scales: dict[str, StoredTensor] = {}
        for name in sorted(stored):
            weight = scaled_weight(name)
            known, tensors = (canonical(name), self._stored) if weight is None else (weight, self._scales)
            if known in tensors:
                raise CheckpointError(f"{folder}: {known}: expected it once, found {tensors[known].name} and {name}")
            tensors[known] = stored[name]
        extra = mtp_specs(config) if self.skipped else {}
        self._pieces = {name: self._find(name) for name in (*self.specs, *extra)}
        used = {piece for pieces in self._pieces.values() for piece in pieces}
        self.unused = sorted(
            tensor.name
            for tensors in (self._stored, self._scales)
            for known, tensor in tensors.items()
            if known not in used and not is_mtp(config, tensor.name)
        )
        self.mtp_specs = self._whole_layers(extra)

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read the config, the index and all headers of a checkpoint in Hugging Face's or upstream's layout.

        Raises:
            ConfigError: about ``config.json``.
            CheckpointError: a file missing, damaged or outside the folder; a tensor not where the index says.
            UnsupportedError: a model family or a quantisation that v4c refuses.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: expected a checkpoint folder, found {'a file' if folder.exists() else 'nothing'}"
            )
        config = ModelConfig.from_file(folder)
        check_quantization(read_object(folder / "config.json", ConfigError), str(folder / "config.json"))
        return cls(folder, config, read_headers(folder))

    def names(self) -> tuple[str, ...]:
        """Every tensor the config calls for, by its Hugging Face name."""
        return tuple(self.specs)

    @property
    def total_bytes(self) -> int:
        """Bytes on disk of the tensors the model uses, scales included."""
        pieces = {piece for name in self.specs for piece in self._pieces[name]}
        return sum(t.nbytes for tensors in (self._stored, self._scales) for p, t in tensors.items() if p in pieces)

    @property
    def tokenizer_path(self) -> Path | None:
        """The folder's ``tokenizer.json``, if it has one."""
        path = self.folder / "tokenizer.json"
        return path if path.is_file() else None

    def identity(self) -> list[Any]:
        """What the weights are read from: path, size and time of change of each file."""
        files = {tensor.file for tensor in self._stored.values()}
        return [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(files) if f.exists()]

    def source_dtype(self, name: str) -> StoredFormat:
        """What `name` is stored as. Raises as `check` does for this tensor."""
        return self._check_tensor(name)

    def check(self) -> None:
        """Compare all names, shapes and dtypes with the config, without reading any data.

        Raises:
            CheckpointError: a tensor that is missing or has the wrong shape or dtype; scales without their weight.
            UnsupportedError: a quantised format that v4c does not read.
        """
        for known, scale in self._scales.items():
            if known not in self._stored and not is_mtp(self.config, scale.name):
                raise CheckpointError(
                    f"{scale.file}: {scale.name}: expected the weight it scales beside it, found none"
                )
        for name in self.specs:
            self._check_tensor(name)

    def tensor(self, name: str) -> TensorHandle:
        """A handle that reads slices of a tensor of floats, or its raw codes and scales.

        Args:
            name: out of `names` or of `mtp_specs`.

        Raises:
            InputError: it holds ids, which `load` reads and checks as a whole.
            CheckpointError, UnsupportedError: as `check`.
        """
        form = self._check_tensor(name)
        if form == "int64":
            raise InputError(f"{name}: expected a tensor of floats, found ids: load reads them")
        shape, pieces = self._info(name).shape, self._pieces[name]
        whole = self._stored[name] if pieces == (name,) and form not in FORMATS else None
        parts = max(1, len(pieces) // shape[0]) if pieces != (name,) else 1
        nbytes = sum(t[p].nbytes for t in (self._stored, self._scales) for p in pieces if p in t)
        return TensorHandle(name, shape, form, nbytes, whole, partial(self._matrix, name), parts)

    def load(self, name: str, dtype: str | None = None) -> np.ndarray:
        """One tensor, joined and converted; nothing is kept.

        Args:
            name: a Hugging Face name out of `names`.
            dtype: ``"f32"``, ``"bf16"`` or ``"f16"`` for ``"weight"`` tensors, None for the stored one (float32 for
                quantised ones). Others are float32 or int64 always.

        Returns:
            Of the shape in `names.tensor_specs`. A read-only memory map where the file already holds exactly that.

        Raises:
            CheckpointError: as `check`, for ids out of range, and for codes or scales that are NaN.
            InputError: an unknown `dtype`.
            UnsupportedError: a quantised format that v4c does not read.
        """
        if self._check_tensor(name) != "int64":
            return cast(self.tensor(name).read(), self._info(name), dtype)
        array = cast(self._stored[name].map(), self._info(name), dtype)
        self._check_values(name, array)
        return array

    def _info(self, name: str) -> TensorInfo:
        return self.specs[name] if name in self.specs else self.mtp_specs[name]

    def _find(self, name: str) -> tuple[str, ...]:
        """Canonical names of the stored tensors that `name` is read from: itself, or its experts' matrices."""
        parts, _ = expert_parts(name)
        if not parts or name in self._stored:
            return (name,)
        experts = range(self.config.n_routed_experts)
        pieces = tuple(expert_piece(name, expert, part) for expert in experts for part in parts)
        return pieces if any(piece in self._stored for piece in pieces) else (name,)

    def _whole_layers(self, specs: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
        """The MTP layers of which every tensor is there; drafters of another make are not."""
        lacking = {
            name.split(".")[1] for name in specs if any(piece not in self._stored for piece in self._pieces[name])
        }
        return {name: info for name, info in specs.items() if name.split(".")[1] not in lacking}

    def _piece_shape(self, name: str) -> tuple[int, ...]:
        """Shape of each tensor that `name` is read from."""
        shape, pieces = self._info(name).shape, self._pieces[name]
        return shape if pieces == (name,) else (shape[0] * shape[1] // len(pieces), shape[2])

    def _matrix(self, name: str, place: int) -> StoredMatrix:
        """The matrix of `name` at `place`, as `TensorHandle` counts them; shapes have been checked."""
        pieces, shape = self._pieces[name], self._piece_shape(name)
        piece = pieces[0] if pieces == (name,) else pieces[place]
        stored, scale = self._stored[piece], self._scales.get(piece)
        if len(shape) == 3:
            stored, scale = stored.element(place), None if scale is None else scale.element(place)
        form = None if scale is None else FORMATS[self._format_of(name, piece)]
        return StoredMatrix(piece, shape[-2], shape[-1], form, stored, scale)

    def _format_of(self, name: str, piece: str) -> StoredFormat:
        stored = self._stored.get(piece)
        if stored is None:
            raise CheckpointError(
                f"{self.folder}: {piece}: expected a tensor of shape {list(self._piece_shape(name))}, found none"
            )
        return stored_format(piece, self._info(name), self._piece_shape(name), stored, self._scales.get(piece))

    def _check_tensor(self, name: str) -> StoredFormat:
        """Presence, shape and dtype of what `name` is read from, which must be the same for all experts."""
        if name not in self.specs and name not in self.mtp_specs:
            raise CheckpointError(f"{self.folder}: expected the name of a tensor of this model, found {name}")
        found = {self._format_of(name, piece): piece for piece in self._pieces[name]}
        if len(found) > 1:
            dtypes = ", ".join(sorted(self._stored[piece].dtype for piece in found.values()))
            raise CheckpointError(f"{self.folder}: {name}: expected one dtype for all experts, found {dtypes}")
        return next(iter(found))

    def _check_values(self, name: str, array: np.ndarray) -> None:
        """Ids index tables, and hash constants address memory: a value out of range must not get further than here."""
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else -1
        engram = self.config.engram
        if name.endswith("tid2eid"):
            self._check_range(name, array, self.config.n_routed_experts)
        elif name == "model.engram_lookup":
            self._check_range(name, array, self.config.vocab_size)
        elif engram is not None and name.endswith((".primes", ".offsets")):
            expected = engram.primes(layer) if name.endswith(".primes") else engram.offsets(layer)
            if not np.array_equal(array, expected):
                raise CheckpointError(
                    f"{self.folder}: {name}: expected the values that config.json implies, found others"
                )
        elif name.endswith(".multipliers"):
            self._check_range(name, array, np.iinfo(np.int64).max // self.config.vocab_size + 1)
            if (array % 2 == 0).any():
                raise CheckpointError(f"{self.folder}: {name}: expected odd numbers, found {show(array.tolist())}")

    def _check_range(self, name: str, array: np.ndarray, stop: int) -> None:
        if array.size and (array.min() < 0 or array.max() >= stop):
            raise CheckpointError(
                f"{self.folder}: {name}: expected values from 0 to {stop - 1}, found {array.min()} to {array.max()}"
            )
