"""Writing an artifact: into a folder beside the destination, renamed when complete, so a failure leaves nothing behind.

Weights are streamed: declared first, so that every offset is known and each safetensors header can lead its file, then
written in that order, whole or in slices of rows. SHA-256 is computed while writing. A writer that was killed leaves a
folder that another can go on in (`partial`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from v4c.errors import ArtifactError, OutputError
from v4c.runtime.dtypes import DTYPES
from v4c.runtime.manifest import MANIFEST_NAME, Manifest, StoredFile, StoredWeight, WeightSpec
from v4c.runtime.partial import PartialFolder, Progress, Record
from v4c.runtime.shards import Shard, plan_shards

SHARD_BYTES = 4 << 30
_PIECE = 16 << 20  # bytes hashed and written at a time, so that a weight passes through the cache once


class ArtifactWriter:
    """Writes one artifact.

    ```python
    with ArtifactWriter("model.v4c") as writer:
        writer.write_library("m.so")
        writer.declare_weights([WeightSpec("embed", "bfloat16", (1000, 64)), ...])
        for name, array in weights:  # in the declared order
            writer.write_weight(name, array)  # or some calls of write_rows
        writer.copy_tokenizer("tokenizer.json")  # when there is one
        writer.finish(manifest)
    ```

    Args:
        destination: folder to create; it may exist if it is empty.
        shard_bytes: most bytes of tensors in one weights file (a single larger tensor gets a file of its own).

    Raises:
        OutputError: from every method, in one line, when the destination is taken or cannot be written.
        ArtifactError: the calls do not fit together (order, names, shapes, dtypes, manifest).
    """

    def __init__(self, destination: str | os.PathLike[str], shard_bytes: int = SHARD_BYTES) -> None:
        self.destination = Path(os.path.realpath(destination))
        self._shard_bytes = shard_bytes
        self._partial: PartialFolder | None = None
        self._files: dict[str, StoredFile] = {}
        self._library: str | None = None
        self._tokenizer: str | None = None
        self._weights: tuple[StoredWeight, ...] = ()
        self._shards: list[Shard] = []
        self._shard_of: dict[str | None, Shard] = {}
        self._written = 0
        self._rows = 0  # of the weight after those
        self._open: _HashedFile | None = None
        self._finished = False

    def __enter__(self) -> ArtifactWriter:
        with _output_errors(self.destination):
            if self.destination.exists() and not self.destination.is_dir():
                raise OutputError(f"{self.destination}: expected a folder to write, found a file")
            if self.destination.is_dir() and any(self.destination.iterdir()):
                raise OutputError(f"{self.destination}: expected no folder or an empty one, found files in it")
            self._partial = PartialFolder(self.destination)
        return self

    @property
    def _folder(self) -> Path:
        assert self._partial is not None, "used outside its with block"
        return self._partial.path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._finished:
            return
        if self._open is not None:
            self._open.abandon()
        if self._partial is not None:
            self._partial.remove()
        if error is None:
            raise ArtifactError(f"{self.destination}: nothing was written: finish() was not called")

    def write_library(self, library: bytes | str | os.PathLike[str]) -> None:
        """Store the compiled library, given as bytes or as the path of a shared object."""
        if isinstance(library, bytes):
            digest = hashlib.sha256(library).hexdigest()
        else:
            with _input_file(library) as source:
                digest = hashlib.file_digest(source, "sha256").hexdigest()
        # The name carries the content: dlopen takes a path it knows for the library it has loaded, so a recompiled
        # artifact at the same place would otherwise run the old code.
        self._library = f"model-{digest[:16]}.so"
        self._store(self._library, library)

    def attach(self, name: str, content: bytes) -> None:
        """Store a file that is neither code nor weights, such as a launch plan."""
        self._store(name, content)

    def copy_tokenizer(self, path: str | os.PathLike[str]) -> None:
        """Store the checkpoint's ``tokenizer.json``."""
        self._tokenizer = "tokenizer.json"
        self._store(self._tokenizer, path)

    def declare_weights(
        self,
        specs: Sequence[WeightSpec],
        stored: bool = True,
        resume_key: str | None = None,
        checked: Progress | None = None,
    ) -> None:
        """Fix the names, dtypes, shapes and order of all weights; once, before the first is written.

        Args:
            specs: the weights in the order the compiled functions take them.
            stored: False for an artifact without weights: they are described, and none is written.
            resume_key: says which values the weights have. With it, progress is recorded, and what a writer with the
                same key, specs and destination left when it was killed counts as written: see `rows_written`.
            checked: called with bytes while what was left is compared with its checksums.
        """
        if self._weights:
            raise ArtifactError(f"{self.destination}: weights: expected one declaration, found a second")
        for spec in specs:
            if spec.dtype not in DTYPES:
                raise ArtifactError(f"weight {spec.name}: expected dtype in {', '.join(DTYPES)}, found {spec.dtype}")
        if stored:
            self._shards = plan_shards(specs, self._shard_bytes)
            self._shard_of = {shard.file: shard for shard in self._shards}
            self._weights = tuple(weight for shard in self._shards for weight in shard.weights)
            if resume_key is not None:
                with _output_errors(self._folder):
                    self._resume(resume_key, checked)
        else:
            self._weights = tuple(
                StoredWeight(s.name, s.dtype, tuple(s.shape), None, 0, on_host=s.on_host) for s in specs
            )
            self._written = len(self._weights)

    def rows_written(self, name: str) -> int | None:
        """Rows of a declared weight, along its first axis, that are on disk already; None when all of it is."""
        index = next((i for i, weight in enumerate(self._weights) if weight.name == name), None)
        if index is None:
            raise ArtifactError(f"weight {name}: expected the name of a declared weight")
        if index < self._written:
            return None
        return self._rows if index == self._written else 0

    def write_weight(self, name: str, array: np.ndarray) -> None:
        """Append the next declared weight.

        Args:
            name: its name, for checking the order.
            array: of the declared shape, and of the declared dtype: either the ml_dtypes type of that name, or the
                unsigned integer of equal width that stands for it (uint16 for bfloat16, uint8 for float8).
        """
        self._write(name, array, whole=True)

    def write_rows(self, name: str, array: np.ndarray) -> None:
        """Append the next rows of the next declared weight: a slice of it along its first axis; see `write_weight`."""
        self._write(name, array, whole=False)

    def _write(self, name: str, array: np.ndarray, whole: bool) -> None:
        if self._written == len(self._weights):
            raise ArtifactError(f"weight {name}: expected no further weight: all {self._written} are written")
        weight = self._weights[self._written]
        wanted = list(weight.shape)
        if not whole and wanted:
            wanted[0] = min(wanted[0] - self._rows, *array.shape[:1]) if array.ndim else wanted[0] - self._rows
        found = f"{name} {array.dtype.name}{list(array.shape)}"
        fits = array.dtype.name in (weight.dtype, DTYPES[weight.dtype].storage.name) and array.dtype.isnative
        if name != weight.name or not fits or list(array.shape) != wanted or (whole and self._rows):
            raise ArtifactError(f"weight {self._written}: expected {weight.name} {weight.dtype}{wanted}, found {found}")
        shard = self._shard_of[weight.file]
        with _output_errors(self._folder / shard.file):
            if self._open is None:
                self._open = _HashedFile(self._folder / shard.file)
                self._open.write(shard.header)
            if self._rows == 0:
                self._open.write(b"\0" * (weight.offset - self._open.size))
            self._open.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            self._rows += _rows(array.shape)
            complete = self._rows == _rows(weight.shape)
            if complete:
                self._written, self._rows = self._written + 1, 0
            assert self._partial is not None
            self._partial.record(Record(shard.file, self._open.size, self._open.digest(), self._written, self._rows))
            if complete and weight is shard.weights[-1]:
                self._close_file()

    def _resume(self, key: str, checked: Progress | None) -> None:
        """Count as written what a writer with this key left at this destination."""
        assert self._partial is not None
        layout = json.dumps([key, self._shard_bytes, [(w.name, w.dtype, w.shape, w.offset) for w in self._weights]])
        found = self._partial.take_over(hashlib.sha256(layout.encode()).hexdigest(), checked)
        if found is None:
            return
        self._written, self._rows = found.last.weights, found.last.rows
        complete = {weight.file for weight in self._weights} - {
            weight.file for weight in self._weights[self._written :]
        }
        for name, record in found.files.items():
            if name in complete:
                self._files[name] = StoredFile(record.size, record.sha256)
            else:
                self._open = _HashedFile(self._folder / name, record.size, found.hashes[name])

    def finish(self, manifest: Manifest) -> None:
        """Write the manifest and move the folder to its destination.

        Args:
            manifest: its ``weights``, ``library``, ``tokenizer`` and ``files`` are filled in here.
        """
        if self._library is None:
            raise ArtifactError(f"{self.destination}: expected a library, found none: call write_library first")
        if self._written != len(self._weights):
            raise ArtifactError(
                f"{self.destination}: expected {len(self._weights)} weights, found {self._written}: "
                f"{self._weights[self._written].name} comes next"
            )
        text = dataclasses.replace(
            manifest, weights=self._weights, library=self._library, tokenizer=self._tokenizer, files=self._files
        ).to_json()
        file = self._folder / MANIFEST_NAME
        Manifest.from_json(text, str(self.destination / MANIFEST_NAME))  # never write what cannot be read back
        with _output_errors(file):
            file.write_text(text)
        with _output_errors(self.destination):
            assert self._partial is not None
            self._partial.complete()
        self._finished = True

    def _store(self, name: str, source: bytes | str | os.PathLike[str]) -> None:
        if name in self._files:
            raise ArtifactError(f"{self.destination}: {name}: expected once, found a second")
        with contextlib.ExitStack() as stack:
            opened = None if isinstance(source, bytes) else stack.enter_context(_input_file(source))
            stack.enter_context(_output_errors(self._folder / name))
            self._open = _HashedFile(self._folder / name)
            if isinstance(source, bytes):
                self._open.write(source)
            while opened is not None and (piece := opened.read(_PIECE)):
                self._open.write(piece)
            self._close_file()

    def _close_file(self) -> None:
        assert self._open is not None
        self._files[self._open.path.name] = self._open.close()
        self._open = None


