"""The steps that the expert kernels are made of: sorting tokens by expert, and the tasks of the two products.

Every use of an expert by a token has a place, and an expert's places are neighbours. Both products are cut by panels of
outputs; a task is one panel of one expert over all of its places. The shared expert is one more, used by every token.
"""

# mypy: ignore-errors
# (TVMScript: the macros below are parsed by TVM, not run by Python.)

from __future__ import annotations

from tvm.script import tirx as T

from .common import VECTOR, clamped_swiglu
from .packing import PANEL, panels
from .panel_product import VECTORS, row_blocks


@T.macro
def sort_by_expert(indices, weights, count, first, starts, active, tokens, scales, experts, top_k):
    """Counting sort of the uses of the routed experts, which get the places from `first` on.

    Args:
        indices: ``[count, top_k]`` int64; a choice outside of [0, experts) gets no place.
        weights: ``[count, top_k]`` float32.
        starts: ``[experts + 1]`` int64, written: ``starts[e]`` to ``starts[e + 1]`` are expert e's places.
        active: ``[experts + 1]`` int64, written: the experts that have any, in order; at its end their number.
        tokens, scales: ``[first + count * top_k]`` int64 and float32, written: token and weight of each place, in the
            order of the tokens within an expert.
        experts, top_k: static.
    """
    for e in range(T.int64(experts + 1)):
        starts[e] = T.int64(0)
    for token in range(count):
        for choice in range(T.int64(top_k)):
            if indices[token, choice] >= T.int64(0) and indices[token, choice] < T.int64(experts):
                starts[indices[token, choice]] = starts[indices[token, choice]] + T.int64(1)
    active[experts] = T.int64(0)
    for e in range(T.int64(experts)):
        if starts[e] > T.int64(0):
            active[active[experts]] = e
            active[experts] = active[experts] + T.int64(1)
    # From counts to ends; placing the uses from last to first turns the ends into starts and keeps their order.
    starts[0] = starts[0] + first
    for e in range(T.int64(experts)):
        starts[e + 1] = starts[e] + starts[e + 1]
    for back in range(count * top_k):
        token: T.int64 = (count * top_k - 1 - back) // top_k
        choice: T.int64 = (count * top_k - 1 - back) % top_k
        expert: T.int64 = indices[token, choice]
        if expert >= T.int64(0) and expert < T.int64(experts):
            starts[expert] = starts[expert] - T.int64(1)
            tokens[starts[expert]] = token
            scales[starts[expert]] = weights[token, choice]


@T.macro
def place_shared(count, tokens, scales):
    """The first `count` places are the shared expert's: every token in order, with weight 1."""
    for token in range(count):
        tokens[token] = token
        scales[token] = T.float32(1)


@T.macro
def gathered_product(sums, x, tokens, place, weight, at, stored, height, cold):
    """The product of panel `at` with the rows of `x` that `height` places from `place` stand for."""
    token = T.alloc_buffer((height,), "int64")
    for r in T.unroll(height):
        token[r] = tokens[place + r]
    stored.multiply(sums, x, token, weight, at, T.int64(0), T.int64(stored.steps), height, cold)


