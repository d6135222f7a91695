"""A checkpoint folder as a set of named tensors, whatever naming scheme and sharding it was saved with.

Opening reads headers only; `check` compares them with what the config calls for; `load` maps one tensor at a time,
joining per-expert matrices. Weights come from outside, so every path stays inside the folder and every id is
range-checked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np

from v4c.errors import CheckpointError, InputError, UnsupportedError

from .config import ModelConfig
from .names import TensorInfo, canonical, expert_parts, expert_piece, is_mtp, tensor_specs
from .safetensors_reader import StoredTensor, read_header
from .strict_json import read_object, show

SourceDtype = Literal["f32", "bf16", "f16", "int64"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_NUMPY_DTYPES: dict[str, np.dtype] = {
    "f32": np.dtype(np.float32),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f16": np.dtype(np.float16),
}
_FLOATS: dict[str, SourceDtype] = {"F32": "f32", "BF16": "bf16", "F16": "f16"}
_INTEGERS: dict[str, SourceDtype] = {"I64": "int64", "I32": "int64"}
_QUANTISED_DTYPES = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2", "I8", "U8")
_SCALE_SUFFIXES = (".scale", ".weight_scale", ".weight_scale_inv")


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
        skipped: tensors of the MTP layers, in the file's spelling.
        unused: tensors that belong to nothing v4c knows, in the file's spelling.
    """

    def __init__(self, folder: Path, config: ModelConfig, stored: dict[str, StoredTensor]) -> None:
        """For `open`. `stored` goes by the file's own names."""
        self.folder, self.config = folder, config
        self.specs = tensor_specs(config)
        self._stored: dict[str, StoredTensor] = {}
        self.skipped = sorted(name for name in stored if is_mtp(config, name))
        for name in sorted(stored.keys() - self.skipped):
            known = canonical(name)
            if known in self._stored:
                raise CheckpointError(
                    f"{folder}: {known}: expected it once, found {self._stored[known].name} and {name}"
                )
            self._stored[known] = stored[name]
        self._pieces = {name: self._find(name) for name in self.specs}
        used = {piece for pieces in self._pieces.values() for piece in pieces}
        self.unused = sorted(tensor.name for known, tensor in self._stored.items() if known not in used)

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read the config, the index and all headers of a checkpoint in Hugging Face's or upstream's layout.

        Raises:
            ConfigError: about ``config.json``.
            CheckpointError: a file missing, damaged or outside the folder; a tensor not where the index says.
            UnsupportedError: a model family that v4c refuses.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: expected a checkpoint folder, found {'a file' if folder.exists() else 'nothing'}"
            )
        return cls(folder, ModelConfig.from_file(folder), _read_headers(folder))

    def names(self) -> tuple[str, ...]:
        """Every tensor the config calls for, by its Hugging Face name."""
        return tuple(self.specs)

    @property
    def total_bytes(self) -> int:
        """Bytes on disk of the tensors the model uses."""
        return sum(
            self._stored[piece].nbytes for pieces in self._pieces.values() for piece in pieces if piece in self._stored
        )

    @property
    def tokenizer_path(self) -> Path | None:
        """The folder's ``tokenizer.json``, if it has one."""
        path = self.folder / "tokenizer.json"
        return path if path.is_file() else None

    def source_dtype(self, name: str) -> SourceDtype:
        """The dtype `name` is stored in. Raises as `check` does for this tensor."""
        self._check_tensor(name)
        stored = self._stored[self._pieces[name][0]]
        return (_FLOATS | _INTEGERS)[stored.dtype]

    def check(self) -> None:
        """Compare all names, shapes and dtypes with the config, without reading any data.

        Raises:
            CheckpointError: a tensor that is missing or has the wrong shape or dtype.
            UnsupportedError: quantised weights.
        """
        for tensor in self._stored.values():
            if tensor.name.endswith(_SCALE_SUFFIXES) and tensor.name in self.unused:
                raise self._quantised(tensor)
        for name in self.specs:
            self._check_tensor(name)

    def load(self, name: str, dtype: str | None = None) -> np.ndarray:
        """One tensor, joined and converted; nothing is kept.

        Args:
            name: a Hugging Face name out of `names`.
            dtype: ``"f32"``, ``"bf16"`` or ``"f16"`` for ``"weight"`` tensors, None for the stored one. Others are
                float32 or int64 always.

        Returns:
            Of the shape in `names.tensor_specs`. A read-only memory map where the file already holds exactly that.

        Raises:
            CheckpointError: as `check`, and for ids out of range.
            InputError: an unknown `dtype`.
            UnsupportedError: a quantised tensor.
        """
        self._check_tensor(name)
        info, pieces = self.specs[name], self._pieces[name]
        if len(pieces) == 1 and pieces[0] == name:
            array = cast(self._stored[name].map(), info, dtype)
        else:
            array = self._join(name, info, dtype)
        if info.kind == "int64":
            self._check_values(name, array)
        return array

    def _find(self, name: str) -> tuple[str, ...]:
        """Canonical names of the stored tensors that `name` is read from: itself, or its experts' matrices."""
        parts, _ = expert_parts(name)
        if not parts or name in self._stored:
            return (name,)
        layer = int(name.split(".")[2])
        pieces = tuple(expert_piece(layer, e, part) for e in range(self.config.n_routed_experts) for part in parts)
        return pieces if any(piece in self._stored for piece in pieces) else (name,)

    def _join(self, name: str, info: TensorInfo, dtype: str | None) -> np.ndarray:
        """Experts' matrices one below the other: for gate_up first the gate's rows, then those of up."""
        pieces = self._pieces[name]
        target = _float_dtype(dtype or self.source_dtype(name))
        joined = np.empty((len(pieces), info.shape[1] * info.shape[0] // len(pieces), info.shape[2]), target)
        for place, piece in enumerate(pieces):
            joined[place] = self._stored[piece].map()
        return joined.reshape(info.shape)

    def _check_tensor(self, name: str) -> None:
        """Presence, shape and dtype of what `name` is read from."""
        if name not in self.specs:
            raise CheckpointError(f"{self.folder}: expected the name of a tensor of this model, found {name}")
        info, pieces = self.specs[name], self._pieces[name]
        wanted = info.shape
        if pieces != (name,):
            wanted = (info.shape[0] * info.shape[1] // len(pieces), info.shape[2])
        allowed = _INTEGERS if info.kind == "int64" else _FLOATS
        dtypes = set()
        for piece in pieces:
            stored = self._stored.get(piece)
            if stored is None:
                raise CheckpointError(f"{self.folder}: {piece}: expected a tensor of shape {list(wanted)}, found none")
            if stored.dtype in _QUANTISED_DTYPES:
                raise self._quantised(stored)
            if stored.shape != wanted:
                found = f"found {list(stored.shape)} ({stored.name})"
                raise CheckpointError(f"{stored.file}: {piece}: expected shape {list(wanted)}, {found}")
            if stored.dtype not in allowed:
                found = f"found {stored.dtype} ({stored.name})"
                raise CheckpointError(f"{stored.file}: {piece}: expected one of {', '.join(allowed)}, {found}")
            dtypes.add(stored.dtype)
        if len(dtypes) > 1:
            raise CheckpointError(
                f"{self.folder}: {name}: expected one dtype for all experts, found {', '.join(sorted(dtypes))}"
            )

    def _quantised(self, tensor: StoredTensor) -> UnsupportedError:
        return UnsupportedError(
            f"{tensor.file}: {tensor.name}: expected F32, BF16 or F16 weights, found {tensor.dtype}: "
            "quantised checkpoints are not supported by this version yet"
        )

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


def _read_headers(folder: Path) -> dict[str, StoredTensor]:
    """All tensors by the file's names. The single file wins over an index, as in transformers."""
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.exists():
        return read_header(_inside(folder, SINGLE_FILE, str(single)))
    if not index.exists():
        raise CheckpointError(f"{folder}: expected {SINGLE_FILE} or {INDEX_FILE}, found neither")
    weight_map = read_object(index, CheckpointError).get("weight_map")
    if type(weight_map) is not dict or not weight_map:
        raise CheckpointError(
            f"{index}: weight_map: expected an object of tensor and file names, found {show(weight_map)}"
        )
    shards: dict[str, dict[str, StoredTensor]] = {}
    for name, file in weight_map.items():
        if type(file) is not str or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {name}: expected the name of a .safetensors file, found {show(file)}")
        if file not in shards:
            shards[file] = read_header(_inside(folder, file, f"{index}: {name}"))
    for name, file in weight_map.items():
        if name not in shards[file]:
            others = [other for other, tensors in shards.items() if name in tensors]
            found = f"it in {others[0]}" if others else "it nowhere"
            raise CheckpointError(f"{index}: {name}: expected in {file}, found {found}")
    return {name: shards[file][name] for name, file in weight_map.items()}


def _inside(folder: Path, file: str, source: str) -> Path:
    """The path of `file`, which must be a file in `folder` even after following links.

    Hugging Face's download cache is the one exception: its snapshots are links into ``blobs`` two folders up.
    """
    path = folder / file
    try:
        resolved, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError, ValueError) as failure:  # a loop of links; a null byte
        raise CheckpointError(
            f"{source}: expected a file in the checkpoint folder, found {show(file)}: {failure}"
        ) from None
    roots = [root]
    if root.parent.name == "snapshots":
        roots.append(root.parent.parent / "blobs")
    if Path(file).is_absolute() or ".." in Path(file).parts or not any(resolved.is_relative_to(top) for top in roots):
        raise CheckpointError(f"{source}: expected a file in the checkpoint folder, found {show(file)} outside it")
    if not resolved.is_file():
        raise CheckpointError(f"{source}: expected the file {path}, found none")
    return path
