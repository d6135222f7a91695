"""Routing of tokens to experts (V4 paper, section 2.1): the K best of few by comparison, or by a table.

Sorting with indices is not to be had on every device, and E is a few hundred: an expert's rank is the number of experts
that beat it, counted by comparing all with all. Equal scores go to the smaller index, as the op demands.
"""

from __future__ import annotations

import math

from ..emit import TileBuilder, Value
from ..program import DeviceLimits, GridAxis, Role, TileProgram
from ..tiles import power_below
from .common import ROWS, program_name

_EXPERTS = 64
"""Experts that a hash route looks through at once."""


def _scores(b: TileBuilder, logits: Value) -> Value:
    """``sqrt(softplus(logit))``, where softplus cannot overflow."""
    tail = b.unary("log", b.unary("exp", b.unary("absf", logits) * -1.0) + 1.0)
    return b.unary("sqrt", b.maximum(logits, 0.0) + tail)


def topk_route(experts: int, top_k: int, scaling: float, limits: DeviceLimits) -> TileProgram:
    """``logits [rows, E]``, ``bias [E]`` float32 to ``weights [rows, K]`` float32 and ``indices [rows, K]`` int32."""
    tile = power_below(limits.unified_buffer * 0.8 / (experts * 4 * 8), experts)
    while experts % tile:
        tile //= 2
    b = TileBuilder(program_name("topk_route", experts, top_k), "TopKRoute")
    logits = b.argument("logits", ("rows", experts), "float32")
    bias = b.argument("bias", (experts,), "float32")
    weights = b.argument("weights", ("rows", top_k), "float32", Role.WRITE)
    indices = b.argument("indices", ("rows", top_k), "int32", Role.WRITE)
    b.scalar("rows")
    row = b.program_id(0)
    start = row * experts
    every = _scores(b, b.load(logits, start, (experts,))) + b.load(bias, 0, (experts,))
    against, chosen = (tile, experts), (top_k, tile)
    rivals = b.broadcast(every, against, 0)
    number = b.broadcast(b.iota(experts, "float32"), against, 0)
    nothing = b.fill(0.0, (top_k,))
    with b.loop(experts, tile, carried=[nothing, nothing]) as step:
        own = _scores(b, b.load(logits, start + step.index, (tile,)))
        mine = b.broadcast(own + b.load(bias, step.index, (tile,)), against, 1)
        place = b.iota(tile, "float32") + b.cast(b.cast(step.index, "int32"), "float32")
        before = b.select(b.compare("lt", number, b.broadcast(place, against, 1)), 1.0, b.fill(0.0, against))
        ahead = b.select(b.compare("gt", rivals, mine), 1.0, b.fill(0.0, against))
        ahead = b.select(b.compare("eq", rivals, mine), before, ahead)
        rank = b.broadcast(b.reduce(ahead, 1), chosen, 0)
        wanted = b.compare("eq", rank, b.broadcast(b.iota(top_k, "float32"), chosen, 1))
        zero = b.fill(0.0, chosen)
        found = [b.reduce(b.select(wanted, b.broadcast(v, chosen, 0), zero), 1) for v in (own, place)]
        step.next = [step.carried[0] + found[0], step.carried[1] + found[1]]
    best, place = step.results
    b.store(_normalised(b, best, scaling), weights, row * top_k)
    b.store(b.cast(place, "int32"), indices, row * top_k)
    return b.finish([GridAxis(ROWS)])


def hash_route(experts: int, top_k: int, scaling: float, limits: DeviceLimits) -> TileProgram:
    """``logits [rows, E]``, ``input_ids [rows]``, ``table [V, K]`` int32 to ``weights`` and ``indices [rows, K]``."""
    b = TileBuilder(program_name("hash_route", experts, top_k), "HashRoute")
    logits = b.argument("logits", ("rows", experts), "float32")
    ids = b.argument("input_ids", ("rows",), "int32")
    table = b.argument("table", ("vocabulary", top_k), "int32")
    weights = b.argument("weights", ("rows", top_k), "float32", Role.WRITE)
    indices = b.argument("indices", ("rows", top_k), "int32", Role.WRITE)
    b.scalar("rows")
    b.scalar("vocabulary")
    row = b.program_id(0)
    # By few experts at once: for the 950, bishengir 1.2.0 sums rows of 256 that a mask was chosen for to wrong numbers.
    tile = math.gcd(experts, _EXPERTS)
    shape = (top_k, tile)
    chosen = b.load(table, b.read(ids, row) * top_k, (top_k,))
    wanted = b.broadcast(chosen, shape, 1)
    with b.loop(experts, tile, carried=[b.fill(0.0, (top_k,))]) as step:
        own = b.load(logits, row * experts + step.index, (tile,))
        scores = b.broadcast(_scores(b, own), shape, 0)
        place = b.iota(tile) + b.cast(step.index, "int32")
        same = b.compare("eq", b.broadcast(place, shape, 0), wanted)
        step.next = [step.carried[0] + b.reduce(b.select(same, scores, b.fill(0.0, shape)), 1)]
    (found,) = step.results
    b.store(_normalised(b, found, scaling), weights, row * top_k)
    b.store(chosen, indices, row * top_k)
    return b.finish([GridAxis(ROWS)])


def _normalised(b: TileBuilder, chosen: Value, scaling: float) -> Value:
    """``chosen / (sum + 1e-20) . scaling``."""
    assert chosen.shape is not None
    row = b.reshape(chosen, (1, *chosen.shape))
    total = b.broadcast(b.reduce(row, 1) + 1e-20, (1, *chosen.shape), 1)
    return b.reshape(row / total * scaling, chosen.shape)
