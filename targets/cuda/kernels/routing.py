"""Which experts a token goes to: routes from logits, and routers with their product in front."""

from __future__ import annotations

from typing import Any

from ..launch import Buffer, Launch, ceil_div, device_call, prim_func
from ..schedule import ProductSchedule
from .products import product_steps


def topk_route(experts: int, top_k: int, scaling: float) -> Any:
    """The `top_k` experts of highest ``sqrt(softplus(logit)) + bias``, and their weights (V4 paper, section 2.1).

    Arguments of the PrimFunc: logits ``[B, S, E]``, bias ``[E]``, weights ``[B, S, K]`` float32, indices ``[B, S, K]``
    int64: highest first, equal ones by the smaller index.
    """
    buffers = {"logits": (("b", "s", experts), "float32"), "bias": ((experts,), "float32"), **_chosen(top_k)}
    return prim_func("topk_route", buffers, [_choose(experts, top_k, scaling)])


def topk_router(experts: int, d: int, top_k: int, scaling: float, dtype: str, schedule: ProductSchedule) -> Any:
    """As `topk_route` for ``logits = x weight^T``: x ``[B, S, D]`` float32, weight ``[E, D]`` of `dtype`, bias."""
    buffers: dict[str, Buffer] = {
        "x": (("b", "s", d), "float32"), "w": ((experts, d), dtype), "bias": ((experts,), "float32"), **_chosen(top_k),
    }  # fmt: skip
    steps, scratch = product_steps(1, (experts,), d, dtype, None, schedule, ("logits",), rows="(b * s)")
    scratch["logits"] = (("b", "s", experts), "float32")
    return prim_func("topk_router", buffers, [*steps, _choose(experts, top_k, scaling)], scratch)


def hash_route(experts: int, top_k: int, scaling: float) -> Any:
    """Experts from a table of token ids, and their weights (V4 paper, section 2.1).

    Arguments of the PrimFunc: logits ``[B, S, E]`` float32, input_ids ``[B, S]`` int64, table ``[V, K]`` int64, weights
    ``[B, S, K]`` float32, indices ``[B, S, K]`` int64.
    """
    buffers: dict[str, Buffer] = {
        "logits": (("b", "s", experts), "float32"),
        "input_ids": (("b", "s"), "int64"),
        "table": (("v", top_k), "int64"),
        **_chosen(top_k),
    }
    launch = Launch(
        device_call("hash_route", experts, top_k),
        ("logits", "input_ids", "table", "b * s", scaling, "weights", "indices"), (ceil_div("b * s", 128),), 128,
    )  # fmt: skip
    return prim_func("hash_route", buffers, [launch])


def hash_router(experts: int, d: int, top_k: int, scaling: float) -> Any:
    """The weights of experts that are chosen already, from their rows of the router alone.

    Arguments of the PrimFunc: x ``[B, S, D]``, weight ``[E, D]`` float32, indices ``[B, S, K]`` int64, weights
    ``[B, S, K]`` float32.
    """
    chosen = _chosen(top_k)
    buffers: dict[str, Buffer] = {
        "x": (("b", "s", d), "float32"), "w": ((experts, d), "float32"), "indices": chosen["indices"],
        "weights": chosen["weights"],
    }  # fmt: skip
    call = device_call("hash_router", d, top_k)
    launch = Launch(call, ("x", "w", "indices", scaling, "weights"), ("b * s",), 32 * min(top_k, 8))
    return prim_func("hash_router", buffers, [launch])


def _chosen(top_k: int) -> dict[str, Buffer]:
    return {"weights": (("b", "s", top_k), "float32"), "indices": (("b", "s", top_k), "int64")}


def _choose(experts: int, top_k: int, scaling: float) -> Launch:
    return Launch(
        device_call("topk_route", experts, top_k), ("logits", "bias", "b * s", scaling, "weights", "indices"),
        (ceil_div("(b * s)", 4),), 128,
    )  # fmt: skip
