"""Grouped experts with ragged tails (V4 paper, section 2.1): choices are sorted by expert, multiplied block by block.

Every expert's choices become consecutive rows of ``sorted``, beginning at a multiple of the block's T rows; a block of
rows has one expert, whose number the product reads from memory. Rows between an expert's last choice and its last
block's end hold anything: rows do not mix in a product, and nobody reads them afterwards. Places are found by counting,
not by sorting: a choice stands behind all choices of smaller experts and the earlier ones of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..emit import Buffer, TileBuilder, Value
from ..program import DeviceLimits, GridAxis, Polynomial, Role, TileProgram, Work
from ..tiles import CUBE, column_tile, power_below
from .common import ROWS, fixed, program_name, tile_columns
from .swiglu import gated

_OP = "GroupedExperts"
_CHOICES = 32
"""Choices of one tile when they are counted."""


@dataclass(frozen=True)
class ExpertSizes:
    """Static sizes of the op.

    Attributes:
        experts, hidden, width, top_k: E, D, F and K.
        limit: the model's ``swiglu_limit``.
        dtype: of activations and weights.
        rows: tokens of a launch that tiles are chosen for, None for many; any number is computed.
    """

    experts: int
    hidden: int
    width: int
    top_k: int
    limit: float
    dtype: str = "float16"
    rows: int | None = None

    @property
    def block(self) -> int:
        """T: as many rows as an expert gets on average, within what the cube takes."""
        if self.rows is None:
            return 64
        return max(CUBE, power_below(self.rows * self.top_k / self.experts, 64))

    @property
    def choices(self) -> Polynomial:
        return ROWS * Polynomial.of(self.top_k)

    @property
    def blocks(self) -> GridAxis:
        """At most so many blocks are in use: one per choice, or the full ones and a last one per expert."""
        if self.rows is not None and self.rows * self.top_k <= self.experts:
            return GridAxis(self.choices)
        return GridAxis(self.choices + Polynomial.of(self.experts * self.block), self.block)

    @property
    def sorted_rows(self) -> Polynomial:
        """Rows of ``sorted``: those of all blocks, and a last one for choices of no expert."""
        if self.rows is not None and self.rows * self.top_k <= self.experts:
            return self.choices * Polynomial.of(self.block) + Polynomial.of(1)
        return self.choices + Polynomial.of((self.experts + 1) * self.block + 1)

    def last_row(self, rows: Value) -> Value:
        """Number of the row for choices of no expert."""
        if self.rows is not None and self.rows * self.top_k <= self.experts:
            return rows * (self.top_k * self.block)
        return rows * self.top_k + (self.experts + 1) * self.block


def grouped_experts(sizes: ExpertSizes, limits: DeviceLimits) -> tuple[TileProgram, ...]:
    """The programs of GroupedExperts in the order they run.

    ``x [rows, D]``, ``weights [rows, K]`` float32, ``indices [rows, K]`` int32 (-1 is no expert),
    ``gate_up [E, 2F, D]`` and ``down [E, D, F]`` to ``y [rows, D]``.
    """
    return (
        _offsets(sizes, limits),
        _block_experts(sizes, limits),
        _places(sizes, limits),
        _scatter(sizes, limits),
        _gate_up(sizes, limits),
        _down(sizes, limits),
        _combine(sizes, limits),
    )


def _name(s: ExpertSizes, base: str, *more: object) -> str:
    return program_name(base, s.experts, *more, s.block)


def _ones(b: TileBuilder, where: Value) -> Value:
    """1 where a comparison holds, 0 elsewhere, float32."""
    assert where.shape is not None
    return b.select(where, 1.0, b.fill(0.0, where.shape))


def _offsets(s: ExpertSizes, limits: DeviceLimits) -> TileProgram:
    """``indices`` to ``starts [E]``, each expert's first row, and ``ends [E]``, the row after its last block; int32."""
    b = TileBuilder(_name(s, "expert_offsets", s.top_k), _OP)
    indices = b.argument("indices", ("rows", s.top_k), "int32")
    starts, ends = (b.argument(n, (s.experts,), "int32", Role.WRITE) for n in ("starts", "ends"))
    choices = b.scalar("rows") * s.top_k
    shape = (s.experts, _CHOICES)
    number = b.broadcast(b.iota(s.experts), shape, 1)
    trips = s.choices * Polynomial.of(1 / _CHOICES)
    with b.loop(choices, _CHOICES, carried=[b.fill(0.0, (s.experts,))], trips=trips) as step:
        found = b.load(indices, step.index, (_CHOICES,), valid=(b.minimum(choices - step.index, _CHOICES),), fill=-1)
        same = b.compare("eq", number, b.broadcast(found, shape, 0))
        step.next = [step.carried[0] + b.reduce(_ones(b, same), 1)]
    # Counts are whole numbers below 2^24, so float32 has them exactly; blocks are powers of two.
    blocks = b.cast(b.cast((step.results[0] + float(s.block - 1)) * (1 / s.block), "int32"), "float32")
    padded = blocks * float(s.block)
    tile = power_below(limits.unified_buffer * 0.8 / (s.experts * 4 * 6), s.experts)
    while s.experts % tile:
        tile //= 2
    against = (tile, s.experts)
    across = b.broadcast(padded, against, 0)
    other = b.broadcast(b.iota(s.experts), against, 0)
    with b.loop(s.experts, tile) as step:
        own = b.broadcast(b.iota(tile) + b.cast(step.index, "int32"), against, 1)
        for kind, target in (("lt", starts), ("le", ends)):
            kept = b.select(b.compare(kind, other, own), across, b.fill(0.0, against))
            b.store(b.cast(b.reduce(kept, 1), "int32"), target, step.index)
    return b.finish([fixed(1)])


