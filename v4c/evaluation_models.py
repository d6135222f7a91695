"""What can be evaluated: a compiled artifact, a checkpoint in torch, an exported file in ONNX Runtime."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from v4c.errors import CheckpointError, InputError, UnsupportedError
from v4c.runtime.text import Tokenizer


class Reader(Protocol):
    """Something that reads tokens from an empty cache and gives logits.

    Attributes:
        name: where it came from.
        kind: ``"artifact"``, ``"checkpoint"`` or ``"onnx"``.
        target: what computes.
        weights: what the weight matrices are stored as.
        vocab_size: token ids are below this.
        tokenizer: its tokenizer, or the path of one; None where it has none.
    """

    name: str
    kind: str
    target: str
    weights: str
    vocab_size: int

    @property
    def tokenizer(self) -> Tokenizer | Path | None:
        """See above."""

    def all_logits(self, ids: np.ndarray) -> np.ndarray:
        """``[B, S]`` int64 -> ``[B, S, V]`` float32."""

    def last_logits(self, ids: np.ndarray) -> np.ndarray:
        """``[B, S]`` int64 -> ``[B, V]`` float32, of the last token."""


def open_reader(path: str | os.PathLike[str], hide_rows: bool = False, threads: int | None = None) -> Reader:
    """What lies at `path`, by its look: an ``.onnx`` file, a checkpoint folder, else an artifact.

    Args:
        path: folder or file.
        hide_rows: hide every compressed row; checkpoints only.
        threads: of an artifact's kernels or of ONNX Runtime.

    Raises:
        UnsupportedError: `hide_rows` of another than a checkpoint.
        v4c.Error: it cannot be loaded.
    """
    place = Path(path)
    checkpoint = (place / "config.json").is_file() and not (place / "manifest.json").exists()
    if hide_rows and not checkpoint:
        raise UnsupportedError(f"{place}: expected a checkpoint to hide the compressed rows of, found another model")
    if checkpoint:
        return TorchReader(place, hide_rows)
    return OnnxReader(place, threads) if place.suffix == ".onnx" else ArtifactReader(place, threads)


class ArtifactReader:
    """A compiled model: whole texts as one prompt."""

    kind = "artifact"

    def __init__(self, path: Path, threads: int | None) -> None:
        from v4c.runtime.model import load

        self._model = load(path, threads=threads)
        self.name, self.vocab_size = str(path), self._model.vocab_size
        self.target = self._model.target.name
        self.weights = self._model.manifest.dtypes.weights

    @property
    def tokenizer(self) -> Tokenizer | Path | None:
        return self._model.tokenizer

    def all_logits(self, ids: np.ndarray) -> np.ndarray:
        return self._read(ids, True)

    def last_logits(self, ids: np.ndarray) -> np.ndarray:
        return self._read(ids, False)

    def _read(self, ids: np.ndarray, every: bool) -> np.ndarray:
        if ids.shape[1] > self._model.max_context:
            raise InputError(f"{self.name}: expected at most {self._model.max_context} tokens, found {ids.shape[1]}")
        with self._model.new_session(batch=len(ids), max_context=ids.shape[1]) as session:
            return session.prefill(ids, all_logits=every)


class TorchReader:
    """A checkpoint in the torch reference, float32."""

    kind, target = "checkpoint", "torch"

    def __init__(self, path: Path, hide_rows: bool = False) -> None:
        from v4c.frontend.checkpoint import Checkpoint
        from v4c.frontend.model.attention import Attention
        from v4c.frontend.model.model import V4Model

        source = Checkpoint.open(path)
        source.check()
        self.name, self.weights, self.vocab_size = str(path), "float32", source.config.vocab_size
        self.tokenizer: Tokenizer | Path | None = source.tokenizer_path
        self._model = V4Model.from_source(source)
        for module in self._model.modules():
            if isinstance(module, Attention):
                module.hide_rows = hide_rows

    def all_logits(self, ids: np.ndarray) -> np.ndarray:
        import torch

        return self._model.logits(torch.from_numpy(ids)).numpy()

    def last_logits(self, ids: np.ndarray) -> np.ndarray:
        return self.all_logits(ids)[:, -1]


class OnnxReader:
    """An exported file in ONNX Runtime. One that gives the last token's logits only is read token by token."""

    kind = "onnx"
    tokenizer: Tokenizer | Path | None = None

    def __init__(self, path: Path, threads: int | None = None) -> None:
        import onnxruntime

        if not path.is_file():
            raise CheckpointError(f"{path}: expected an ONNX file, found {'a folder' if path.is_dir() else 'none'}")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or int(os.environ.get("V4C_NUM_THREADS", "0"))
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            described = self._session.get_modelmeta().custom_metadata_map
            self._caches, config = json.loads(described["v4c.caches"]), json.loads(described["v4c.config"])
        except KeyError:
            raise CheckpointError(f"{path}: expected a file that v4c export wrote, found no v4c metadata") from None
        except Exception as failure:  # the library's errors have no common class
            message = " ".join(str(failure).split())[:200]
            raise CheckpointError(f"{path}: expected a model that ONNX Runtime opens, found {message}") from failure
        if any(value.name in json.loads(described["v4c.weights"]) for value in self._session.get_inputs()):
            raise CheckpointError(f"{path}: expected weights, found a graph without")
        self.name, self.target, self.weights = str(path), f"onnxruntime {onnxruntime.__version__}", "as exported"
        self.vocab_size = int(config["vocab_size"])
        self._every = len(self._session.get_outputs()[0].shape) == 3

    def all_logits(self, ids: np.ndarray) -> np.ndarray:
        if self._every:
            return self._run(ids, 0, self._empty(ids))[0]
        caches, rows = self._empty(ids), []
        for position in range(ids.shape[1]):
            logits, caches = self._run(ids[:, position : position + 1], position, caches)
            rows.append(logits)
        return np.stack(rows, axis=1)

    def last_logits(self, ids: np.ndarray) -> np.ndarray:
        logits, _ = self._run(ids, 0, self._empty(ids))
        return logits[:, -1] if self._every else logits

    def _empty(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Zeroed caches for rows of this length, as the file's own metadata describes them."""

        def size(dim: Any) -> int:
            if isinstance(dim, int):
                return dim
            return len(ids) if dim == "batch" else -(-ids.shape[1] // int(dim.removeprefix("rows")))

        return {
            f"past.{spec['name']}": np.zeros([size(dim) for dim in spec["shape"]], spec["dtype"])
            for spec in self._caches
        }

    def _run(
        self, ids: np.ndarray, position: int, caches: dict[str, np.ndarray]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        where = {"positions": np.full(len(ids), position), "lengths": np.full(len(ids), ids.shape[1])}
        logits, *present = self._session.run(None, {"input_ids": ids, **where, **caches})
        return logits, dict(zip(caches, present, strict=True))