@T.macro
def hidden_panel(x, gate_up, at, tokens, hidden, panel, first, count, stored, limit):
    """Panel `panel` of the hidden rows of `count` places from `first`: ``swiglu(x @ gate.T, x @ up.T)``.

    Args:
        x: ``[tokens, d]`` float32, or such rows quantised.
        gate_up: packed panels; panel `at` holds the gate rows, the next the up rows.
        tokens: the token of each place.
        hidden: ``[places, width]`` float32, written; its width is a multiple of PANEL.
        stored, limit: static; the format of `gate_up`.
    """

    @T.inline
    def gate_block(place, height):
        gate = T.alloc_buffer((height * VECTORS, VECTOR), "float32")
        gathered_product(gate, x, tokens, place, gate_up, at, stored, height, place == first)
        for a in T.unroll(height * VECTORS):
            for v in T.vectorized(VECTOR):
                hidden[place + a // VECTORS, panel * PANEL + a % VECTORS * VECTOR + v] = gate[a, v]

    @T.inline
    def up_block(place, height):
        up = T.alloc_buffer((height * VECTORS, VECTOR), "float32")
        gathered_product(up, x, tokens, place, gate_up, at + 1, stored, height, place == first)
        for a in T.unroll(height * VECTORS):
            for v in T.vectorized(VECTOR):
                hidden[place + a // VECTORS, panel * PANEL + a % VECTORS * VECTOR + v] = clamped_swiglu(
                    hidden[place + a // VECTORS, panel * PANEL + a % VECTORS * VECTOR + v], up[a, v], limit
                )

    # One after the other for all places: the cache has to hold one panel, and the registers one product.
    row_blocks(gate_block, first, count, stored.row_block)
    row_blocks(up_block, first, count, stored.row_block)


@T.macro
def output_panel(hidden, down, at, tokens, scales, y, panel, first, count, d, stored):
    """Add panel `panel` of the outputs of `count` places from `first` to `y`: ``scale * (hidden @ down.T)``.

    Args:
        hidden: ``[places, width]`` float32, of which the first columns count, or such rows quantised.
        down: packed panels, of which panel `at` counts.
        tokens, scales: the token and the weight of each place.
        y: ``[tokens, d]`` float32, added to.
        d, stored: static; the format of `down`.
    """

    @T.inline
    def block(place, height):
        sums = T.alloc_buffer((height * VECTORS, VECTOR), "float32")
        row = T.alloc_buffer((height,), "int64")
        line = T.alloc_buffer((PANEL,), "float32")
        for r in T.unroll(height):
            row[r] = place + r
        stored.multiply(sums, hidden, row, down, at, T.int64(0), T.int64(stored.steps), height, place == first)
        for r in T.unroll(height):
            token: T.int64 = tokens[place + r]
            scale: T.float32 = scales[place + r]
            if panel < d // PANEL:
                for c in T.unroll(VECTORS):
                    for v in T.vectorized(VECTOR):
                        y[token, panel * PANEL + c * VECTOR + v] = (
                            y[token, panel * PANEL + c * VECTOR + v] + scale * sums[r * VECTORS + c, v]
                        )
            else:
                # A loop of scalars over `sums` itself would push the accumulators out of registers for every panel.
                for c in T.unroll(VECTORS):
                    for v in T.vectorized(VECTOR):
                        line[c * VECTOR + v] = scale * sums[r * VECTORS + c, v]
                for c in range(d % PANEL):
                    y[token, panel * PANEL + c] = y[token, panel * PANEL + c] + line[c]

    row_blocks(block, first, count, stored.row_block)


@T.macro
def routed_hidden(x, gate_up, active, starts, tokens, hidden, panel, experts, f, stored, limit):
    """Panel `panel` of the hidden rows of every expert in use; `gate_up` holds the panels of all experts."""
    for a in range(active[experts]):
        expert: T.int64 = active[a]
        first: T.int64 = starts[expert]
        count: T.int64 = starts[expert + 1] - first
        at: T.int64 = (expert * panels(f) + panel) * 2
        hidden_panel(x, gate_up, at, tokens, hidden, panel, first, count, stored, limit)


@T.macro
def routed_output(hidden, down, active, starts, tokens, scales, y, panel, experts, d, stored):
    """Add panel `panel` of the outputs of every expert in use; `down` holds the panels of all experts."""
    for a in range(active[experts]):
        expert: T.int64 = active[a]
        first: T.int64 = starts[expert]
        count: T.int64 = starts[expert + 1] - first
        at: T.int64 = expert * panels(d) + panel
        output_panel(hidden, down, at, tokens, scales, y, panel, first, count, d, stored)


@T.macro
def clear_panel(y, count, panel, d):
    """Zero the outputs of panel `panel` in `count` rows of `y`."""
    for token in range(count):
        for c in range(T.min(T.int64(PANEL), d - panel * PANEL)):
            y[token, panel * PANEL + c] = T.float32(0)
