"""Attention with a sink over the sliding window and compressed rows: sliding, HCA and CSA (V4 paper, section 2.3).

One program takes one token and some of its heads through all of its keys: the window, which lies in one piece in the
history, then blocks of compressed rows with a running maximum and sum (Dao et al., FlashAttention, arXiv 2205.14135).
Rows are keys and values of all heads. For CSA the rows that the indexer chose are gathered first, by a program of its
own: one that gathers and multiplies loses its gather loop in bishengir 1.2.0.

With `splits` above 1, for steps of few tokens, several programs share a token's blocks and another merges what they
found (Dao et al., Flash-Decoding, 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..emit import Buffer, TileBuilder, Value
from ..program import DeviceLimits, GridAxis, Polynomial, Role, TileProgram, Work
from ..tiles import power_below
from .common import BATCH, CHUNK, clamp, fixed, program_name
from .history import history_shape, ring_history, ring_write

KEYS = 128
"""Keys of one block."""
_NOTHING = -1e30
"""Score of what may not be seen: finite, so that differences of two are numbers."""


@dataclass(frozen=True)
class AttentionSizes:
    """Static sizes of an attention op.

    Attributes:
        heads, width, window: H, C and W.
        scale: on query times key.
        ratio: tokens per compressed row of HCA, 0 without.
        chosen: rows the indexer chooses for CSA, 0 without.
        dtype: of queries, rows, window and output.
    """

    heads: int
    width: int
    window: int
    scale: float
    ratio: int = 0
    chosen: int = 0
    dtype: str = "float16"

    @property
    def op(self) -> str:
        if self.chosen:
            return "CompressedSparseAttention"
        return "HeavilyCompressedAttention" if self.ratio else "SlidingWindowAttention"


def attention_op(sizes: AttentionSizes, limits: DeviceLimits, *, splits: int = 1) -> tuple[TileProgram, ...]:
    """The programs of an attention op in the order they run; buffers of one name are one buffer.

    Inputs and outputs have the names and shapes of the op, with int32 positions, lengths and indices; ``history`` and
    the like lie between the programs.
    """
    s, op, ring, history = sizes, sizes.op, "window", "history"
    programs = list(
        ring_history(
            s.window, s.width, limits, op=op, ring=ring, new="kv", history=history, ring_dtype=s.dtype,
            new_dtype=s.dtype,
        )
    )  # fmt: skip
    if s.chosen:
        programs.append(gather(s, limits))
    programs += attend(s, limits, splits=splits)
    return (*programs, ring_write(s.window, s.width, limits, op=op, ring=ring, history=history, dtype=s.dtype))


def gather(sizes: AttentionSizes, limits: DeviceLimits) -> TileProgram:
    """``rows [B, N, C]`` at ``indices [B, S, k]`` to ``chosen [B, S, k, C]``; zeros where an index is -1."""
    s = sizes
    tile = power_below(limits.unified_buffer / 4 / (s.width * 2), 64)
    b = TileBuilder(program_name("gather_rows", s.chosen, s.width, s.dtype), s.op)
    rows = b.argument("rows", ("batch", "capacity", s.width), s.dtype)
    indices = b.argument("indices", ("batch", "chunk", s.chosen), "int32")
    out = b.argument("chosen", ("batch", "chunk", s.chosen, s.width), s.dtype, Role.WRITE)
    b.scalar("batch")
    chunk, capacity, row = b.scalar("chunk"), b.scalar("capacity"), b.program_id(0)
    first = b.program_id(2) * tile
    place = (row * chunk + b.program_id(1)) * s.chosen + first
    live = b.minimum(s.chosen - first, tile)
    block = b.local((tile, s.width), s.dtype)
    b.fill_local(block, 0.0)
    with b.loop(live, trips=Polynomial.of(tile), gathers=True) as step:
        index = b.read(indices, place + step.index)
        found = b.minimum(b.maximum(index, -1) + 1, 1)
        start = (row * capacity + b.maximum(index, 0)) * s.width
        b.copy_in(block, [step.index, 0], rows, start, (1, s.width), (s.width, 1), (found, s.width))
    b.store(b.tensor(block), out, place * s.width, valid=(live, s.width))
    return b.finish([GridAxis(BATCH), GridAxis(CHUNK), fixed(s.chosen, tile)])


def head_tile(sizes: AttentionSizes, limits: DeviceLimits) -> int:
    """Heads of one program: their float32 outputs stand in the unified buffer several times."""
    tile = power_below(limits.unified_buffer / (12 * sizes.width), min(sizes.heads, 64))
    while sizes.heads % tile:
        tile //= 2
    return tile


def attend(sizes: AttentionSizes, limits: DeviceLimits, *, splits: int = 1) -> tuple[TileProgram, ...]:
    """Queries ``q [B, S, H, C]`` against window and rows to ``out [B, S, H, C]``; one program, or two with `splits`."""
    s, tile = sizes, head_tile(sizes, limits)
    b = TileBuilder(program_name("attend", s.heads, s.width, s.window, s.ratio, s.chosen, s.dtype, splits), s.op,
                    Work.MIXED)  # fmt: skip
    q = b.argument("q", ("batch", "chunk", s.heads, s.width), s.dtype)
    history = b.argument("history", history_shape(s.window, s.width), s.dtype)
    rows = indices = None
    if s.chosen:
        rows = b.argument("chosen", ("batch", "chunk", s.chosen, s.width), s.dtype)
        indices = b.argument("indices", ("batch", "chunk", s.chosen), "int32")
    elif s.ratio:
        rows = b.argument("rows", ("batch", "capacity", s.width), s.dtype)
    sinks = b.argument("sinks", (s.heads,), "float32") if splits == 1 else None
    positions = b.argument("positions", ("batch",), "int32")
    lengths = b.argument("lengths", ("batch",), "int32") if s.ratio else None
    state = _outputs(b, s, splits)
    b.scalar("batch")
    chunk = b.scalar("chunk")
    capacity = b.scalar("capacity") if s.ratio else 0
    row, token = b.program_id(0), b.program_id(1)
    head_tiles = s.heads // tile
    third = b.program_id(2) if splits * head_tiles > 1 else 0
    head, split = (third % head_tiles) * tile, third // head_tiles
    place = row * chunk + token
    position = b.read(positions, row) + token

    queries = b.load(q, (place * s.heads + head) * s.width, (tile, s.width))
    column = b.iota(KEYS)
    hidden = b.maximum(s.window - 1 - position, 0)
    if sinks is not None:
        running = _Running.of_sink(b, b.load(sinks, head, (tile,)), tile, s.width)
    else:
        # The first split takes the window; of the others every row of it is out of sight. The merge adds the sinks.
        hidden = b.maximum(hidden, b.minimum(split, 1) * s.window)
        running = _Running.of_nothing(b, tile, s.width)
    for start in range(0, s.window, KEYS):
        many = min(KEYS, s.window - start)
        keys = b.load(history, (row * (chunk + s.window) + token + 1 + start) * s.width, (KEYS, s.width),
                      valid=None if many == KEYS else (many, s.width), fill=0.0)  # fmt: skip
        seen = b.compare("ge", column, b.cast(hidden - start, "int32"))
        running = running.with_keys(queries, keys, _flags(b, seen, many), s)
    if rows is not None:
        if s.chosen:
            count: Any = s.chosen
            base = place * s.chosen
            trips = Polynomial.of(-(-s.chosen // (KEYS * splits)))
        else:
            assert lengths is not None
            last = b.minimum(position + 1, b.read(positions, row) + b.read(lengths, row))
            count = clamp(b, last // s.ratio, 0, capacity)
            base = row * capacity
            trips = Polynomial.of(1 / (KEYS * splits * s.ratio), "context")
        running = _over_rows(b, s, running, queries, rows, indices, base, count, split, splits, trips)
    _finish(b, s, state, running, place, head, split, splits, tile)
    made = b.finish([GridAxis(BATCH), GridAxis(CHUNK), fixed(splits * head_tiles)])
    return (made,) if splits == 1 else (made, merge(s, limits, splits))


def _over_rows(
    b: TileBuilder, s: AttentionSizes, running: _Running, queries: Value, rows: Buffer, indices: Buffer | None,
    base: Any, count: Any, split: Any, splits: int, trips: Polynomial,
) -> _Running:  # fmt: skip
    """`running` after every `splits`-th block of the `count` rows from row `base` of `rows`."""
    column = b.iota(KEYS)
    first = split * KEYS if splits > 1 else 0
    with b.loop(count, KEYS * splits, first, running.values, trips) as step:
        left = b.minimum(count - step.index, KEYS)
        keys = b.load(rows, (base + step.index) * s.width, (KEYS, s.width), valid=(left, s.width), fill=0.0)
        if indices is None:
            seen = b.compare("lt", column, b.cast(left, "int32"))
        else:
            found = b.load(indices, base + step.index, (KEYS,), valid=(left,), fill=-1)
            seen = b.compare("ge", found, 0)
        step.next = _Running(b, *step.carried).with_keys(queries, keys, _flags(b, seen), s).values
    return _Running(b, *step.results)


def _flags(b: TileBuilder, seen: Value, many: int = KEYS) -> Value:
    """1 for the keys of a block that are seen, 0 for the others and for those behind the first `many`; float32."""
    flags = b.select(seen, b.constant(1.0, "float32", (KEYS,)), b.constant(0.0, "float32", (KEYS,)))
    if many < KEYS:
        flags = b.select(b.compare("lt", b.iota(KEYS), many), flags, b.constant(0.0, "float32", (KEYS,)))
    return flags


@dataclass(frozen=True)
class _Running:
    """Softmax so far: largest score and sum of exponentials ``[h]``, weighted sum of keys ``[h, C]``, undivided."""

    builder: TileBuilder
    largest: Value
    total: Value
    out: Value

    @classmethod
    def of_sink(cls, b: TileBuilder, sink: Value, heads: int, width: int) -> _Running:
        """Only the sink seen: it takes weight and gives no value."""
        return cls(b, sink * 1.0, b.fill(1.0, (heads,)), b.fill(0.0, (heads, width)))

    @classmethod
    def of_nothing(cls, b: TileBuilder, heads: int, width: int) -> _Running:
        return cls(b, b.fill(_NOTHING, (heads,)), b.fill(0.0, (heads,)), b.fill(0.0, (heads, width)))

    @property
    def values(self) -> tuple[Value, Value, Value]:
        return self.largest, self.total, self.out

    def with_keys(self, queries: Value, keys: Value, flags: Value, s: AttentionSizes) -> _Running:
        """After one more block of keys."""
        b = self.builder
        assert self.out.shape is not None
        block, wide = (self.out.shape[0], KEYS), self.out.shape
        # Chosen, not added up: for keys beyond a tile's valid ones the product may give anything, NaN included, for
        # bishengir 1.2.0 multiplies valid rows only, whatever the others were filled with.
        products = b.matmul(queries, b.transpose(keys)) * s.scale
        seen = b.compare("gt", b.broadcast(flags, block, 0), 0.5)
        scores = b.select(seen, products, b.constant(_NOTHING, "float32", block))
        largest = b.maximum(self.largest, b.reduce(scores, 1, "max"))
        kept = b.unary("exp", self.largest - largest)
        share = b.unary("exp", scores - b.broadcast(largest, block, 1))
        total = self.total * kept + b.reduce(share, 1)
        out = self.out * b.broadcast(kept, wide, 1) + b.matmul(b.cast(share, s.dtype), keys)
        return _Running(b, largest, total, out)


def _outputs(b: TileBuilder, s: AttentionSizes, splits: int) -> tuple[Buffer, ...]:
    if splits == 1:
        return (b.argument("out", ("batch", "chunk", s.heads, s.width), s.dtype, Role.WRITE),)
    each = ("batch", "chunk", splits, s.heads)
    return (
        b.argument("part_largest", each, "float32", Role.WRITE),
        b.argument("part_total", each, "float32", Role.WRITE),
        b.argument("part_out", (*each, s.width), "float32", Role.WRITE),
    )


def _finish(
    b: TileBuilder, s: AttentionSizes, state: tuple[Buffer, ...], running: _Running, place: Any, head: Any, split: Any,
    splits: int, tile: int,
) -> None:  # fmt: skip
    if splits == 1:
        out = running.out / b.broadcast(running.total, (tile, s.width), 1)
        b.store(b.cast(out, s.dtype), state[0], (place * s.heads + head) * s.width)
        return
    first = (place * splits + split) * s.heads + head
    for value, buffer in zip(running.values, state, strict=True):
        b.store(value, buffer, first * (s.width if value is running.out else 1))


def merge(sizes: AttentionSizes, limits: DeviceLimits, splits: int) -> TileProgram:
    """What the splits of each token found, ``part_*``, and the sinks to ``out [B, S, H, C]``."""
    s = sizes
    tile = power_below(limits.unified_buffer * 0.8 / (s.width * 4 * 4), min(s.heads, 32))
    while s.heads % tile:
        tile //= 2
    b = TileBuilder(program_name("merge_splits", s.heads, s.width, splits, s.dtype), s.op)
    each = ("batch", "chunk", splits, s.heads)
    largest, total = (b.argument(f"part_{n}", each, "float32") for n in ("largest", "total"))
    parts = b.argument("part_out", (*each, s.width), "float32")
    sinks = b.argument("sinks", (s.heads,), "float32")
    out = b.argument("out", ("batch", "chunk", s.heads, s.width), s.dtype, Role.WRITE)
    b.scalar("batch")
    place = b.program_id(0) * b.scalar("chunk") + b.program_id(1)
    head = b.program_id(2) * tile if s.heads > tile else 0
    shape = (tile, s.width)
    running = _Running.of_sink(b, b.load(sinks, head, (tile,)), *shape)
    with b.loop(splits, carried=running.values) as step:
        first = (place * splits + step.index) * s.heads + head
        most, weight, values = step.carried
        found = b.load(largest, first, (tile,))
        new = b.maximum(most, found)
        kept, joined = b.unary("exp", most - new), b.unary("exp", found - new)
        value = b.load(parts, first * s.width, shape)
        step.next = [
            new, weight * kept + b.load(total, first, (tile,)) * joined,
            values * b.broadcast(kept, shape, 1) + value * b.broadcast(joined, shape, 1),
        ]  # fmt: skip
    _, weight, values = step.results
    b.store(b.cast(values / b.broadcast(weight, shape, 1), s.dtype), out, (place * s.heads + head) * s.width)
    return b.finish([GridAxis(BATCH), GridAxis(CHUNK), fixed(s.heads, tile)])
