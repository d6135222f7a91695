"""Reads parts of files into memory, piece by piece in threads: one thread does not keep up with a fast disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from v4c.errors import ArtifactError
from v4c.runtime.library import one_line

Part = tuple[Path, int, np.ndarray]
"""A file, where in it a part begins, and memory for the part: uint8 ``[n]``, written to."""


def read_parts(parts: Sequence[Part], piece: int) -> None:
    """Fill the memory of every part, at most `piece` bytes a read.

    Raises:
        ArtifactError: a file cannot be read, or ends before a part does.
    """
    pieces = [
        (file, start + first, memory[first : first + piece])
        for file, start, memory in parts
        for first in range(0, len(memory), piece)
    ]
    with ThreadPoolExecutor() as pool:
        reads = [pool.submit(_read, *one) for one in pieces]
        try:
            for read in reads:
                read.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _read(file: Path, start: int, memory: np.ndarray) -> None:
    filled = 0
    try:
        with open(file, "rb", buffering=0) as opened:
            while filled < len(memory):
                count = os.preadv(opened.fileno(), [memory[filled:].data], start + filled)
                if not count:
                    raise ArtifactError(f"{file}: expected {start + len(memory)} bytes, found {start + filled}")
                filled += count
    except OSError as error:
        raise ArtifactError(f"{file}: expected a file that can be read, found {one_line(error)}") from None
