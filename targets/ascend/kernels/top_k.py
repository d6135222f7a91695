"""The best compressed rows of every token: a threshold by bits, the rows above it, their order (V4 paper, 2.3).

Plain vector and scalar work, so it runs where bishengir has no sort. The threshold is the k-th largest score, found bit
by bit on the order-preserving integers of float32; rows above it, and as many at it as are wanted in order of their
index, are packed by counting; their final order, too, is a count of who beats whom. Equal scores go to the smaller
index.
"""

from __future__ import annotations

from ..emit import TileBuilder, Value
from ..program import DeviceLimits, GridAxis, Polynomial, Role, TileProgram
from ..tiles import power_below
from .common import BATCH, CHUNK, clamp, program_name

_OP = "LightningIndex"
_PACKED = 64
"""Scores that are packed at once: all are compared with all."""
_LOWEST = -3.4028234663852886e38
"""The least finite float32: below every score that is a number."""
_LOWEST_KEY = -2139095040
"""Its order-preserving integer."""


def index_top_k(top_k: int, ratio: int, limits: DeviceLimits) -> tuple[TileProgram, ...]:
    """``scores [B, S, N]`` float32, ready ones valid, to ``indices [B, S, k]`` int32, best first, -1 where fewer are.

    Args:
        top_k: k.
        ratio: tokens per row.
        limits: of the device.
    """
    return _threshold(top_k, ratio, limits), _pack(top_k, ratio, limits), _order(top_k, ratio, limits)


