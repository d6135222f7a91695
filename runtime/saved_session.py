"""A session in a file: what its rows have read, so that a long prompt is paid for once.

The file is in the safetensors format. Rings are stored whole, with zeros where nothing has been read yet; of a cache
that grows with the context, the rows written so far, those of all rows of the batch one after the other. Metadata says
which model it belongs to, where the rows stand, and the SHA-256 of everything else in the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from v4c.errors import ArtifactError
from v4c.runtime.cache_specs import CacheSpec
from v4c.runtime.dtypes import DTYPES
from v4c.runtime.manifest import Manifest
from v4c.runtime.whole_file import replacing

FORMAT = "v4c.session"
VERSION = "1"
_KEYS = ("format", "version", "model", "max_context", "positions", "pending", "sha256")
_UNKNOWN = "0" * 64
"""Stands for the hash while it is worked out."""
_HEADER_LIMIT = 64 << 20
_PIECE = 16 << 20


@dataclass(frozen=True)
class SavedSession:
    """What the file says about the session.

    Attributes:
        max_context: tokens a row could hold.
        positions: tokens each row has read, int64 [B].
        pending: a token for each row that was chosen but not read, int64 [B], or None.
    """

    max_context: int
    positions: np.ndarray
    pending: np.ndarray | None


def model_identity(manifest: Manifest) -> str:
    """SHA-256 that two artifacts share when a session of one can be continued by the other: config, caches, weights."""
    files = sorted({weight.file for weight in manifest.weights if weight.file is not None})
    described = {
        "config": dict(manifest.config),
        "caches": [[cache.name, cache.dtype, str(cache.shape)] for cache in manifest.all_caches],
        "weights": [manifest.files[file].sha256 for file in files],
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def write_session(path: Path, manifest: Manifest, saved: SavedSession, arrays: Iterable[np.ndarray]) -> None:
    """Write the file, complete or not at all; a file that is there is replaced.

    Args:
        path: the file.
        manifest: of the session's model.
        saved: where its rows stand.
        arrays: its caches, in the order of `Manifest.all_caches`, each asked for once.

    Raises:
        OutputError: it cannot be written.
    """
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "model": model_identity(manifest),
        "max_context": str(saved.max_context),
        "positions": json.dumps(saved.positions.tolist()),
        "pending": json.dumps(None if saved.pending is None else saved.pending.tolist()),
        "sha256": _UNKNOWN,
    }
    header = _header(metadata, manifest.all_caches, saved.positions)
    with replacing(path) as building, building.open("xb") as file:
        digest = hashlib.sha256(header)
        file.write(header)
        for piece in _pieces(manifest.all_caches, saved.positions, arrays):
            digest.update(piece)
            file.write(piece)
        file.seek(header.index(_UNKNOWN.encode()))
        file.write(digest.hexdigest().encode())
        file.flush()
        os.fsync(file.fileno())


class SessionFile:
    """An opened file of `write_session`, its header read and checked; to be used in a ``with`` statement.

    Attributes:
        saved: where the rows stand.

    Raises:
        ArtifactError: the file is missing, no saved session, of another version or of another model, or damaged.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path, self._manifest = path, manifest
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise ArtifactError(f"{path}: expected a saved session, found {error.strerror}") from None
        try:
            self._header, metadata = self._read_header()
            self.saved = self._described(metadata)
            expected = _header(metadata, manifest.all_caches, self.saved.positions)
            if expected != self._header:
                raise self._damaged("a header of other tensors than its positions call for")
            self._sha256 = metadata["sha256"]
            size = os.fstat(self._file.fileno()).st_size
            whole = len(self._header) + sum(_nbytes(c, self.saved.positions) for c in manifest.all_caches)
            if size != whole:
                raise self._damaged(f"{size} bytes instead of {whole}")
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> SessionFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read_into(self, arrays: Iterable[np.ndarray]) -> None:
        """Fill the caches of a session with as many rows, in the order of `Manifest.all_caches`, one after the other.

        Raises:
            ArtifactError: the content does not have the hash the file says; what was filled is then to be thrown away.
        """
        at = self._header.index(self._sha256.encode())
        digest = hashlib.sha256(self._header[:at] + _UNKNOWN.encode() + self._header[at + 64 :])
        self._file.seek(len(self._header))
        for view in _views(self._manifest.all_caches, self.saved.positions, arrays):
            for start in range(0, len(view), _PIECE):
                piece = view[start : start + _PIECE]
                if self._file.readinto(piece) != len(piece):  # type: ignore[attr-defined]
                    raise self._damaged("its end too early")
                digest.update(piece)
        if digest.hexdigest() != self._sha256:
            raise self._damaged(f"SHA-256 {digest.hexdigest()}")

    def _read_header(self) -> tuple[bytes, dict[str, str]]:
        start = self._file.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= size <= _HEADER_LIMIT:
            raise self._damaged("no header")
        text = self._file.read(size)
        try:
            metadata = json.loads(text)["__metadata__"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self._damaged("no header") from None
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            raise ArtifactError(f"{self._path}: expected a saved session of v4c, found another file")
        if metadata.get("version") != VERSION:
            raise ArtifactError(
                f"{self._path}: expected a saved session of version {VERSION}, found {metadata.get('version')!r}"
            )
        if sorted(metadata) != sorted(_KEYS) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._damaged("other keys in its metadata")
        return start + text, metadata

    def _described(self, metadata: dict[str, str]) -> SavedSession:
        identity = model_identity(self._manifest)
        if metadata["model"] != identity:
            raise ArtifactError(
                f"{self._path}: expected a session of this model ({identity[:16]}), found one of another "
                f"({metadata['model'][:16]})"
            )
        try:
            context = int(metadata["max_context"])
            positions, pending = json.loads(metadata["positions"]), json.loads(metadata["pending"])
        except (ValueError, RecursionError):
            raise self._damaged("metadata that is no JSON") from None
        if not 1 <= context <= self._manifest.max_context:
            raise self._damaged(f"max_context {context}")
        if not _integers(positions, context + 1) or not positions:
            raise self._damaged("positions outside its max_context")
        vocabulary = self._manifest.vocab_size
        if pending is not None and (not _integers(pending, vocabulary) or len(pending) != len(positions)):
            raise self._damaged("pending tokens outside the vocabulary")
        read = None if pending is None else np.array(pending, dtype=np.int64)
        return SavedSession(context, np.array(positions, dtype=np.int64), read)

    def _damaged(self, found: str) -> ArtifactError:
        return ArtifactError(f"{self._path}: expected a whole, unaltered saved session, found {found}")


def _integers(values: Any, stop: int) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < stop for value in values)


