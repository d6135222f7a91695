"""Weights copied into memory of this process in huge pages, so that a step misses fewer translations of addresses.

Mapped files come in pages of 4 KiB; a decode step reads all of them once, so the processor walks its page tables for
each. Linux backs anonymous memory with pages of 2 MiB where it was advised to (``madvise(2)``, ``MADV_HUGEPAGE``).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from v4c.errors import InputError, UnsupportedError
from v4c.runtime.file_pieces import read_parts
from v4c.runtime.library import one_line

_HUGE = 2 << 20
"""Bytes of a huge page on x86-64, and on Arm with 4 KiB pages; where they are larger, the kernel finds them inside."""
_PIECE = 32 * _HUGE
"""Bytes that a thread reads at a time."""
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MEMORY = Path("/proc/meminfo")


def check_huge_pages() -> None:
    """Refuse a kernel that gives no huge pages on advice.

    Raises:
        UnsupportedError: it has none, or they are switched off.
    """
    try:
        setting = _SETTING.read_text().strip()
    except OSError:
        setting = "nothing"
    if not hasattr(mmap, "MADV_HUGEPAGE") or setting == "nothing" or "[never]" in setting:
        raise UnsupportedError(f"huge_pages: expected 'madvise' or 'always' in {_SETTING}, found {setting}")


def copy_files(sizes: Mapping[Path, int]) -> dict[Path, np.ndarray]:
    """Files of so many bytes, each as uint8 ``[size]`` in memory of its own, from a 2 MiB boundary on.

    Raises:
        InputError: less memory is free than they take.
        ArtifactError: a file cannot be read, or ends before its size.
    """
    needed, free = sum(sizes.values()), free_memory()
    if free is not None and needed > free:
        raise InputError(f"huge_pages: expected {needed} bytes of free memory for the weights, found {free}")
    copies = {file: _huge_buffer(size) for file, size in sizes.items()}
    read_parts([(file, 0, copy) for file, copy in copies.items()], _PIECE)
    return copies


def free_memory() -> int | None:
    """Bytes that Linux can give without swapping; None where it does not say."""
    try:
        lines = _MEMORY.read_text().splitlines()
    except OSError:
        return None
    counts: Iterable[int] = (int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    return next(iter(counts), None)


def _huge_buffer(size: int) -> np.ndarray:
    try:
        memory = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:
        raise InputError(f"huge_pages: expected {size} bytes of memory, found {one_line(error)}") from None
    whole = np.frombuffer(memory, np.uint8)
    start = -whole.ctypes.data % _HUGE
    return whole[start : start + size]
