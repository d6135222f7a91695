"""Experts over packed weights: tokens are sorted by expert, and only experts that some token chose are read.

Both products are cut by panels of outputs, so a panel of an expert is read once for all of its tokens, and an output
panel belongs to one thread, which adds up the experts in their order: the result does not depend on the threads.
"""

# mypy: ignore-errors
# (TVMScript: the functions below are parsed by TVM, not run by Python.)

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from ..schedule import ExpertSchedule
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
from .weight_formats import each_row, quantise_rows, weight_format

DEFAULT = ExpertSchedule()


def grouped_experts(
    experts: int, d: int, f: int, top_k: int, limit: float, weight_dtype: str = "float32", dots: bool = False,
    schedule: ExpertSchedule = DEFAULT,
) -> tvm.tirx.PrimFunc:  # fmt: skip
    """``y = sum_k weights_k * down(silu(min(gate, limit)) * clip(up, -limit, limit))`` (V4 paper, section 2.1).

    Args:
        experts: E, number of experts.
        d: hidden size.
        f: width of an expert.
        top_k: experts per token.
        limit: the model's ``swiglu_limit``.
        weight_dtype: ``float32`` or ``bfloat16`` (widened in registers; sums are float32), ``bf16_pairs``
            (`pair_packing`; rows are rounded to bfloat16), ``int8`` or ``int4``
            (`quant_packing`; the rows of x and the hidden rows are quantised to 8 bits), or ``fp8`` or ``fp4``
            (`native_packing`; the rows for FP4 are quantised).
        dots: as of `weight_format`.
        schedule: register blocks of the products.

    Returns:
        PrimFunc of x ``[B, S, d]`` float32, weights ``[B, S, top_k]`` float32, indices ``[B, S, top_k]`` int64 (one
        outside [0, E) stands for no expert), gate_up ``[E, 2 ceil(f / PANEL), panel]`` from `pack_gate_up` or
        `quant_pack_gate_up`, down ``[E, ceil(d / PANEL), panel]`` from `pack_rows` or `quant_pack_rows` (`panel` is the
        format's ``panel_shape``), y ``[B, S, d]`` float32.
    """
    by_d, by_f = (weight_format(k, weight_dtype, dots, schedule) for k in (d, f))
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
        gate_up_e = T.match_buffer(gate_up_, (T.int64(experts), T.int64(2 * f_panels), *by_d.panel_shape), by_d.dtype)
        down_e = T.match_buffer(down_, (T.int64(experts), T.int64(d_panels), *by_f.panel_shape), by_f.dtype)
        y_bsd = T.match_buffer(y_, (b, s, T.int64(d)), "float32")
        x = x_bsd.view(b * s, T.int64(d))
        weights = weights_bsk.view(b * s, T.int64(top_k))
        indices = indices_bsk.view(b * s, T.int64(top_k))
        gate_up = gate_up_e.view(T.int64(experts * 2 * f_panels), *by_d.panel_shape)
        down = down_e.view(T.int64(experts * d_panels), *by_f.panel_shape)
        y = y_bsd.view(b * s, T.int64(d))

        starts = T.alloc_buffer((T.int64(experts + 1),), "int64")
        active = T.alloc_buffer((T.int64(experts + 1),), "int64")
        tokens = T.alloc_buffer((b * s * top_k,), "int64")
        scales = T.alloc_buffer((b * s * top_k,), "float32")
        hidden = T.alloc_buffer((b * s * top_k, T.int64(f_panels * PANEL)), "float32")
        sort_by_expert(indices, weights, b * s, T.int64(0), starts, active, tokens, scales, experts, top_k)

        inputs = by_d.inputs(x, b * s)
        hidden_inputs = by_f.inputs(hidden, b * s * top_k)
        quantise_rows(by_d, x, inputs, b * s, d)
        for panel in T.parallel(T.int64(f_panels)):
            routed_hidden(inputs, gate_up, active, starts, tokens, hidden, panel, experts, f, by_d, limit)
        quantise_rows(by_f, hidden, hidden_inputs, starts[experts], f)
        for panel in T.parallel(T.int64(d_panels)):
            clear_panel(y, b * s, panel, d)
            routed_output(hidden_inputs, down, active, starts, tokens, scales, y, panel, experts, d, by_f)

    return grouped_experts