def _header(metadata: dict[str, str], caches: Sequence[CacheSpec], positions: np.ndarray) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {key: metadata[key] for key in _KEYS}}
    end = 0
    for cache in caches:
        start, end = end, end + _nbytes(cache, positions)
        entries[cache.name] = {
            "dtype": DTYPES[cache.dtype].safetensors,
            "shape": list(_shape(cache, positions)),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _shape(cache: CacheSpec, positions: np.ndarray) -> tuple[int, ...]:
    """Rings as they are; of a cache that grows, the written rows of all rows of the batch in one axis."""
    sizes = cache.sizes(len(positions), 1)
    return sizes if cache.ratio is None else (int((positions // cache.ratio).sum()), *sizes[2:])


def _nbytes(cache: CacheSpec, positions: np.ndarray) -> int:
    return math.prod(_shape(cache, positions)) * DTYPES[cache.dtype].storage.itemsize


def _pieces(caches: Sequence[CacheSpec], positions: np.ndarray, arrays: Iterable[np.ndarray]) -> Iterator[memoryview]:
    """The bytes of the tensors. What a ring holds of an earlier sequence is not this session's: it becomes zeros."""
    for cache, array in zip(caches, arrays, strict=True):
        for row, position in enumerate(positions):
            if cache.ratio is None:
                live = array[row].copy()
                live[int(position) :] = 0
                yield _bytes(live)
            else:
                yield from _views((cache,), positions[row : row + 1], (array[row : row + 1],))


def _views(caches: Sequence[CacheSpec], positions: np.ndarray, arrays: Iterable[np.ndarray]) -> Iterator[memoryview]:
    """The memory of the tensors in caches of any capacity, row by row."""
    for cache, array in zip(caches, arrays, strict=True):
        for row, position in enumerate(positions):
            part = array[row] if cache.ratio is None else array[row, : int(position) // cache.ratio]
            if part.size:
                yield _bytes(part)


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
