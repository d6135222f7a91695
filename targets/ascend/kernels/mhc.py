"""Manifold-constrained hyper-connections (mHC paper, section 4.2): entry, exit and head.

The logits of a token's weights are a product of all its streams with a small matrix, in float32 on the cube, cut along
the streams so that a step of few tokens keeps every core busy. Everything of a token's own weights - sigmoids, softmax,
Sinkhorn-Knopp iterations - works on vectors of tokens, one vector per weight (structure of arrays), because a 4 x 4
matrix would fill a fraction of a vector. So ``pre``, ``post`` and ``comb`` are ``[M, rows]`` and ``[M * M, rows]``
here.
"""

from __future__ import annotations

from ..emit import Buffer, TileBuilder, Value
from ..program import DeviceLimits, GridAxis, Role, TileProgram, Work
from ..tiles import CUBE, column_tile, power_below
from .common import ROWS, fixed, program_name, tile_columns, tile_rows

_TOKENS = 64
"""Tokens of one vector: 256 bytes of float32, one repeat of the vector unit."""


def mhc_pre(
    streams: int, width: int, iterations: int, hc_eps: float, norm_eps: float, limits: DeviceLimits, *,
    out: str = "float16", rows: int | None = None,
) -> tuple[TileProgram, ...]:  # fmt: skip
    """The programs of MHCPre: ``streams [rows, M, D]`` float32 to ``collapsed [rows, D]``, ``post`` and ``comb``.

    Args:
        streams, width: M and D.
        iterations: Sinkhorn-Knopp iterations, at least 1.
        hc_eps, norm_eps: the op's attributes.
        limits: of the device.
        out: dtype of ``collapsed``.
        rows: tokens of a launch that tiles are chosen for, None for many.
    """
    logits = (2 + streams) * streams
    return (
        *_logits(logits, streams, width, limits, rows, "MHCPre"),
        _mixing(streams, width, iterations, hc_eps, norm_eps, limits, rows),
        _collapse(streams, width, limits, out, "MHCPre"),
    )


def mhc_head(
    streams: int, width: int, hc_eps: float, norm_eps: float, limits: DeviceLimits, *, out: str = "float16",
    rows: int | None = None,
) -> tuple[TileProgram, ...]:  # fmt: skip
    """The programs of MHCHead: ``streams [rows, M, D]`` float32 to ``collapsed [rows, D]``."""
    return (
        *_logits(streams, streams, width, limits, rows, "MHCHead"),
        _head_weights(streams, width, hc_eps, norm_eps, limits, rows),
        _collapse(streams, width, limits, out, "MHCHead"),
    )


