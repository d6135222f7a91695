"""The folder an artifact is built in: locked while its writer lives, resumable when the writer was killed.

A journal in it says, slice by slice, how far the weights are on disk, with the SHA-256 of each file up to there.
Another writer that is to store the same weights at the same destination takes the folder over, checks what it finds
against the journal, and goes on behind the last slice that is intact.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

JOURNAL = "journal.jsonl"
_PIECE = 16 << 20

Progress = Callable[[int, int], None]
"""Called with bytes checked and bytes in all."""


@dataclass(frozen=True)
class Record:
    """One line of the journal: weights that are complete, rows of the next, and the file they end in.

    Attributes:
        file: name of the weights file.
        size: its bytes so far.
        sha256: of these bytes.
        weights: weights that are complete, over all files.
        rows: rows of the following one, along its first axis.
    """

    file: str
    size: int
    sha256: str
    weights: int
    rows: int


@dataclass
class Progressed:
    """What of an earlier attempt is intact: the last good record, that of each file, and their hashes so far."""

    last: Record
    files: dict[str, Record]
    hashes: dict[str, Any]


class PartialFolder:
    """A new folder beside `destination`, named so that it is seen to be unfinished, and locked.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, destination: Path) -> None:
        self.destination = destination
        self.path = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}.partial")
        self.path.mkdir()
        self._lock = _lock(self.path)
        self._journal: int | None = None

    def take_over(self, key: str, checked: Progress | None = None) -> Progressed | None:
        """Go on in the folder of a writer that was killed while it stored the same weights, if there is one.

        Files of this folder move there. Whatever stands there and is not vouched for by the journal is deleted.

        Args:
            key: equal for equal weights.
            checked: called while what is there is being read.

        Returns:
            How far it came, or None: this folder stays as it is, with a journal begun.
        """
        for path, lock in _abandoned(self.destination):
            found = _intact(path, key, checked) if path != self.path else None
            if found is None:
                os.close(lock)
                continue
            for file in path.iterdir():
                if file.name not in (JOURNAL, *found.files):
                    file.unlink()
            for file in self.path.iterdir():
                file.rename(path / file.name)
            for name, record in found.files.items():
                os.truncate(path / name, record.size)
            self.path.rmdir()
            self._release()
            self.path, self._lock = path, lock
            self._begin(key, list(found.files.values()))
            return found
        self._begin(key, [])
        return None

    def record(self, record: Record) -> None:
        """Add a line to the journal, if one was begun."""
        if self._journal is not None:
            os.write(self._journal, json.dumps(asdict(record)).encode() + b"\n")

    def complete(self) -> None:
        """Move the folder to its destination, without the journal, and delete what others left there unfinished.

        Raises:
            OSError: the destination is taken.
        """
        self._close_journal()
        (self.path / JOURNAL).unlink(missing_ok=True)
        os.rename(self.path, self.destination)  # replaces an empty folder, and nothing else
        self._release()
        for path, lock in _abandoned(self.destination):
            if (path / JOURNAL).exists():  # without one, it may be a writer's that is just beginning
                shutil.rmtree(path, ignore_errors=True)
            os.close(lock)

    def remove(self) -> None:
        """Delete the folder with all that is in it."""
        self._close_journal()
        shutil.rmtree(self.path, ignore_errors=True)
        self._release()

    def _begin(self, key: str, records: list[Record]) -> None:
        """A journal of `records`; an old one is replaced at once."""
        text = "".join(json.dumps(line) + "\n" for line in ({"key": key}, *map(asdict, records)))
        building = self.path / f"{JOURNAL}.new"
        building.write_text(text)
        building.replace(self.path / JOURNAL)
        self._journal = os.open(self.path / JOURNAL, os.O_WRONLY | os.O_APPEND)

    def _close_journal(self) -> None:
        if self._journal is not None:
            os.close(self._journal)
            self._journal = None

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock until it is closed, by us or by our death; None if another holds it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _abandoned(destination: Path) -> Iterator[tuple[Path, int]]:
    """Unfinished folders for `destination` that nobody holds, each with its lock, which is the caller's to close."""
    pattern = re.compile(rf"\.{re.escape(destination.name)}\.[0-9a-f]{{8}}\.partial")
    with contextlib.suppress(OSError):
        for path in sorted(destination.parent.iterdir()):
            if pattern.fullmatch(path.name) and not path.is_symlink():
                lock = _lock(path)
                if lock is not None:
                    yield path, lock


def _intact(folder: Path, key: str, checked: Progress | None) -> Progressed | None:
    """What of a folder's weights is as its journal says; None when that is nothing, or of other weights."""
    try:
        lines = [json.loads(line) for line in _whole_lines(folder / JOURNAL)]
        if not lines or lines[0] != {"key": key}:
            return None
        records = [Record(**line) for line in lines[1:]]
        names = {record.file for record in records}
        total = sum((folder / name).stat().st_size for name in names if _plain(folder, name))
    except (OSError, ValueError, TypeError):
        return None
    found: Progressed | None = None
    done = 0
    for record in records:
        file = folder / record.file
        size, digest = 0, hashlib.sha256()
        if found is not None and record.file in found.files:
            size, digest = found.files[record.file].size, found.hashes[record.file].copy()
        if not _plain(folder, record.file) or not _read(file, size, record.size, digest):
            break
        if digest.hexdigest() != record.sha256:
            break
        found = found or Progressed(record, {}, {})
        found.last, found.files[record.file], found.hashes[record.file] = record, record, digest
        done += record.size - size
        if checked is not None:
            checked(done, total)
    return found


def _plain(folder: Path, name: str) -> bool:
    """Whether `name` is a file of the folder itself."""
    return Path(name).name == name and (folder / name).is_file() and not (folder / name).is_symlink()


def _whole_lines(file: Path) -> list[bytes]:
    """The lines that end; a write that was cut off does not count."""
    return file.read_bytes().split(b"\n")[:-1]


def _read(file: Path, start: int, stop: int, digest: Any) -> bool:
    """Feed a range of the file to `digest`; False where it is shorter or cannot be read."""
    try:
        with file.open("rb") as opened:
            opened.seek(start)
            while start < stop:
                piece = opened.read(min(_PIECE, stop - start))
                if not piece:
                    return False
                digest.update(piece)
                start += len(piece)
    except OSError:
        return False
    return True
