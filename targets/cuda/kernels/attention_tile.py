"""How attention lies in tiles on tensor cores: how many heads are its rows, and how many keys shared memory holds."""

from __future__ import annotations

from dataclasses import dataclass

from ..schedule import TILE_MEMORY

THREADS = 256
_WARPS = THREADS // 32
_MOST_WIDTH = 1024  # beyond 768, sums and waiting keys of 16 heads already spill a little
_MOST_RUNS = 16  # of 16 heads by 16 dims whose sums a warp holds: 128 registers a thread


@dataclass(frozen=True)
class HeadTile:
    """`HeadTile` of attention_tiles.cuh.

    Attributes:
        heads: rows, a multiple of 16.
        keys: read at a time, 32 or 64.
        width: dims of a head.
    """

    heads: int
    keys: int
    width: int

    @property
    def shared_bytes(self) -> int:
        """Shared memory: queries, two tiles of keys, parts of the scores, pointers to three tiles' keys, factors."""
        row = 2 * self.width + (16 if self.width % 64 else 0)
        parts = _WARPS // ((2 if self.heads == 64 else 1) * self.keys // 32)
        return (self.heads + 2 * self.keys) * row + parts * self.heads * self.keys * 4 + 24 * self.keys + 4 * self.heads


def prompt_tile(heads: int, width: int, most_keys: int) -> HeadTile | None:
    """The tile of many tokens: as many heads as registers take, in tiles of one height; None where none fits."""
    if width % 16 or width > _MOST_WIDTH:
        return None
    most = min(4, _MOST_RUNS // -(-width // (16 * _WARPS)))
    units = -(-heads // 16)
    rows = 16 * -(-units // -(-units // most))
    tiles = [HeadTile(rows, keys, width) for keys in (64, 32) if keys <= most_keys]
    return next((tile for tile in tiles if tile.shared_bytes <= TILE_MEMORY[most_keys]), None)


def split_tile(width: int) -> HeadTile:
    """The tile of few tokens, whose keys are split: few heads and keys, so that there are many blocks."""
    return HeadTile(16, 32, width)