def _parts(limits: DeviceLimits, inputs: int, rows: int | None) -> int:
    """Pieces a token's streams are cut into, so that a launch has about as many programs as there are cube cores."""
    if rows is not None and rows > 4 * _TOKENS:
        return 1
    most = limits.cube_cores if rows is not None else 4
    parts = power_below(most, max(1, inputs // 512))
    while inputs % parts:
        parts //= 2
    return parts


def _logits(
    count: int, streams: int, width: int, limits: DeviceLimits, rows: int | None, op: str
) -> tuple[TileProgram, TileProgram]:
    """``part_logits [P, Z, rows]``, products of a P-th of the streams each, and ``squares [rows]``, sums over all."""
    inputs, tokens = streams * width, _TOKENS if rows is None or rows > CUBE else CUBE
    parts = _parts(limits, inputs, rows)
    share = inputs // parts
    depth = power_below(limits.l1 / 2 / ((tokens + 32) * 4), 512)
    while share % depth and depth > CUBE:
        depth //= 2
    b = TileBuilder(program_name("mhc_logits", count, inputs, parts, tokens), op, Work.CUBE)
    source = b.argument("streams", ("rows", streams, width), "float32")
    fn = b.argument("fn", (count, inputs), "float32")
    out = b.argument("part_logits", (parts, count, "rows"), "float32", Role.WRITE)
    total = b.scalar("rows")
    first = b.program_id(0) * tokens
    live = b.minimum(total - first, tokens)
    part = b.program_id(1) if parts > 1 else 0
    with b.loop(share, depth, carried=[b.fill(0.0, (count, tokens))]) as step:
        at = part * share + step.index
        left = depth if share % depth == 0 else b.minimum(share - step.index, depth)
        whole = isinstance(left, int)
        weights = b.load(fn, at, (count, depth), (inputs, 1), None if whole else (count, left),
                         None if whole else 0.0)  # fmt: skip
        values = b.load(source, first * inputs + at, (tokens, depth), (inputs, 1), (live, left),
                        None if whole else 0.0)  # fmt: skip
        step.next = [b.matmul(weights, b.transpose(values), step.carried[0])]
    b.store(step.results[0], out, (total * part) * count + first, (total, 1), (count, live))
    product = b.finish([GridAxis(ROWS, tokens), *([fixed(parts)] if parts > 1 else [])])
    return product, _squares(streams, width, limits, op)


def _squares(streams: int, width: int, limits: DeviceLimits, op: str) -> TileProgram:
    inputs, tile = streams * width, 8
    columns = column_tile(limits, inputs, tile, live=4)
    b = TileBuilder(program_name("mhc_squares", inputs), op)
    source = b.argument("streams", ("rows", streams, width), "float32")
    squares = b.argument("squares", ("rows",), "float32", Role.WRITE)
    first, live = tile_rows(b, tile)
    with b.loop(inputs, columns, carried=[b.fill(0.0, (tile,))]) as step:
        left = columns if inputs % columns == 0 else b.minimum(inputs - step.index, columns)
        values = b.load(source, first * inputs + step.index, (tile, columns), (inputs, 1), (live, left),
                        None if isinstance(left, int) else 0.0)  # fmt: skip
        step.next = [step.carried[0] + b.reduce(values * values, 1)]
    b.store(step.results[0], squares, first, valid=(live,))
    return b.finish([GridAxis(ROWS, tile)])


class _Weights:
    """The logits of a vector of tokens, ``values [Z, tokens]``: of normalised streams, scaled, their base added.

    Args:
        bounds: where the next of ``scale`` begins, of the Z rows.
    """

    def __init__(
        self, b: TileBuilder, count: int, bounds: tuple[int, ...], parts: int, inputs: int, eps: float
    ) -> None:
        self.b = b
        logits = b.argument("part_logits", (parts, count, "rows"), "float32")
        squares = b.argument("squares", ("rows",), "float32")
        base = b.load(b.argument("base", (count,), "float32"), 0, (count,))
        scale = b.argument("scale", (1 + len(bounds),), "float32")
        self.rows = b.scalar("rows")
        self.first = b.program_id(0) * _TOKENS
        self.live = b.minimum(self.rows - self.first, _TOKENS)
        shape = (count, _TOKENS)
        with b.loop(parts, carried=[b.fill(0.0, shape)]) as step:
            at = step.index * (self.rows * count) + self.first
            part = b.load(logits, at, shape, (self.rows, 1), (count, self.live), 0.0)
            step.next = [step.carried[0] + part]
        total = b.load(squares, self.first, (_TOKENS,), valid=(self.live,), fill=1.0)
        root = b.unary("rsqrt", total * (1 / inputs) + eps)
        factor = b.fill(b.read(scale, 0), (count,))
        for number, bound in enumerate(bounds, start=1):
            factor = b.select(b.compare("lt", b.iota(count), bound), factor, b.read(scale, number))
        scaled = step.results[0] * b.broadcast(root, shape, 0) * b.broadcast(factor, shape, 1)
        self.values = scaled + b.broadcast(base, shape, 1)

    def rows_of(self, first: int, count: int) -> Value:
        """``[count, tokens]`` of the logits."""
        return self.b.part(self.values, [first, 0], (count, _TOKENS))

    def store(self, value: Value, buffer: Buffer, row: int = 0) -> None:
        """``[n, tokens]`` as n rows of ``buffer [N, rows]`` from `row` on."""
        assert value.shape is not None
        self.b.store(value, buffer, self.first + self.rows * row, (self.rows, 1), (value.shape[0], self.live))


def _sigmoid(b: TileBuilder, x: Value) -> Value:
    return 1.0 / (b.unary("exp", x * -1.0) + 1.0)


def _head_weights(
    streams: int, width: int, hc_eps: float, norm_eps: float, limits: DeviceLimits, rows: int | None
) -> TileProgram:
    parts = _parts(limits, streams * width, rows)
    b = TileBuilder(program_name("mhc_head_weights", streams, width, parts), "MHCHead")
    weights = _Weights(b, streams, (), parts, streams * width, norm_eps)
    pre = b.argument("pre", (streams, "rows"), "float32", Role.WRITE)
    weights.store(_sigmoid(b, weights.values) + hc_eps, pre)
    return b.finish([GridAxis(ROWS, _TOKENS)])


def _mixing(
    streams: int, width: int, iterations: int, hc_eps: float, norm_eps: float, limits: DeviceLimits, rows: int | None
) -> TileProgram:
    """``part_logits`` and ``squares`` to ``pre``, ``post [M, rows]`` and ``comb [M * M, rows]``."""
    m, parts = streams, _parts(limits, streams * width, rows)
    b = TileBuilder(program_name("mhc_mixing", streams, width, iterations, parts), "MHCPre")
    weights = _Weights(b, (2 + m) * m, (m, 2 * m), parts, m * width, norm_eps)
    pre = b.argument("pre", (m, "rows"), "float32", Role.WRITE)
    post = b.argument("post", (m, "rows"), "float32", Role.WRITE)
    comb = b.argument("comb", (m * m, "rows"), "float32", Role.WRITE)
    weights.store(_sigmoid(b, weights.rows_of(0, m)) + hc_eps, pre)
    weights.store(_sigmoid(b, weights.rows_of(m, m)) * 2.0, post)
    # A row of the matrix is [M, tokens]: rows are summed within, columns across, and no reduction is over a middle
    # axis, for which the 910B's library has no function.
    matrix = []
    for i in range(m):
        logits = weights.rows_of((2 + i) * m, m)
        powers = b.unary("exp", logits - _across(b, logits, "max"))
        matrix.append(powers / _across(b, powers) + hc_eps)
    with b.loop(iterations - 1, carried=_by_columns(matrix, hc_eps)) as step:
        by_rows = [row / (_across(b, row) + hc_eps) for row in step.carried]
        step.next = _by_columns(by_rows, hc_eps)
    for i, row in enumerate(step.results):
        weights.store(row, comb, i * m)
    return b.finish([GridAxis(ROWS, _TOKENS)])


def _across(b: TileBuilder, x: Value, kind: str = "add") -> Value:
    """``x [n, tokens]`` reduced over its first axis and spread along it again."""
    assert x.shape is not None
    return b.broadcast(b.reduce(x, 0, kind), x.shape, 0)


def _by_columns(matrix: list[Value], eps: float) -> list[Value]:
    """Every column of a matrix, given by rows, divided by its sum and `eps`."""
    total = matrix[0]
    for row in matrix[1:]:
        total = total + row
    total = total + eps
    return [row / total for row in matrix]


def _tiles(limits: DeviceLimits, width: int, live: float) -> tuple[int, int]:
    """Tokens and columns of a tile of streams."""
    columns = column_tile(limits, width, 8, live)
    return 8, columns


def _collapse(streams: int, width: int, limits: DeviceLimits, out: str, op: str) -> TileProgram:
    """``sum_i pre_i . stream_i``."""
    tile, columns = _tiles(limits, width, live=7)
    b = TileBuilder(program_name("mhc_collapse", streams, width, out, op), op)
    source = b.argument("streams", ("rows", streams, width), "float32")
    pre = b.argument("pre", (streams, "rows"), "float32")
    target = b.argument("collapsed", ("rows", width), out, Role.WRITE)
    first, live = tile_rows(b, tile)
    column, wide = tile_columns(b, width, columns)
    rows, shape = b.scalar("rows"), (tile, columns)
    total = b.fill(0.0, shape)
    for i in range(streams):
        weight = b.load(pre, first + rows * i, (tile,), valid=(live,))
        stream = b.load(source, (first * streams + i) * width + column, shape, (streams * width, 1), (live, wide))
        total = total + stream * b.broadcast(weight, shape, 1)
    b.store(b.cast(total, out), target, first * width + column, (width, 1), (live, wide))
    return b.finish([GridAxis(ROWS, tile), fixed(width, columns)])


def mhc_post(streams: int, width: int, limits: DeviceLimits, *, dtype: str = "float16") -> TileProgram:
    """MHCPost: ``x [rows, D]`` of `dtype` and ``streams`` to ``mixed [rows, M, D]`` float32.

    ``mixed_k = post_k . x + sum_j comb[j, k] . stream_j``, with ``post [M, rows]`` and ``comb [M * M, rows]``.
    """
    m = streams
    tile, columns = _tiles(limits, width, live=m + 7)
    b = TileBuilder(program_name("mhc_post", m, width, dtype), "MHCPost")
    x = b.argument("x", ("rows", width), dtype)
    source = b.argument("streams", ("rows", m, width), "float32")
    post = b.argument("post", (m, "rows"), "float32")
    comb = b.argument("comb", (m * m, "rows"), "float32")
    target = b.argument("mixed", ("rows", m, width), "float32", Role.WRITE)
    first, live = tile_rows(b, tile)
    column, wide = tile_columns(b, width, columns)
    rows, shape, valid = b.scalar("rows"), (tile, columns), (live, wide)
    value = b.cast(b.load(x, first * width + column, shape, (width, 1), valid), "float32")
    olds = [b.load(source, (first * m + j) * width + column, shape, (m * width, 1), valid) for j in range(m)]

    def times(tensor: Value, weights: Buffer, place: int) -> Value:
        weight = b.load(weights, first + rows * place, (tile,), valid=(live,))
        return tensor * b.broadcast(weight, shape, 1)

    for k in range(m):
        total = times(value, post, k)
        for j, old in enumerate(olds):
            total = total + times(old, comb, j * m + k)
        b.store(total, target, (first * m + k) * width + column, (m * width, 1), valid)
    return b.finish([GridAxis(ROWS, tile), fixed(width, columns)])
