"""The steps of attention over shared key/value rows, for tokens and blocks of their heads.

Rows are copied in panels that stay in L2, the next one being asked for meanwhile, and a panel serves every block of
heads in turn: scores by an outer product over (row, head) tiles, an online softmax with one head per lane, then the
weighted sum over (head, column) tiles. The scratch is independent of how many rows there are. The steps are inlined
into the kernels of `attention`.
"""

# mypy: ignore-errors
# ruff: noqa: B023
# (TVMScript: names and loops below are parsed by TVM, not run by Python.)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from ..schedule import AttentionSchedule
from .common import LINE_BYTES, element_bytes, exp, prefetch, vector_width
from .rope import fill_angles, rotate_row
from .row_formats import CacheRows
from .weight_formats import each_row

BLOCK_HEADS = 64
"""Heads of a block of tokens: at the published width, their queries are 128 KiB, as a panel of rows is."""


@dataclass(frozen=True)
class Tiles:
    """How heads and columns are cut: every number divides the one it cuts."""

    heads: int
    width: int
    head_block: int
    """Heads that are taken at once: the lanes of the scores and of the softmax."""
    head_tile: int
    lanes: int
    vectors: int
    """Column vectors per tile of the weighted sum."""
    schedule: AttentionSchedule

    @property
    def blocks(self) -> int:
        """Blocks of heads."""
        return self.heads // self.head_block

    @property
    def row_tile(self) -> int:
        """Rows whose scores are accumulated at once."""
        return self.schedule.row_tile

    @property
    def panel(self) -> int:
        """Rows per panel."""
        return self.schedule.row_tile * self.schedule.panel_tiles

    @property
    def shares(self) -> int:
        """Shares of a token's rows, where tokens are few."""
        return self.schedule.shares

    @property
    def tokens(self) -> int:
        """Tokens of a block, of a prompt: their heads share the copies of the rows that all of them see."""
        return max(1, BLOCK_HEADS // self.heads)

    @property
    def pitch(self) -> int:
        """Floats from one panel row to the next: off a power of two, so that rows spread over all L1 sets."""
        return self.width + 16


def tiles(heads: int, width: int, schedule: AttentionSchedule) -> Tiles:
    """Blocks of up to 16 heads, as many as make whole vectors.

    Blocks of half a vector, to feed two threads with one token of few heads, take more than twice the time.
    """
    block = vector_width(heads)
    lanes = vector_width(width)
    vectors = min(schedule.column_vectors, vector_width(width // lanes))
    return Tiles(heads, width, block, min(schedule.head_tile, block), lanes, vectors, schedule)


@T.inline
def start(
    tile: Tiles,
    scale: float,
    q: Any,
    sinks: Any,
    sink: Any,
    out: Any,
    packed: Any,
    peak: Any,
    total: Any,
    i: Any,
    j: Any,
    at: Any,
    g: Any,
    slot: Any,
) -> None:
    """Transpose and scale the queries of block `g`, zero its outputs, and open the softmax, with the sink logit or not.

    Its maximum starts at the sink logit in any case; `sink` is 1 or 0, whether the sum does as well.
    """
    for h in range(T.int64(tile.head_block)):
        head: T.let = g * T.int64(tile.head_block) + h
        for c in range(T.int64(tile.width)):
            packed[slot, c, h] = q[i, j, head, c] * T.float32(scale)
        for c in range(T.int64(tile.width)):
            out[i, at, head, c] = T.float32(0)
    for v in T.vectorized(tile.head_block):
        peak[slot, v] = sinks[g * T.int64(tile.head_block) + v]
        total[slot, v] = T.float32(sink)


@T.inline
def prefetch_row(stored: CacheRows, source: Any, i: Any, at: Any) -> None:
    """Ask for ``source[i, at]``, a row of `stored`'s format."""
    line = T.meta_var(LINE_BYTES // element_bytes(stored.dtype))
    for c in range(T.int64(-(-stored.columns // line))):
        T.evaluate(prefetch(source[i, at, c * T.int64(line)]))


@T.inline
def copy_raw_row(
    stored: CacheRows, window_size: int, panel: Any, r: Any, kv: Any, window: Any, i: Any, t: Any, p: Any
) -> None:
    """``panel[r]`` = the raw row of position t: from this chunk, or from the ring when it is older."""
    if t >= p:
        stored.read(panel, r, kv, i, t - p)
    else:
        stored.read(panel, r, window, i, t % T.int64(window_size))


def _accumulators(tile: Tiles) -> list[Any]:
    """Sums of a tile, ``[head_tile, lanes]`` per column vector: together they would not stay on the stack."""
    return [T.alloc_buffer((tile.head_tile, tile.lanes), "float32", scope="local") for _ in range(tile.vectors)]


def _each_vector(tile: Tiles, body: Any, before: tuple[Any, ...], column: Any) -> None:
    """``body(*before, u, its first column)`` for every column vector u of a tile, in Python: u picks a buffer."""
    for u in range(tile.vectors):
        body(*before, u, column + T.int64(u * tile.lanes))


@T.inline
def attend(
    tile: Tiles,
    packed: Any,
    panel: Any,
    scores: Any,
    peak: Any,
    total: Any,
    out: Any,
    first: Any,
    last: Any,
    i: Any,
    at: Any,
    g: Any,
    slot: Any,
) -> None:
    """Take the panel's rows from `first` to `last` into the running softmax and outputs ``out[i, at]`` of block `g`.

    `slot` is the block's place in `packed`, `peak` and `total`.
    """
    # Scores, in whole tiles: those of rows outside, which may be stale, are never read.
    before: T.let = first // T.int64(tile.row_tile)
    for later in range((last + T.int64(tile.row_tile - 1)) // T.int64(tile.row_tile) - before):
        tile_index: T.let = before + later
        dot = T.alloc_buffer((tile.row_tile, tile.head_block), "float32", scope="local")
        for r in T.unroll(tile.row_tile):
            for v in T.vectorized(tile.head_block):
                dot[r, v] = T.float32(0)
        for c in range(T.int64(tile.width)):
            for r in T.unroll(tile.row_tile):
                for v in T.vectorized(tile.head_block):
                    dot[r, v] = dot[r, v] + panel[tile_index * T.int64(tile.row_tile) + r, c] * packed[slot, c, v]
        for r in T.unroll(tile.row_tile):
            for v in T.vectorized(tile.head_block):
                scores[tile_index * T.int64(tile.row_tile) + r, v] = dot[r, v]

    # Online softmax, one head per lane: `shrink` brings what was summed so far to the new maximum.
    top = T.alloc_buffer((tile.head_block,), "float32", scope="local")
    sums = T.alloc_buffer((tile.head_block,), "float32", scope="local")
    shrink = T.alloc_buffer((tile.head_block,), "float32")
    for v in T.vectorized(tile.head_block):
        top[v] = peak[slot, v]
    for r in range(last - first):
        for v in T.vectorized(tile.head_block):
            top[v] = T.max(top[v], scores[first + r, v])
    for v in T.vectorized(tile.head_block):
        shrink[v] = exp(peak[slot, v] - top[v])
    for v in T.vectorized(tile.head_block):
        sums[v] = total[slot, v] * shrink[v]
    for r in range(last - first):
        for v in T.vectorized(tile.head_block):
            scores[first + r, v] = exp(scores[first + r, v] - top[v])
        for v in T.vectorized(tile.head_block):
            sums[v] = sums[v] + scores[first + r, v]
    for v in T.vectorized(tile.head_block):
        peak[slot, v] = top[v]
        total[slot, v] = sums[v]

    # Weighted sum. A strip of columns stays in L1 over the heads.
    for strip in range(T.int64(tile.width // (tile.lanes * tile.vectors))):
        for group in range(T.int64(tile.head_block // tile.head_tile)):
            h: T.let = group * T.int64(tile.head_tile)
            head: T.let = g * T.int64(tile.head_block) + h
            column: T.let = strip * T.int64(tile.lanes * tile.vectors)
            acc = _accumulators(tile)

            @T.inline
            def begin(a, u, c):
                for v in T.vectorized(tile.lanes):
                    acc[u][a, v] = out[i, at, head + a, c + v] * shrink[h + a]

            @T.inline
            def add(r, a, u, c):
                for v in T.vectorized(tile.lanes):
                    acc[u][a, v] = acc[u][a, v] + scores[r, h + a] * panel[r, c + v]

            @T.inline
            def end(a, u, c):
                for v in T.vectorized(tile.lanes):
                    out[i, at, head + a, c + v] = acc[u][a, v]

            for a in T.unroll(tile.head_tile):
                _each_vector(tile, begin, (a,), column)
            for r in range(last - first):
                for a in T.unroll(tile.head_tile):
                    _each_vector(tile, add, (first + r, a), column)
            for a in T.unroll(tile.head_tile):
                _each_vector(tile, end, (a,), column)


@T.inline
def rotate_back(
    tile: Tiles, half: int, inv_freq: Any, t: Any, out: Any, i: Any, j: Any, first: Any, count: int
) -> None:
    """Rotate the last ``2 * half`` dims of `count` heads from `first` by ``-t * inv_freq``, outputs still in cache."""
    cosines = T.alloc_buffer((T.int64(half),), "float32")
    sines = T.alloc_buffer((T.int64(half),), "float32")
    fill_angles(inv_freq, t, cosines, sines, half)
    for h in range(T.int64(count)):
        rotate_row(out, out, (i, j, first + h), cosines, sines, tile.width, half, -1.0)


@T.inline
def attend_rows(
    tile: Tiles,
    stored: CacheRows,
    window_size: int,
    scale: float,
    sink: int,
    q: Any,
    kv: Any,
    window: Any,
    rows: Any,
    chosen: Any,
    compressed: Any,
    sinks: Any,
    p: Any,
    out: Any,
    peak: Any,
    total: Any,
    i: Any,
    j: Any,
    at: Any,
    first: Any,
    last: Any,
) -> None:
    """All heads of a token over the panels from `first` to `last` of the rows it sees, into ``out[i, at]``.

    The token sees its last raw rows, then `compressed` compressed ones. `rows` is None where there are none; `chosen`
    lists the compressed rows, or is None where they are the first ones. `stored` is the format of kv, window and rows.
    The outputs are not yet divided by `total`.
    """
    packed = T.alloc_buffer((T.int64(tile.blocks), T.int64(tile.width), T.int64(tile.head_block)), "float32")
    panel = T.alloc_buffer((T.int64(tile.panel), T.int64(tile.pitch)), "float32")
    scores = T.alloc_buffer((T.int64(tile.panel), T.int64(tile.head_block)), "float32")
    t: T.let = p + j
    raw: T.let = T.min(t + T.int64(1), T.int64(window_size))

    @T.inline
    def ask(part):
        """Ask for the rows of a panel ahead: left to the processor, each costs more than the arithmetic on it."""
        top: T.let = (first + part) * T.int64(tile.panel)
        for r in range(T.min(raw + compressed - top, T.int64(tile.panel))):
            row: T.let = top + r
            if row < raw:
                if t + T.int64(1) - raw + row >= p:
                    prefetch_row(stored, kv, i, t + T.int64(1) - raw + row - p)
                else:
                    prefetch_row(stored, window, i, (t + T.int64(1) - raw + row) % T.int64(window_size))
            elif rows is None:
                pass
            elif chosen is None:
                prefetch_row(stored, rows, i, row - raw)
            else:
                prefetch_row(stored, rows, i, chosen[row - raw])

    if first < last:
        ask(T.int64(0))
    for g in range(T.int64(tile.blocks)):
        start(tile, scale, q, sinks, sink, out, packed, peak, total, i, j, at, g, g)
    for part in range(last - first):
        top: T.let = (first + part) * T.int64(tile.panel)
        count: T.let = T.min(raw + compressed - top, T.int64(tile.panel))
        for r in range(count):
            row: T.let = top + r
            if row < raw:
                copy_raw_row(stored, window_size, panel, r, kv, window, i, t + T.int64(1) - raw + row, p)
            elif rows is None:
                pass
            elif chosen is None:
                stored.read(panel, r, rows, i, row - raw)
            else:
                stored.read(panel, r, rows, i, chosen[row - raw])
        if part + T.int64(1) < last - first:
            ask(part + T.int64(1))
        for g in range(T.int64(tile.blocks)):
            attend(tile, packed, panel, scores, peak, total, out, T.int64(0), count, i, at, g, g)


def softmax_state(tile: Tiles, tokens: int = 1) -> tuple[Any, Any]:
    """Memory for each head's running maximum and sum."""
    shape = (T.int64(tokens * tile.blocks), T.int64(tile.head_block))
    return T.alloc_buffer(shape, "float32"), T.alloc_buffer(shape, "float32")


@T.inline
def finish(tile: Tiles, total: Any, out: Any, i: Any, j: Any, a: Any) -> None:
    """Divide the outputs of the `a`-th token of a block by the softmax's denominator."""
    for g in range(T.int64(tile.blocks)):
        for h in range(T.int64(tile.head_block)):
            inverse: T.let = T.float32(1) / total[a * T.int64(tile.blocks) + g, h]
            for c in range(T.int64(tile.width)):
                out[i, j, g * T.int64(tile.head_block) + h, c] = (
                    out[i, j, g * T.int64(tile.head_block) + h, c] * inverse
                )


@T.inline
def zero(tile: Tiles, out: Any, i: Any, j: Any, first: Any, count: int) -> None:
    """Outputs of `count` heads from `first` of a padding token."""
    for h in range(T.int64(count)):
        for c in range(T.int64(tile.width)):
            out[i, j, first + h, c] = T.float32(0)


@T.inline
def encode_rows(stored: CacheRows, kv: Any, own: Any, lengths: Any, batch: Any, chunk: Any) -> None:
    """The chunk's live rows ``kv [B * S, width]`` as the caches have them, ``own [B, S, columns]``."""

    @T.inline
    def encode(item):
        i: T.let = T.truncdiv(item, chunk)
        j: T.let = T.truncmod(item, chunk)
        if j < lengths[i]:
            stored.write(own, i, j, kv, item)

    each_row(encode, batch * chunk, stored.width)


@T.inline
def write_window(
    stored: CacheRows, window_size: int, kv: Any, window: Any, positions: Any, lengths: Any, batch: Any
) -> None:
    """The live rows of the chunk into the ring, slot = position mod window; only the last `window_size` matter."""
    for i in range(batch):
        live: T.let = T.min(lengths[i], T.int64(window_size))
        for a in range(live):
            j: T.let = lengths[i] - live + a
            stored.copy(window, i, (positions[i] + j) % T.int64(window_size), kv, j)