def mixture_of_experts(
    experts: int, d: int, f: int, top_k: int, limit: float, weight_dtype: str, shared_f: int, dots: bool = False,
    shared_dtype: str | None = None, schedule: ExpertSchedule = DEFAULT,
) -> tvm.tirx.PrimFunc:  # fmt: skip
    """`grouped_experts` plus a shared expert of the same kind that every token passes through (V4 paper, section 2.1).

    Args:
        experts, d, f, top_k, limit, weight_dtype, dots, schedule: as for `grouped_experts`.
        shared_f: G, width of the shared expert.
        shared_dtype: its weight dtype, where it is another.

    Returns:
        PrimFunc of x, weights, indices, gate_up and down as in `grouped_experts`, shared_gate_up
        ``[2 ceil(G / PANEL), panel]`` and shared_down ``[ceil(d / PANEL), panel]``, packed as gate_up and down are,
        y ``[B, S, d]`` float32.
    """
    by_d, by_f = (weight_format(k, weight_dtype, dots, schedule) for k in (d, f))
    shared_by_d, by_g = (weight_format(k, shared_dtype or weight_dtype, dots, schedule) for k in (d, shared_f))
    # Rows that are quantised for one of the two are not as the other wants them, unless both are stored alike.
    alike = shared_dtype in (None, weight_dtype)
    widest = by_f if f > shared_f else by_g
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
        gate_up_e = T.match_buffer(gate_up_, (T.int64(experts), T.int64(2 * f_panels), *by_d.panel_shape), by_d.dtype)
        down_e = T.match_buffer(down_, (T.int64(experts), T.int64(d_panels), *by_f.panel_shape), by_f.dtype)
        shared_gate_up = T.match_buffer(
            shared_gate_up_, (T.int64(2 * g_panels), *shared_by_d.panel_shape), shared_by_d.dtype
        )
        shared_down = T.match_buffer(shared_down_, (T.int64(d_panels), *by_g.panel_shape), by_g.dtype)
        y_bsd = T.match_buffer(y_, (b, s, T.int64(d)), "float32")
        x = x_bsd.view(b * s, T.int64(d))
        weights = weights_bsk.view(b * s, T.int64(top_k))
        indices = indices_bsk.view(b * s, T.int64(top_k))
        gate_up = gate_up_e.view(T.int64(experts * 2 * f_panels), *by_d.panel_shape)
        down = down_e.view(T.int64(experts * d_panels), *by_f.panel_shape)
        y = y_bsd.view(b * s, T.int64(d))

        starts = T.alloc_buffer((T.int64(experts + 1),), "int64")
        active = T.alloc_buffer((T.int64(experts + 1),), "int64")
        tokens = T.alloc_buffer((b * s * (top_k + 1),), "int64")
        scales = T.alloc_buffer((b * s * (top_k + 1),), "float32")
        hidden = T.alloc_buffer((b * s * (top_k + 1), T.int64(max(f_panels, g_panels) * PANEL)), "float32")
        place_shared(b * s, tokens, scales)
        sort_by_expert(indices, weights, b * s, b * s, starts, active, tokens, scales, experts, top_k)

        inputs = by_d.inputs(x, b * s)
        quantise_rows(by_d, x, inputs, b * s, d)
        if alike:
            shared_inputs = T.meta_var(inputs)
            hidden_inputs = widest.inputs(hidden, b * s * (top_k + 1))
            shared_hidden = T.meta_var(hidden_inputs)
        else:
            shared_inputs = shared_by_d.inputs(x, b * s)
            quantise_rows(shared_by_d, x, shared_inputs, b * s, d)
            hidden_inputs = by_f.inputs(hidden, b * s * (top_k + 1))
            shared_hidden = by_g.inputs(hidden, b * s)
        # The panels of both are spread over the tasks evenly: a thread's share of tasks is its share of the work.
        for task in T.parallel(T.int64(tasks)):
            first: T.int64 = task * g_panels // tasks
            for more in range((task + 1) * g_panels // tasks - first):
                shared: T.int64 = first + more
                hidden_panel(
                    shared_inputs, shared_gate_up, shared * 2, tokens, hidden, shared, T.int64(0), b * s, shared_by_d,
                    limit,
                )  # fmt: skip
            routed_first: T.int64 = task * f_panels // tasks
            for more in range((task + 1) * f_panels // tasks - routed_first):
                panel: T.int64 = routed_first + more
                routed_hidden(inputs, gate_up, active, starts, tokens, hidden, panel, experts, f, by_d, limit)

        @T.inline
        def quantise_hidden(place):
            if place < b * s:
                if by_g.quantised:
                    by_g.quantise(hidden, shared_hidden, place)
            else:
                if by_f.quantised:
                    by_f.quantise(hidden, hidden_inputs, place)

        if by_f.quantised or by_g.quantised:
            each_row(quantise_hidden, starts[experts], max(f, shared_f))
        for panel in T.parallel(T.int64(d_panels)):
            clear_panel(y, b * s, panel, d)
            output_panel(shared_hidden, shared_down, panel, tokens, scales, y, panel, T.int64(0), b * s, d, by_g)
            routed_output(hidden_inputs, down, active, starts, tokens, scales, y, panel, experts, d, by_f)

    return mixture_of_experts
