"""Hyper-connections: each step between two sublayers is two launches."""

from __future__ import annotations

from typing import Any

from ..launch import Buffer, Launch, ceil_div, device_call, prim_func
from ..schedule import MHCSchedule

_THREADS = 256


def mhc_pre(m: int, d: int, iterations: int, hc_eps: float, norm_eps: float, schedule: MHCSchedule) -> Any:
    """Entry of a sublayer (mHC paper, section 4.2).

    Arguments of the PrimFunc, float32: streams ``[B, S, M, D]``, fn ``[(2 + M) M, M D]``, base ``[(2 + M) M]``, scale
    ``[3]``, collapsed ``[B, S, D]``, post ``[B, S, M]``, comb ``[B, S, M, M]``.
    """
    return _enter("mhc_pre", m, d, iterations, hc_eps, norm_eps, None, False, schedule)


def mhc_pre_norm(
    m: int, d: int, iterations: int, hc_eps: float, norm_eps: float, eps: float, schedule: MHCSchedule
) -> Any:
    """As `mhc_pre`, with the RMS norm of the collapsed streams: its weight ``[D]`` follows scale."""
    return _enter("mhc_pre_norm", m, d, iterations, hc_eps, norm_eps, eps, False, schedule)


def mhc_post_pre_norm(
    m: int, d: int, iterations: int, hc_eps: float, norm_eps: float, eps: float, schedule: MHCSchedule
) -> Any:
    """As `mhc_pre_norm` on the streams that a sublayer's exit makes.

    x ``[B, S, D]`` stands first, its post and comb follow the streams; mixed ``[B, S, M, D]`` is the first output.
    """
    return _enter("mhc_post_pre_norm", m, d, iterations, hc_eps, norm_eps, eps, True, schedule)


def mhc_post(m: int, d: int) -> Any:
    """Exit of a sublayer: x ``[B, S, D]``, streams ``[B, S, M, D]``, post, comb, out ``[B, S, M, D]``."""
    buffers = {"x": (("b", "s", d), "float32"), **_streams(m, d), **_weights(m), "out": (("b", "s", m, d), "float32")}
    launch = Launch(
        device_call("mhc_post", m, d),
        ("x", "streams", "post", "comb", "out"),
        ("b * s", ceil_div(d, _THREADS)),
        _THREADS,
    )
    return prim_func("mhc_post", buffers, [launch])


def mhc_head(m: int, d: int, hc_eps: float, norm_eps: float, schedule: MHCSchedule) -> Any:
    """After the last layer: streams ``[B, S, M, D]``, fn ``[M, M D]``, base ``[M]``, scale ``[1]``, y ``[B, S, D]``."""
    splits = schedule.splits(d)
    buffers = {
        **_streams(m, d), "fn": ((m, m * d), "float32"), "base": ((m,), "float32"), "scale": ((1,), "float32"),
        "y": (("b", "s", d), "float32"),
    }  # fmt: skip
    parts = {"parts": (("b", "s", splits, m + 1), "float32")}
    logits = Launch(
        device_call("mhc_logits", m, d, m, False), ("null", "streams", "null", "null", "fn", "null", "parts"),
        ("b * s", splits), _THREADS,
    )  # fmt: skip
    leave = Launch(
        device_call("mhc_leave", m, d, splits), ("parts", "streams", "base", "scale", hc_eps, norm_eps, "y"),
        ("b * s",), _THREADS,
    )  # fmt: skip
    return prim_func("mhc_head", buffers, [logits, leave], parts)


def _streams(m: int, d: int) -> dict[str, Buffer]:
    return {"streams": (("b", "s", m, d), "float32")}


def _weights(m: int, prefix: str = "") -> dict[str, Buffer]:
    return {f"{prefix}post": (("b", "s", m), "float32"), f"{prefix}comb": (("b", "s", m, m), "float32")}


def _enter(
    name: str, m: int, d: int, iterations: int, hc_eps: float, norm_eps: float, eps: float | None, mix: bool,
    schedule: MHCSchedule,
) -> Any:  # fmt: skip
    logits, splits = (2 + m) * m, schedule.splits(d)
    buffers: dict[str, Buffer] = {"x": (("b", "s", d), "float32")} if mix else {}
    buffers |= _streams(m, d)
    if mix:
        buffers |= _weights(m)
    buffers |= {
        "fn": ((logits, m * d), "float32"), "base": ((logits,), "float32"), "scale": ((3,), "float32"),
    }  # fmt: skip
    if eps is not None:
        buffers["norm"] = ((d,), "float32")
    if mix:
        buffers["mixed"] = (("b", "s", m, d), "float32")
    buffers |= {"y": (("b", "s", d), "float32"), **_weights(m, "next_")}
    parts = {"parts": (("b", "s", splits, logits + 1), "float32")}
    entering = "mixed" if mix else "streams"
    first = Launch(
        device_call("mhc_logits", m, d, logits, mix),
        (*(("x", "streams", "post", "comb") if mix else ("null", "streams", "null", "null")), "fn",
         "mixed" if mix else "null", "parts"), ("b * s", splits), _THREADS,
    )  # fmt: skip
    second = Launch(
        device_call("mhc_enter", m, d, splits, eps is not None),
        ("parts", entering, "base", "scale", "norm" if eps is not None else "null", str(iterations), hc_eps, norm_eps,
         eps or 0.0, "y", "next_post", "next_comb"), ("b * s",), _THREADS,
    )  # fmt: skip
    return prim_func(name, buffers, [first, second], parts)
