"""Writing a checkpoint folder: tensors in shards of bounded size, their index and ``config.json``.

Data is streamed in the order of the entries; the folder appears under its name only when it is complete.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

from v4c.errors import OutputError

from .shard_index import INDEX_FILE, SINGLE_FILE

SHARD_BYTES = 2 << 30
_DATA_ALIGNMENT = 64

Progress = Callable[[int, int], None]
"""Called with bytes written and bytes in all."""


@dataclass(frozen=True)
class Entry:
    """One tensor as it will stand in a file; `dtype` as safetensors names it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


E = TypeVar("E", bound=Entry)


@dataclass(frozen=True)
class Content(Generic[E]):
    """What to write.

    Attributes:
        entries: the tensors, in the order their data comes.
        data: the bytes of one entry, in pieces; called once for each, in that order.
        config: content of ``config.json``.
        files: content of further files by their plain names.
    """

    entries: Iterable[E]
    data: Callable[[E], Iterator[bytes]]
    config: dict[str, Any]
    files: Mapping[str, bytes] = field(default_factory=dict)


def write_checkpoint(
    content: Content[E], folder: str | Path, progress: Progress | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write `content` as a checkpoint folder.

    Args:
        content: see `Content`.
        folder: must not exist, or be empty. Its parent must exist.
        progress: called while writing.
        shard_bytes: largest data of one file. A single tensor above it has a file of its own.

    Raises:
        OutputError: the folder is not empty, or cannot be written; nothing is left behind.
    """
    folder = Path(folder)
    try:
        if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
            raise OutputError(f"{folder}: expected no such folder, or an empty one, found something there")
        if not folder.absolute().parent.is_dir():
            raise OutputError(f"{folder}: expected an existing parent folder, found none")
        building = folder.absolute().parent / f".{folder.absolute().name}.{secrets.token_hex(6)}"
        try:
            building.mkdir()
            _write_all(content, building, progress, shard_bytes)
            os.replace(building, folder)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
    except OutputError:
        raise
    except OSError as failure:
        raise OutputError(
            f"{folder}: expected to write a checkpoint, found: {failure.strerror or failure}"
        ) from failure


def _write_all(content: Content[E], folder: Path, progress: Progress | None, shard_bytes: int) -> None:
    shards = _shards(content.entries, shard_bytes)
    total, written = sum(entry.nbytes for shard in shards for entry in shard), 0
    free = shutil.disk_usage(folder).free
    if total > free:
        raise OutputError(f"{folder.parent}: expected {total / 1e9:.1f} GB of free space, found {free / 1e9:.1f} GB")
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE_FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= {entry.name: name for entry in shard}
        with (folder / name).open("wb") as file:
            write_header(file, shard)
            for entry in shard:
                for piece in content.data(entry):
                    file.write(piece)
                    written += len(piece)
                    if progress is not None:
                        progress(written, total)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for name, text in content.files.items():
        if Path(name).name != name:
            raise OutputError(f"{name}: expected the name of a file in the checkpoint folder, found a path")
        (folder / name).write_bytes(text)
    (folder / "config.json").write_text(json.dumps(content.config, indent=2) + "\n", encoding="utf-8")


def _shards(entries: Iterable[E], limit: int) -> list[list[E]]:
    """Consecutive entries whose data fits `limit`; a single tensor above it gets a shard of its own."""
    shards: list[list[E]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.nbytes
    return shards


def write_header(file: BinaryIO, shard: Iterable[Entry]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in shard:
        stop = position + entry.nbytes
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _DATA_ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
