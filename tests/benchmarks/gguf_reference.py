"""A reader of GGUF files written from the format's description alone: no library of llama.cpp's takes part.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the blocks: ``block_q8_0`` and ``block_q4_0`` of
``ggml-common.h``.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
F32, Q4_0, Q8_0, I32, BF16 = 0, 2, 8, 26, 30
BLOCK = 32


@dataclass(frozen=True)
class Stored:
    """A tensor: its dimensions with the fastest first, its type, its bytes."""

    dims: tuple[int, ...]
    kind: int
    data: bytes

    def values(self) -> np.ndarray:
        """Decoded, in the usual order of dimensions."""
        shape = tuple(reversed(self.dims))
        if self.kind == F32:
            return np.frombuffer(self.data, "<f4").reshape(shape)
        if self.kind == I32:
            return np.frombuffer(self.data, "<i4").reshape(shape)
        if self.kind == BF16:
            return (np.frombuffer(self.data, "<u2").astype("<u4") << 16).view("<f4").reshape(shape)
        return (self.scales()[:, None] * self._steps()).astype(np.float32).reshape(shape)

    def scales(self) -> np.ndarray:
        """One per block."""
        return np.ascontiguousarray(self._blocks()[:, :2]).view("<f2")[:, 0].astype(np.float32)

    def _blocks(self) -> np.ndarray:
        return np.frombuffer(self.data, np.uint8).reshape(-1, 2 + {Q8_0: BLOCK, Q4_0: BLOCK // 2}[self.kind])

    def _steps(self) -> np.ndarray:
        codes = self._blocks()[:, 2:]
        if self.kind == Q8_0:
            return codes.view(np.int8).astype(np.float32)
        # The low halves of the bytes are the block's first 16 numbers, the high halves the others.
        return np.concatenate([codes & 15, codes >> 4], axis=1).astype(np.float32) - 8


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Keys and tensors of a file."""
    data = path.read_bytes()
    place = 0

    def take(form: str) -> Any:
        nonlocal place
        (value,) = struct.unpack_from("<" + form, data, place)
        place += struct.calcsize("<" + form)
        return value

    def take_string() -> str:
        nonlocal place
        size = take("Q")
        place += size
        return data[place - size : place].decode()

    def take_value(kind: int) -> Any:
        if kind == _STRING:
            return take_string()
        if kind == _ARRAY:
            inner, count = take("I"), take("Q")
            return [take_value(inner) for _ in range(count)]
        return take(_SCALARS[kind])

    assert data[:4] == b"GGUF"
    place = 4
    assert take("I") == 3
    tensors, keys = take("Q"), take("Q")
    found = {take_string(): take_value(take("I")) for _ in range(keys)}
    listed = []
    for _ in range(tensors):
        name = take_string()
        dims = tuple(take("Q") for _ in range(take("I")))
        listed.append((name, dims, take("I"), take("Q")))
    start = -(-place // 32) * 32
    stored = {}
    for name, dims, kind, offset in listed:
        assert offset % 32 == 0
        block, size = {F32: (1, 4), I32: (1, 4), BF16: (1, 2), Q8_0: (32, 34), Q4_0: (32, 18)}[kind]
        nbytes = int(np.prod(dims)) // block * size
        assert start + offset + nbytes <= len(data)
        stored[name] = Stored(dims, kind, data[start + offset : start + offset + nbytes])
    return found, stored