def _block_experts(s: ExpertSizes, limits: DeviceLimits) -> TileProgram:
    """``ends`` to ``block_expert``: of every block its expert, or E where a block is not in use."""
    tile = power_below(limits.unified_buffer * 0.8 / (s.experts * 4 * 5), 64)
    b = TileBuilder(_name(s, "block_experts"), _OP)
    ends = b.argument("ends", (s.experts,), "int32")
    blocks = b.argument("block_expert", (s.blocks.count * Polynomial.of(1 / s.blocks.tile),), "int32", Role.WRITE)
    b.scalar("rows")
    first = b.program_id(0) * tile
    shape = (tile, s.experts)
    row = (b.iota(tile) + b.cast(first, "int32")) * s.block
    passed = b.compare("le", b.broadcast(b.load(ends, 0, (s.experts,)), shape, 0), b.broadcast(row, shape, 1))
    count = _block_count(b, s)
    b.store(b.cast(b.reduce(_ones(b, passed), 1), "int32"), blocks, first, valid=(b.minimum(count - first, tile),))
    return b.finish([GridAxis(s.blocks.count, s.blocks.tile * tile)])


def _block_count(b: TileBuilder, s: ExpertSizes) -> Value:
    choices = b.scalar("rows") * s.top_k
    if s.blocks.tile == 1:
        return choices
    return (choices + (s.experts * s.block + s.blocks.tile - 1)) // s.blocks.tile


def _places(s: ExpertSizes, limits: DeviceLimits) -> TileProgram:
    """``indices`` and ``starts`` to ``place [rows, K]`` int32: the row of ``sorted`` that each choice gets."""
    b = TileBuilder(_name(s, "expert_places", s.top_k), _OP)
    indices = b.argument("indices", ("rows", s.top_k), "int32")
    starts = b.argument("starts", (s.experts,), "int32")
    places = b.argument("place", ("rows", s.top_k), "int32", Role.WRITE)
    rows = b.scalar("rows")
    choices, first = rows * s.top_k, b.program_id(0) * _CHOICES
    live = b.minimum(choices - first, _CHOICES)
    own = b.load(indices, first, (_CHOICES,), valid=(live,), fill=-1)
    experts = (_CHOICES, s.experts)
    mine = b.compare("eq", b.broadcast(b.iota(s.experts), experts, 0), b.broadcast(own, experts, 1))
    start = b.cast(b.load(starts, 0, (s.experts,)), "float32")
    base = b.reduce(b.select(mine, b.broadcast(start, experts, 0), b.fill(0.0, experts)), 1)
    shape = (_CHOICES, _CHOICES)
    number = b.broadcast(b.iota(_CHOICES) + b.cast(first, "int32"), shape, 1)
    mine = b.broadcast(own, shape, 1)
    trips = s.choices * Polynomial.of(0.5 / _CHOICES)
    with b.loop(first + _CHOICES, _CHOICES, carried=[base], trips=trips) as step:
        left = b.minimum(choices - step.index, _CHOICES)
        other = b.load(indices, step.index, (_CHOICES,), valid=(left,), fill=-1)
        same = _ones(b, b.compare("eq", mine, b.broadcast(other, shape, 0)))
        place = b.broadcast(b.iota(_CHOICES) + b.cast(step.index, "int32"), shape, 0)
        earlier = b.select(b.compare("lt", place, number), same, b.fill(0.0, shape))
        step.next = [step.carried[0] + b.reduce(earlier, 1)]
    nowhere = b.cast(s.last_row(rows), "int32")
    b.store(b.select(b.compare("lt", own, 0), nowhere, b.cast(step.results[0], "int32")), places, first, valid=(live,))
    return b.finish([GridAxis(s.choices, _CHOICES)])


