"""Engram (arXiv 2601.07372): hashed addresses of n-grams, rows gathered from the table, gates and convolution.

The hash is exact: 64-bit products that wrap around, exclusive ors and remainders, on the scalar unit. Token ids and
addresses are int32; multipliers and primes int64, as the model has them. The convolution's weight lies transposed,
``[k, M * D]``, so that a tap's column is one piece.
"""

from __future__ import annotations

from ..emit import TileBuilder, Value
from ..program import DeviceLimits, GridAxis, Polynomial, Role, TileProgram
from ..tiles import column_tile, power_below
from .common import BATCH, CHUNK, ROWS, clamp, fixed, program_name, tile_columns
from .history import history_shape, ring_history, ring_write

_ALIGNED = 32
"""Bytes at whose multiples a copy within the unified buffer may begin."""


def engram_hash(longest: int, addresses: int, pad_id: int, limits: DeviceLimits) -> tuple[TileProgram, ...]:
    """The programs of EngramHash: ``addresses [B, S, T]`` int32, then ``history [B, G - 1]`` int32.

    Args:
        longest: G.
        addresses: T, a multiple of G - 1.
        pad_id: token id that stands before the text.
        limits: of the device.
    """
    return _hash(longest, addresses, pad_id), _remember(longest)


def _hash(longest: int, addresses: int, pad_id: int) -> TileProgram:
    size, heads = longest - 1, addresses // (longest - 1)
    b = TileBuilder(program_name("engram_hash", longest, addresses, pad_id), "EngramHash")
    ids = b.argument("input_ids", ("batch", "chunk"), "int32")
    lookup = b.argument("lookup", ("vocabulary",), "int32")
    multipliers = b.argument("multipliers", (longest,), "int64")
    primes, offsets = (b.argument(n, (addresses,), "int64") for n in ("primes", "offsets"))
    history = b.argument("history", ("batch", size), "int32")
    positions = b.argument("positions", ("batch",), "int32")
    out = b.argument("addresses", ("batch", "chunk", addresses), "int32", Role.WRITE)
    b.scalar("batch")
    chunk, row, token = b.scalar("chunk"), b.program_id(0), b.program_id(1)
    b.scalar("vocabulary")
    position = b.read(positions, row) + token
    pad = b.read(lookup, pad_id)
    found = b.local((addresses,), "int32")
    mixed: Value | None = None
    for back in range(longest):
        identity = b.read(lookup, b.read(ids, row * chunk + b.maximum(token - back, 0)))
        if back:
            # Further back than this chunk: the ring; further than the text: the pad.
            ring = b.read(history, row * size + b.maximum(position - back, 0) % size)
            identity = b.select(b.compare("ge", token, back), identity, ring)
            identity = b.select(b.compare("ge", position, back), identity, pad)
        term = b.cast(identity, "int64") * b.read(multipliers, back)
        mixed = term if mixed is None else b.binary("xor", mixed, term)
        for head in range(heads if back else 0):
            place = (back - 1) * heads + head
            prime = b.read(primes, place)
            # The remainder has the sign of the dividend; the address is never negative.
            address = (mixed % prime + prime) % prime + b.read(offsets, place)
            b.write(b.cast(address, "int32"), found, place)
    b.store(b.tensor(found), out, (row * chunk + token) * addresses)
    return b.finish([GridAxis(BATCH), GridAxis(CHUNK)])


def _remember(longest: int) -> TileProgram:
    """The last G - 1 live compressed ids into the ring."""
    size = longest - 1
    b = TileBuilder(program_name("engram_history", longest), "EngramHash")
    ids = b.argument("input_ids", ("batch", "chunk"), "int32")
    lookup = b.argument("lookup", ("vocabulary",), "int32")
    positions, lengths = (b.argument(n, ("batch",), "int32") for n in ("positions", "lengths"))
    history = b.argument("history", ("batch", size), "int32", Role.UPDATE)
    b.scalar("batch")
    chunk, row = b.scalar("chunk"), b.program_id(0)
    b.scalar("vocabulary")
    position, length = b.read(positions, row), b.read(lengths, row)
    for back in range(1, size + 1):
        token = b.maximum(length - back, 0)
        found = clamp(b, length - (back - 1), 0, 1)
        identity = b.read(lookup, b.read(ids, row * chunk + token))
        number = b.fill(b.cast(identity, "int32"), (1,))
        b.store(number, history, row * size + (position + token) % size, valid=(found,))
    return b.finish([GridAxis(BATCH)])