def _rows(shape: Sequence[int]) -> int:
    return int(shape[0]) if len(shape) else 1


class _HashedFile:
    """A new file, or the rest of one, whose size and SHA-256 are known when it is closed.

    Args:
        path: the file; it must not exist, unless `size` bytes of it are to be kept.
        size: bytes it has.
        digest: the hash of these.
    """

    def __init__(self, path: Path, size: int = 0, digest: Any = None) -> None:
        self.path = path
        self.size = size
        self._hash = hashlib.sha256() if digest is None else digest
        mode = "xb" if digest is None else "ab"
        self._file = open(path, mode, buffering=0)  # noqa: SIM115  closed by close() or abandon()

    def digest(self) -> str:
        """SHA-256 of what has been written so far."""
        return str(self._hash.hexdigest())

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        view = memoryview(data)
        for start in range(0, len(view), _PIECE):
            piece = view[start : start + _PIECE]
            self._hash.update(piece)
            while piece:  # unbuffered writes may be partial
                piece = piece[self._file.write(piece) :]
        self.size += len(view)

    def close(self) -> StoredFile:
        """Close the file and describe it."""
        self._file.close()
        return StoredFile(self.size, self._hash.hexdigest())

    def abandon(self) -> None:
        """Close the file, whatever became of it."""
        with contextlib.suppress(OSError):
            self._file.close()


@contextlib.contextmanager
def _output_errors(path: Path) -> Iterator[None]:
    """Turn an operating system error while writing ``path`` into one line."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{path}: expected to write it, found {error.strerror or error}") from error


@contextlib.contextmanager
def _input_file(path: str | os.PathLike[str]) -> Iterator[io.BufferedReader]:
    """Open a file that is to be copied into the artifact."""
    try:
        file = open(path, "rb")  # noqa: SIM115  closed below
    except OSError as error:
        raise ArtifactError(f"{os.fspath(path)}: expected a file to copy, found {error.strerror}") from None
    with file:
        yield file