def _scatter(s: ExpertSizes, limits: DeviceLimits) -> TileProgram:
    """``x [rows, D]`` to ``sorted``: every row to the places of its K choices."""
    columns = column_tile(limits, s.hidden, 1, live=2)
    b = TileBuilder(_name(s, "scatter_rows", s.hidden, s.top_k, s.dtype), _OP)
    x = b.argument("x", ("rows", s.hidden), s.dtype)
    places = b.argument("place", ("rows", s.top_k), "int32")
    target = b.argument("sorted", (s.sorted_rows, s.hidden), s.dtype, Role.WRITE)
    b.scalar("rows")
    row = b.program_id(0)
    column, wide = tile_columns(b, s.hidden, columns)
    values = b.load(x, row * s.hidden + column, (1, columns), (s.hidden, 1), (1, wide))
    for choice in range(s.top_k):
        place = b.read(places, row * s.top_k + choice)
        b.store(values, target, place * s.hidden + column, (s.hidden, 1), (1, wide))
    return b.finish([GridAxis(ROWS), fixed(s.hidden, columns)])


def _product_tiles(s: ExpertSizes, limits: DeviceLimits, inner: int, outer: int, weights: int) -> tuple[int, int]:
    """Columns and depth of a block's product with `weights` matrices at once."""
    columns = min(power_below(limits.l0c / 2 / (4 * s.block * weights), 128), -(-outer // CUBE) * CUBE)
    depth = power_below(limits.l1 / 2 / ((s.block + weights * columns) * 2), 256)
    while inner % depth and depth > CUBE:
        depth //= 2
    return columns, min(depth, inner)


def _multiply(
    b: TileBuilder, s: ExpertSizes, source: Buffer, matrices: list[tuple[Buffer, Any]], inner: int, columns: int,
    depth: int, wide: Any, block: Value, used: Value,
) -> tuple[Value, ...]:  # fmt: skip
    """A block's rows times tiles of its expert's matrices; no step is made for a block that is not in use."""
    start = [b.fill(0.0, (s.block, columns)) for _ in matrices]
    with b.loop(used * inner, depth, carried=start, trips=Polynomial.of(-(-inner // depth))) as step:
        left = depth if inner % depth == 0 else b.minimum(inner - step.index, depth)
        fill = None if inner % depth == 0 else 0.0
        rows = b.load(source, block * (s.block * inner) + step.index, (s.block, depth), (inner, 1),
                      None if fill is None else (s.block, left), fill)  # fmt: skip
        step.next = [
            b.matmul(rows, b.transpose(b.load(m, at + step.index, (columns, depth), (inner, 1),
                                              None if fill is None and wide == columns else (wide, left), fill)), total)
            for (m, at), total in zip(matrices, step.carried, strict=True)
        ]  # fmt: skip
    return step.results


def _gate_up(s: ExpertSizes, limits: DeviceLimits) -> TileProgram:
    """``sorted`` times each block's gate and up rows, through SwiGLU, to ``hidden [.., F]``."""
    columns, depth = _product_tiles(s, limits, s.hidden, s.width, 2)
    b = TileBuilder(_name(s, "expert_gate_up", s.hidden, s.width, s.dtype), _OP, Work.MIXED)
    source = b.argument("sorted", (s.sorted_rows, s.hidden), s.dtype)
    weight = b.argument("gate_up", (s.experts, 2 * s.width, s.hidden), s.dtype)
    blocks = b.argument("block_expert", (s.blocks.count * Polynomial.of(1 / s.blocks.tile),), "int32")
    target = b.argument("hidden", (s.sorted_rows, s.width), s.dtype, Role.WRITE)
    b.scalar("rows")
    block = b.program_id(0)
    expert = b.read(blocks, block)
    used = b.minimum(s.experts - expert, 1)
    column, wide = tile_columns(b, s.width, columns)
    at = (b.minimum(expert, s.experts - 1) * (2 * s.width) + column) * s.hidden
    matrices: list[tuple[Buffer, Any]] = [(weight, at), (weight, at + s.width * s.hidden)]
    gate, up = _multiply(b, s, source, matrices, s.hidden, columns, depth, wide, block, used)
    out = b.cast(gated(b, gate, up, s.limit), s.dtype)
    b.store(out, target, block * (s.block * s.width) + column, (s.width, 1), (used * s.block, wide))
    return b.finish([s.blocks, fixed(s.width, columns)])


def _down(s: ExpertSizes, limits: DeviceLimits) -> TileProgram:
    """``hidden`` times each block's down matrix to ``results [.., D]``."""
    columns, depth = _product_tiles(s, limits, s.width, s.hidden, 1)
    b = TileBuilder(_name(s, "expert_down", s.hidden, s.width, s.dtype), _OP, Work.CUBE)
    source = b.argument("hidden", (s.sorted_rows, s.width), s.dtype)
    weight = b.argument("down", (s.experts, s.hidden, s.width), s.dtype)
    blocks = b.argument("block_expert", (s.blocks.count * Polynomial.of(1 / s.blocks.tile),), "int32")
    target = b.argument("results", (s.sorted_rows, s.hidden), s.dtype, Role.WRITE)
    b.scalar("rows")
    block = b.program_id(0)
    expert = b.read(blocks, block)
    used = b.minimum(s.experts - expert, 1)
    column, wide = tile_columns(b, s.hidden, columns)
    at = (b.minimum(expert, s.experts - 1) * s.hidden + column) * s.width
    (total,) = _multiply(b, s, source, [(weight, at)], s.width, columns, depth, wide, block, used)
    start = block * (s.block * s.hidden) + column
    b.store(b.cast(total, s.dtype), target, start, (s.hidden, 1), (used * s.block, wide))
    return b.finish([s.blocks, fixed(s.hidden, columns)])


def _combine(s: ExpertSizes, limits: DeviceLimits) -> TileProgram:
    """``y = sum_k weight_k . results[place_k]``; choices of no expert count nothing and are not read."""
    columns = column_tile(limits, s.hidden, 1, live=6)
    b = TileBuilder(_name(s, "combine_experts", s.hidden, s.top_k, s.dtype), _OP)
    results = b.argument("results", (s.sorted_rows, s.hidden), s.dtype)
    weights = b.argument("weights", ("rows", s.top_k), "float32")
    indices = b.argument("indices", ("rows", s.top_k), "int32")
    places = b.argument("place", ("rows", s.top_k), "int32")
    y = b.argument("y", ("rows", s.hidden), s.dtype, Role.WRITE)
    b.scalar("rows")
    row = b.program_id(0)
    column, wide = tile_columns(b, s.hidden, columns)
    shape = (1, columns)
    total = b.fill(0.0, shape)
    for choice in range(s.top_k):
        at = row * s.top_k + choice
        found = b.minimum(b.maximum(b.read(indices, at), -1) + 1, 1)
        start = b.read(places, at) * s.hidden + column
        value = b.load(results, start, shape, (s.hidden, 1), (found, wide), 0.0)
        total = total + b.cast(value, "float32") * b.read(weights, at)
    b.store(b.cast(total, s.dtype), y, row * s.hidden + column, (s.hidden, 1), (1, wide))
    return b.finish([GridAxis(ROWS), fixed(s.hidden, columns)])