class _Token:
    """This program's token, and how many rows are ready for it."""

    def __init__(self, b: TileBuilder, ratio: int) -> None:
        positions, lengths = (b.argument(n, ("batch",), "int32") for n in ("positions", "lengths"))
        b.scalar("batch")
        chunk, self.capacity = b.scalar("chunk"), b.scalar("capacity")
        row, token = b.program_id(0), b.program_id(1)
        position = b.read(positions, row)
        last = b.minimum(position + token + 1, position + b.read(lengths, row))
        self.ready = clamp(b, last // ratio, 0, self.capacity)
        self.place = row * chunk + token


def _count(b: TileBuilder, where: Value) -> Value:
    """How often a comparison ``[n]`` holds, ``[1]`` float32."""
    assert where.shape is not None
    ones = b.select(where, 1.0, b.fill(0.0, where.shape))
    return b.reduce(b.reshape(ones, (1, *where.shape)), 1)


def _as_float(b: TileBuilder, key: Value) -> Value:
    """The float32 whose order-preserving integer is `key`, scalars: negative ones have their other bits turned."""
    bits = b.select(b.compare("lt", key, 0), b.binary("xor", key, 0x7FFFFFFF), key)
    return b.bitcast(bits, "float32")


def _threshold(top_k: int, ratio: int, limits: DeviceLimits) -> TileProgram:
    """``thresholds [B, S, 2]``: the k-th largest score of each token, and how many are above it."""
    tile = power_below(limits.unified_buffer / (4 * 8), 2048)
    b = TileBuilder(program_name("index_threshold", top_k, ratio), _OP)
    scores = b.argument("scores", ("batch", "chunk", "capacity"), "float32")
    token = _Token(b, ratio)
    out = b.argument("thresholds", ("batch", "chunk", 2), "float32", Role.WRITE)
    trips = Polynomial.of(1 / (tile * ratio), "context")

    def counted(bound: Value, kind: str) -> Value:
        with b.loop(token.ready, tile, carried=[b.fill(0.0, (1,))], trips=trips) as step:
            start = token.place * token.capacity + step.index
            values = b.load(scores, start, (tile,), valid=(b.minimum(token.ready - step.index, tile),), fill=_LOWEST)
            step.next = [step.carried[0] + _count(b, b.compare(kind, values, bound))]
        return b.extract(step.results[0])

    wanted = float(top_k)
    positive = b.compare("ge", counted(b.constant(0.0, "float32"), "ge"), wanted)
    first = b.select(positive, 0, b.constant(-(2**31), "int32"))
    with b.loop(31, carried=[first]) as bits:
        bit = b.binary("shift", b.constant(1, "int32"), b.cast(30 - bits.index, "int32"))
        key = bits.carried[0] + bit
        enough = b.compare("ge", counted(_as_float(b, key), "ge"), wanted)
        bits.next = [b.select(enough, key, bits.carried[0])]
    # With fewer scores than wanted no bit is kept; the key is then a NaN's, and stands for the least number.
    lowest = b.compare("le", bits.results[0], _LOWEST_KEY)
    bound = b.select(lowest, b.constant(_LOWEST, "float32"), _as_float(b, bits.results[0]))
    above = counted(bound, "gt")
    b.store(b.fill(bound, (1,)), out, token.place * 2)
    b.store(b.fill(above, (1,)), out, token.place * 2 + 1)
    return b.finish([GridAxis(BATCH), GridAxis(CHUNK)])


def _pack(top_k: int, ratio: int, limits: DeviceLimits) -> TileProgram:
    """``packed_scores`` and ``packed_rows [B, S, k]``: the chosen rows by ascending index."""
    b = TileBuilder(program_name("index_pack", top_k, ratio), _OP)
    scores = b.argument("scores", ("batch", "chunk", "capacity"), "float32")
    thresholds = b.argument("thresholds", ("batch", "chunk", 2), "float32")
    token = _Token(b, ratio)
    each = ("batch", "chunk", top_k)
    targets = tuple(
        b.argument(f"packed_{n}", each, t, Role.WRITE) for n, t in (("scores", "float32"), ("rows", "int32"))
    )
    bound, above = (b.read(thresholds, token.place * 2 + i) for i in range(2))
    n, square = _PACKED, (_PACKED, _PACKED)
    across = b.broadcast(b.iota(n, "float32"), square, 0)
    down = b.broadcast(b.iota(n, "float32"), square, 1)
    before = b.select(b.compare("lt", across, down), 1.0, b.fill(0.0, square))
    zero = b.constant(0.0, "float32")
    trips = Polynomial.of(1 / (n * ratio), "context")
    with b.loop(token.ready, n, carried=[zero, zero], trips=trips) as step:
        begun, ties = step.carried
        live = b.minimum(token.ready - step.index, n)
        start = token.place * token.capacity + step.index
        values = b.load(scores, start, (n,), valid=(live,), fill=-float("inf"))
        over = b.select(b.compare("gt", values, bound), 1.0, b.fill(0.0, (n,)))
        equal = b.select(b.compare("eq", values, bound), 1.0, b.fill(0.0, (n,)))
        earlier = b.reduce(before * b.broadcast(equal, square, 0), 1) + ties
        kept = b.select(b.compare("lt", earlier, float(top_k) - above), equal, b.fill(0.0, (n,))) + over
        place = b.reduce(before * b.broadcast(kept, square, 0), 1)
        # Slot by row: which kept score goes to which place among those of this tile.
        there = b.compare("eq", down, b.broadcast(place, square, 0))
        fits = b.select(there, b.broadcast(kept, square, 0), b.fill(0.0, square))
        chosen = b.compare("gt", fits, 0.0)
        number = b.iota(n, "float32") + b.cast(b.cast(step.index, "int32"), "float32")
        many = b.extract(b.reduce(b.reshape(kept, (1, n)), 1))
        count, first = (b.cast(b.cast(v, "int32"), "index") for v in (many, begun))
        for what, target in ((values, targets[0]), (number, targets[1])):
            packed = b.reduce(b.select(chosen, b.broadcast(what, square, 0), b.fill(0.0, square)), 1)
            packed = packed if target is targets[0] else b.cast(packed, "int32")
            b.store(packed, target, token.place * top_k + first, valid=(count,))
        equals = b.extract(b.reduce(b.reshape(equal, (1, n)), 1))
        step.next = [begun + many, ties + equals]
    return b.finish([GridAxis(BATCH), GridAxis(CHUNK)])


def _order(top_k: int, ratio: int, limits: DeviceLimits) -> TileProgram:
    """``packed_*`` to ``indices [B, S, k]``, best first."""
    tile = power_below(limits.unified_buffer * 0.8 / (top_k * 4 * 8), 32)
    b = TileBuilder(program_name("index_order", top_k, ratio), _OP)
    each = ("batch", "chunk", top_k)
    scores, rows = b.argument("packed_scores", each, "float32"), b.argument("packed_rows", each, "int32")
    token = _Token(b, ratio)
    out = b.argument("indices", each, "int32", Role.WRITE)
    count = b.minimum(token.ready, top_k)
    start = token.place * top_k
    every = b.load(scores, start, (top_k,), valid=(count,), fill=-float("inf"))
    against = (tile, top_k)
    rivals = b.broadcast(every, against, 0)
    number = b.broadcast(b.iota(top_k, "float32"), against, 0)
    with b.loop(count, tile, carried=[b.fill(0.0, (top_k,))], trips=Polynomial.of(-(-top_k // tile))) as step:
        live = b.minimum(count - step.index, tile)
        mine = b.load(scores, start + step.index, (tile,), valid=(live,), fill=-float("inf"))
        place = b.iota(tile, "float32") + b.cast(b.cast(step.index, "int32"), "float32")
        earlier = b.select(b.compare("lt", number, b.broadcast(place, against, 1)), 1.0, b.fill(0.0, against))
        score = b.broadcast(mine, against, 1)
        ahead = b.select(b.compare("gt", rivals, score), 1.0, b.fill(0.0, against))
        ahead = b.select(b.compare("eq", rivals, score), earlier, ahead)
        there = b.compare("eq", b.broadcast(b.reduce(ahead, 1), against, 1), number)
        # Numbers from 1, so that an empty slot's 0 becomes -1; rows beyond the last have rank k or more.
        own = b.load(rows, start + step.index, (tile,), valid=(live,), fill=-1)
        found = b.broadcast(b.cast(own, "float32") + 1.0, against, 1)
        step.next = [step.carried[0] + b.reduce(b.select(there, found, b.fill(0.0, against)), 0)]
    b.store(b.cast(step.results[0] - 1.0, "int32"), out, start)
    return b.finish([GridAxis(BATCH), GridAxis(CHUNK)])
