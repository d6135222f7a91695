"""Routed experts over packed weights: tokens are sorted by expert, and only experts that some token chose are read.

Both products are cut by panels of outputs, so a panel of an expert is read once for all of its tokens, and an output
panel belongs to one thread, which adds up the experts in their order: the result does not depend on the threads.
"""

# mypy: ignore-errors
# ruff: noqa: B023
# (TVMScript: the functions below are parsed by TVM, not run by Python.)

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from .common import VECTOR, clamped_swiglu
from .packing import PANEL, panels
from .panel_product import VECTORS, panel_product, row_blocks, sums_per_output


def grouped_experts(
    experts: int, d: int, f: int, top_k: int, limit: float, weight_dtype: str = "float32"
) -> tvm.tirx.PrimFunc:
    """``y = sum_k weights_k * down(silu(min(gate, limit)) * clip(up, -limit, limit))`` (V4 paper, section 2.1).

    Args:
        experts: E, number of experts.
        d: hidden size.
        f: width of an expert.
        top_k: experts per token.
        limit: the model's ``swiglu_limit``.
        weight_dtype: ``float32`` or ``bfloat16`` (widened in registers; sums are float32).

    Returns:
        PrimFunc of x ``[B, S, d]`` float32, weights ``[B, S, top_k]`` float32, indices ``[B, S, top_k]`` int64 (one
        outside [0, E) stands for no expert), gate_up ``[E, 2 ceil(f / PANEL), d, PANEL]`` from `pack_gate_up`, down
        ``[E, ceil(d / PANEL), f, PANEL]`` from `pack_rows`, y ``[B, S, d]`` float32.
    """
    f_panels = panels(f)
    d_panels = panels(d)
    d_tail = d % PANEL

    @T.macro
    def sort_slots(indices, tokens, starts, active, slots):
        """Counting sort of the slots (token, choice) by expert.

        ``starts[e]`` to ``starts[e + 1]`` are expert e's places in `slots`; `active` lists the experts that have any,
        their number at the end.
        """
        for e in range(T.int64(experts + 1)):
            starts[e] = T.int64(0)
        for token in range(tokens):
            for choice in range(T.int64(top_k)):
                if indices[token, choice] >= T.int64(0) and indices[token, choice] < T.int64(experts):
                    starts[indices[token, choice]] = starts[indices[token, choice]] + T.int64(1)
        active[experts] = T.int64(0)
        for e in range(T.int64(experts)):
            if starts[e] > T.int64(0):
                active[active[experts]] = e
                active[experts] = active[experts] + T.int64(1)
        # From counts to ends; placing the slots from last to first turns the ends into starts and keeps their order.
        for e in range(T.int64(experts)):
            starts[e + 1] = starts[e] + starts[e + 1]
        for back in range(tokens * top_k):
            slot: T.int64 = tokens * top_k - 1 - back
            expert: T.int64 = indices[slot // top_k, slot % top_k]
            if expert >= T.int64(0) and expert < T.int64(experts):
                starts[expert] = starts[expert] - T.int64(1)
                slots[starts[expert]] = slot

    @T.macro
    def hidden_block(x, gate_up, slots, hidden, expert, panel, place, height):
        gate = T.alloc_buffer((height * sums_per_output(height, d) * VECTORS, VECTOR), "float32", scope="local")
        up = T.alloc_buffer((height * sums_per_output(height, d) * VECTORS, VECTOR), "float32", scope="local")
        token = T.alloc_buffer((height,), "int64", scope="local")
        for r in T.unroll(height):
            token[r] = slots[place + r] // top_k
        first: T.int64 = expert * (2 * f_panels) + 2 * panel
        panel_product(gate, x, token, gate_up, first, T.int64(0), T.int64(d), height, sums_per_output(height, d))
        panel_product(up, x, token, gate_up, first + 1, T.int64(0), T.int64(d), height, sums_per_output(height, d))
        for a in T.unroll(height * VECTORS):
            for v in T.vectorized(VECTOR):
                hidden[place + a // VECTORS, panel * PANEL + a % VECTORS * VECTOR + v] = clamped_swiglu(
                    gate[a, v], up[a, v], limit
                )

    @T.macro
    def output_block(hidden, down, slots, weights, y, expert, panel, place, height):
        sums = T.alloc_buffer((height * sums_per_output(height, f) * VECTORS, VECTOR), "float32", scope="local")
        at = T.alloc_buffer((height,), "int64", scope="local")
        line = T.alloc_buffer((PANEL,), "float32", scope="local")
        for r in T.unroll(height):
            at[r] = place + r
        panel_product(
            sums,
            hidden,
            at,
            down,
            expert * d_panels + panel,
            T.int64(0),
            T.int64(f),
            height,
            sums_per_output(height, f),
        )
        for r in T.unroll(height):
            token: T.int64 = slots[place + r] // top_k
            weight: T.float32 = weights[token, slots[place + r] % top_k]
            if panel < d // PANEL:
                for c in T.unroll(VECTORS):
                    for v in T.vectorized(VECTOR):
                        y[token, panel * PANEL + c * VECTOR + v] = (
                            y[token, panel * PANEL + c * VECTOR + v] + weight * sums[r * VECTORS + c, v]
                        )
            else:
                for c in T.unroll(VECTORS):
                    for v in T.vectorized(VECTOR):
                        line[c * VECTOR + v] = weight * sums[r * VECTORS + c, v]
                for c in range(d_tail):
                    y[token, panel * PANEL + c] = y[token, panel * PANEL + c] + line[c]

    @T.prim_func(private=True, s_tir=True)
    def grouped_experts(
        x_: T.handle, weights_: T.handle, indices_: T.handle, gate_up_: T.handle, down_: T.handle, y_: T.handle
    ):
        T.func_attr({"tirx.noalias": True})
        b = T.int64()
        s = T.int64()
        x_bsd = T.match_buffer(x_, (b, s, T.int64(d)), "float32")
        weights_bsk = T.match_buffer(weights_, (b, s, T.int64(top_k)), "float32")
        indices_bsk = T.match_buffer(indices_, (b, s, T.int64(top_k)), "int64")
        gate_up_e = T.match_buffer(
            gate_up_, (T.int64(experts), T.int64(2 * f_panels), T.int64(d), T.int64(PANEL)), weight_dtype
        )
        down_e = T.match_buffer(down_, (T.int64(experts), T.int64(d_panels), T.int64(f), T.int64(PANEL)), weight_dtype)
        y_bsd = T.match_buffer(y_, (b, s, T.int64(d)), "float32")
        x = x_bsd.view(b * s, T.int64(d))
        weights = weights_bsk.view(b * s, T.int64(top_k))
        indices = indices_bsk.view(b * s, T.int64(top_k))
        gate_up = gate_up_e.view(T.int64(experts * 2 * f_panels), T.int64(d), T.int64(PANEL))
        down = down_e.view(T.int64(experts * d_panels), T.int64(f), T.int64(PANEL))
        y = y_bsd.view(b * s, T.int64(d))

        starts = T.alloc_buffer((T.int64(experts + 1),), "int64")
        active = T.alloc_buffer((T.int64(experts + 1),), "int64")
        slots = T.alloc_buffer((b * s * top_k,), "int64")
        hidden = T.alloc_buffer((b * s * top_k, T.int64(f_panels * PANEL)), "float32")
        sort_slots(indices, b * s, starts, active, slots)

        for panel in T.parallel(T.int64(f_panels)):
            for a in range(active[experts]):
                expert: T.int64 = active[a]

                @T.inline
                def hidden_rows(place, height):
                    hidden_block(x, gate_up, slots, hidden, expert, panel, place, height)

                row_blocks(hidden_rows, starts[expert], starts[expert + 1] - starts[expert])

        for panel in T.parallel(T.int64(d_panels)):
            for token in range(b * s):
                for c in range(T.min(T.int64(PANEL), d - panel * PANEL)):
                    y[token, panel * PANEL + c] = T.float32(0)
            for a in range(active[experts]):
                expert: T.int64 = active[a]

                @T.inline
                def output_rows(place, height):
                    output_block(hidden, down, slots, weights, y, expert, panel, place, height)

                row_blocks(output_rows, starts[expert], starts[expert + 1] - starts[expert])

    return grouped_experts