def engram_lookup(width: int, addresses: int, limits: DeviceLimits, *, dtype: str = "float16") -> TileProgram:
    """``table [R, e]`` at ``addresses [rows, T]`` int32 to ``embedding [rows, T * e]``, all of `dtype`."""
    size = {"float32": 4}.get(dtype, 2)
    wide = -(-width * size // _ALIGNED) * _ALIGNED // size
    tile = power_below(limits.unified_buffer / 4 / (wide * size), 64)
    b = TileBuilder(program_name("engram_lookup", width, addresses, dtype), "EngramLookup")
    table = b.argument("table", ("table_rows", width), dtype)
    places = b.argument("addresses", ("rows", addresses), "int32")
    out = b.argument("embedding", ("rows", addresses * width), dtype, Role.WRITE)
    b.scalar("table_rows")
    total = b.scalar("rows") * addresses
    first = b.program_id(0) * tile
    live = b.minimum(total - first, tile)
    block = b.local((tile, wide), dtype)
    with b.loop(live, trips=Polynomial.of(tile), gathers=True) as step:
        start = b.read(places, first + step.index) * width
        b.copy_in(block, [step.index, 0], table, start, (1, width), (width, 1))
    b.store(b.tensor(block), out, first * width, (width, 1), (live, width))
    return b.finish([GridAxis(ROWS * Polynomial.of(addresses), tile)])


def engram_gate_conv(
    streams: int, width: int, taps: int, dilation: int, eps: float, limits: DeviceLimits, *, dtype: str = "float16"
) -> tuple[TileProgram, ...]:
    """The programs of EngramGateConv: ``mixed [B, S, M, D]`` float32 from ``streams``, and the ring.

    Args:
        streams, width: M and D.
        taps: k.
        dilation: tokens between taps.
        eps: of the norms.
        limits: of the device.
        dtype: of ``keys`` and ``value``; streams, norms and ring are float32.
    """
    size, columns, op = (taps - 1) * dilation, streams * width, "EngramGateConv"
    ring, history = "conv_state", "history_conv"
    return (
        _gate(streams, width, eps, limits, dtype),
        *ring_history(
            size, columns, limits, op=op, ring=ring, new="conv_rows", history=history, ring_dtype="float32",
            new_dtype="float32",
        ),
        _convolve(streams, width, taps, dilation, limits),
        ring_write(size, columns, limits, op=op, ring=ring, history=history, dtype="float32"),
    )  # fmt: skip


def _gate(streams: int, width: int, eps: float, limits: DeviceLimits, dtype: str) -> TileProgram:
    """``gated`` and ``conv_rows [rows, M, D]`` float32: the value gated by each stream, and its norm."""
    tile = 8
    columns = column_tile(limits, width, tile, live=9)
    b = TileBuilder(program_name("engram_gate", streams, width, dtype), "EngramGateConv")
    keys = b.argument("keys", ("batch", "chunk", streams, width), dtype)
    value = b.argument("value", ("batch", "chunk", width), dtype)
    source = b.argument("streams", ("batch", "chunk", streams, width), "float32")
    norms = [b.argument(n, (streams, width), "float32") for n in ("key_norm", "stream_norm", "conv_norm")]
    outputs = [
        b.argument("gated", ("batch", "chunk", streams, width), "float32", Role.WRITE),
        b.argument("conv_rows", ("batch", "chunk", streams * width), "float32", Role.WRITE),
    ]
    rows = b.scalar("batch") * b.scalar("chunk")
    first, stream = b.program_id(0) * tile, b.program_id(1)
    live, shape, stride = b.minimum(rows - first, tile), (tile, columns), streams * width

    def tile_of(column: Value) -> tuple[Value, tuple[object, object]]:
        wide = columns if width % columns == 0 else b.minimum(width - column, columns)
        return (first * streams + stream) * width + column, (live, wide)

    nothing = b.fill(0.0, (tile,))
    with b.loop(width, columns, carried=[nothing] * 4) as step:
        at, valid = tile_of(step.index)
        key = b.cast(b.load(keys, at, shape, (stride, 1), valid, 0.0), "float32")
        old = b.load(source, at, shape, (stride, 1), valid, 0.0)
        new = b.cast(b.load(value, first * width + step.index, shape, (width, 1), valid, 0.0), "float32")
        weights = [b.load(n, stream * width + step.index, (columns,), valid=(valid[1],), fill=0.0) for n in norms[:2]]
        weighted = key * old * b.broadcast(weights[0] * weights[1], shape, 0)
        terms = (key * key, old * old, weighted, new * new)
        step.next = [total + b.reduce(term, 1) for total, term in zip(step.carried, terms, strict=True)]
    key_squares, old_squares, dot, new_squares = step.results
    roots = b.unary("rsqrt", key_squares * (1 / width) + eps) * b.unary("rsqrt", old_squares * (1 / width) + eps)
    dot = dot * roots * (1 / width**0.5)
    size = b.unary("sqrt", b.maximum(b.unary("absf", dot), 1e-6))
    signed = b.select(b.compare("lt", dot, 0.0), size * -1.0, b.select(b.compare("gt", dot, 0.0), size, 0.0))
    gate = 1.0 / (b.unary("exp", signed * -1.0) + 1.0)
    root = b.unary("rsqrt", gate * gate * new_squares * (1 / width) + eps)
    with b.loop(width, columns) as step:
        at, valid = tile_of(step.index)
        new = b.cast(b.load(value, first * width + step.index, shape, (width, 1), valid), "float32")
        norm = b.load(norms[2], stream * width + step.index, (columns,), valid=(valid[1],))
        gated = new * b.broadcast(gate, shape, 1)
        b.store(gated, outputs[0], at, (stride, 1), valid)
        normed = gated * b.broadcast(root, shape, 1) * b.broadcast(norm, shape, 0)
        b.store(normed, outputs[1], at, (stride, 1), valid)
    return b.finish([GridAxis(BATCH * CHUNK, tile), fixed(streams)])


def _convolve(streams: int, width: int, taps: int, dilation: int, limits: DeviceLimits) -> TileProgram:
    """``mixed = streams + gated + silu(conv)``, the convolution over ``history_conv`` by ``conv_weight [k, M * D]``."""
    tile, wide, size = 8, streams * width, (taps - 1) * dilation
    columns = column_tile(limits, wide, tile, live=7)
    b = TileBuilder(program_name("engram_conv", streams, width, taps, dilation), "EngramGateConv")
    history = b.argument("history_conv", history_shape(size, wide), "float32")
    weight = b.argument("conv_weight", (taps, wide), "float32")
    source, gated = (b.argument(n, ("batch", "chunk", streams, width), "float32") for n in ("streams", "gated"))
    out = b.argument("mixed", ("batch", "chunk", streams, width), "float32", Role.WRITE)
    b.scalar("batch")
    chunk, row = b.scalar("chunk"), b.program_id(0)
    first = b.program_id(1) * tile
    column, many = tile_columns(b, wide, columns, axis=2)
    shape, valid = (tile, columns), (b.minimum(chunk - first, tile), many)
    total = b.fill(0.0, shape)
    for tap in range(taps):
        start = (row * (chunk + size) + first + tap * dilation) * wide + column
        factor = b.load(weight, b.binary("add", column, tap * wide), (columns,), valid=(many,))
        total = total + b.load(history, start, shape, (wide, 1), valid) * b.broadcast(factor, shape, 0)
    at = (row * chunk + first) * wide + column
    silu = total / (b.unary("exp", total * -1.0) + 1.0)
    mixed = b.load(source, at, shape, (wide, 1), valid) + b.load(gated, at, shape, (wide, 1), valid) + silu
    b.store(mixed, out, at, (wide, 1), valid)
    return b.finish([GridAxis(BATCH), GridAxis(CHUNK, tile), fixed(wide, columns)])
