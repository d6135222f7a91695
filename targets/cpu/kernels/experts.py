"""Experts over packed weights: tokens are sorted by expert, and only experts that some token chose are read.

Both products are cut by panels of outputs, so a panel of an expert is read once for all of its tokens, and an output
panel belongs to one thread, which adds up the experts in their order: the result does not depend on the threads.
"""

# mypy: ignore-errors
# (TVMScript: the functions below are parsed by TVM, not run by Python.)

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from .expert_steps import (
    clear_panel,
    hidden_panel,
    output_panel,
    place_shared,
    routed_hidden,
    routed_output,
    sort_by_expert,
)
from .packing import PANEL, panels


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
        tokens = T.alloc_buffer((b * s * top_k,), "int64")
        scales = T.alloc_buffer((b * s * top_k,), "float32")
        hidden = T.alloc_buffer((b * s * top_k, T.int64(f_panels * PANEL)), "float32")
        sort_by_expert(indices, weights, b * s, T.int64(0), starts, active, tokens, scales, experts, top_k)

        for panel in T.parallel(T.int64(f_panels)):
            routed_hidden(x, gate_up, active, starts, tokens, hidden, panel, experts, d, f, limit)
        for panel in T.parallel(T.int64(d_panels)):
            clear_panel(y, b * s, panel, d)
            routed_output(hidden, down, active, starts, tokens, scales, y, panel, experts, d, f)

    return grouped_experts


def mixture_of_experts(
    experts: int, d: int, f: int, top_k: int, limit: float, weight_dtype: str, shared_f: int
) -> tvm.tirx.PrimFunc:
    """`grouped_experts` plus a shared expert of the same kind that every token passes through (V4 paper, section 2.1).

    Args:
        experts, d, f, top_k, limit, weight_dtype: as for `grouped_experts`.
        shared_f: G, width of the shared expert.

    Returns:
        PrimFunc of x, weights, indices, gate_up and down as in `grouped_experts`, shared_gate_up
        ``[2 ceil(G / PANEL), d, PANEL]`` from `pack_gate_up`, shared_down ``[ceil(d / PANEL), G, PANEL]`` from
        `pack_rows`, y ``[B, S, d]`` float32.
    """
    f_panels = panels(f)
    g_panels = panels(shared_f)
    tasks = max(f_panels, g_panels)
    d_panels = panels(d)

    @T.prim_func(private=True, s_tir=True)
    def mixture_of_experts(
        x_: T.handle,
        weights_: T.handle,
        indices_: T.handle,
        gate_up_: T.handle,
        down_: T.handle,
        shared_gate_up_: T.handle,
        shared_down_: T.handle,
        y_: T.handle,
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
        shared_gate_up = T.match_buffer(
            shared_gate_up_, (T.int64(2 * g_panels), T.int64(d), T.int64(PANEL)), weight_dtype
        )
        shared_down = T.match_buffer(shared_down_, (T.int64(d_panels), T.int64(shared_f), T.int64(PANEL)), weight_dtype)
        y_bsd = T.match_buffer(y_, (b, s, T.int64(d)), "float32")
        x = x_bsd.view(b * s, T.int64(d))
        weights = weights_bsk.view(b * s, T.int64(top_k))
        indices = indices_bsk.view(b * s, T.int64(top_k))
        gate_up = gate_up_e.view(T.int64(experts * 2 * f_panels), T.int64(d), T.int64(PANEL))
        down = down_e.view(T.int64(experts * d_panels), T.int64(f), T.int64(PANEL))
        y = y_bsd.view(b * s, T.int64(d))

        starts = T.alloc_buffer((T.int64(experts + 1),), "int64")
        active = T.alloc_buffer((T.int64(experts + 1),), "int64")
        tokens = T.alloc_buffer((b * s * (top_k + 1),), "int64")
        scales = T.alloc_buffer((b * s * (top_k + 1),), "float32")
        hidden = T.alloc_buffer((b * s * (top_k + 1), T.int64(max(f_panels, g_panels) * PANEL)), "float32")
        place_shared(b * s, tokens, scales)
        sort_by_expert(indices, weights, b * s, b * s, starts, active, tokens, scales, experts, top_k)

        # The panels of both are spread over the tasks evenly: a thread's share of tasks is its share of the work.
        for task in T.parallel(T.int64(tasks)):
            first: T.int64 = task * g_panels // tasks
            for more in range((task + 1) * g_panels // tasks - first):
                shared: T.int64 = first + more
                hidden_panel(x, shared_gate_up, shared * 2, tokens, hidden, shared, T.int64(0), b * s, d, limit)
            routed_first: T.int64 = task * f_panels // tasks
            for more in range((task + 1) * f_panels // tasks - routed_first):
                panel: T.int64 = routed_first + more
                routed_hidden(x, gate_up, active, starts, tokens, hidden, panel, experts, d, f, limit)
        for panel in T.parallel(T.int64(d_panels)):
            clear_panel(y, b * s, panel, d)
            output_panel(hidden, shared_down, panel, tokens, scales, y, panel, T.int64(0), b * s, d, shared_f)
            routed_output(hidden, down, active, starts, tokens, scales, y, panel, experts, d, f)

    return mixture_of_experts
