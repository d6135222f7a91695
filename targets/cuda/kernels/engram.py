"""Engram: addresses, rows of the table, gate and convolution."""

from __future__ import annotations

from typing import Any

from v4c.runtime.dtypes import DTYPES

from ..launch import CTYPES, Buffer, Launch, ceil_div, device_call, prim_func

_IN_FLIGHT = 4
"""Pieces of rows that a thread asks for at once: 8 KiB a block, and more than PCIe holds with some ten blocks."""


def engram_hash(max_ngram: int, addresses: int, pad_id: int) -> Any:
    """Table addresses of every token's n-grams, n = 2 .. `max_ngram` (Engram paper, section 2.2).

    Arguments of the PrimFunc, int64: input_ids ``[B, S]``, lookup ``[V]``, multipliers ``[max_ngram]``, primes, offsets
    ``[addresses]``, history ``[B, max_ngram - 1]`` (in place), positions, lengths ``[B]``, out ``[B, S, addresses]``.
    """
    buffers: dict[str, Buffer] = {
        "input_ids": (("b", "s"), "int64"),
        "lookup": (("v",), "int64"),
        "multipliers": ((max_ngram,), "int64"),
        "primes": ((addresses,), "int64"),
        "offsets": ((addresses,), "int64"),
        "history": (("b", max_ngram - 1), "int64"),
        "positions": (("b",), "int64"),
        "lengths": (("b",), "int64"),
        "out": (("b", "s", addresses), "int64"),
    }
    hashes = Launch(
        device_call("engram_hash", max_ngram, addresses),
        ("input_ids", "lookup", "multipliers", "primes", "offsets", "history", "positions", "lengths", "s", str(pad_id),
         "out"), ("b * s",), 32,
    )  # fmt: skip
    history = Launch(
        device_call("engram_history", max_ngram), ("input_ids", "lookup", "positions", "lengths", "s", "history"),
        ("b * s",), 32,
    )  # fmt: skip
    return prim_func("engram_hash", buffers, [hashes, history])


def engram_lookup(addresses: int, width: int, dtype: str) -> Any:
    """Rows of the table, side by side: table ``[R, width]`` of `dtype`, addresses ``[B, S, T]`` int64, out float32.

    The table lies in host memory (`v4c.runtime.host_memory`), which the GPU reads over PCIe.
    """
    buffers: dict[str, Buffer] = {
        "table": (("r", width), dtype),
        "addresses": (("b", "s", addresses), "int64"),
        "out": (("b", "s", addresses * width), "float32"),
    }
    per_lane = 16 // DTYPES[dtype].storage.itemsize
    lanes = width // per_lane if width % per_lane == 0 else width
    rows = f"b * s * {addresses}"
    launch = Launch(
        device_call("engram_lookup", CTYPES[dtype], width, _IN_FLIGHT), ("table", "addresses", rows, "out"),
        (ceil_div(f"{rows} * {lanes}", 128 * _IN_FLIGHT),), 128,
    )  # fmt: skip
    return prim_func("engram_lookup", buffers, [launch])


def engram_gate_conv(m: int, d: int, taps: int, dilation: int, eps: float) -> Any:
    """Gate the value per stream, convolve it, add both to the streams (Engram paper, sections 2.3 and 2.4).

    Arguments of the PrimFunc, float32 unless noted, Q = ``(taps - 1) * dilation``: keys ``[B, S, M, D]``, value
    ``[B, S, D]``, streams ``[B, S, M, D]``, key_norm, stream_norm, conv_norm ``[M, D]``, conv_weight ``[M * D, taps]``,
    conv_state ``[B, Q, M * D]`` (in place), positions, lengths ``[B]`` int64, out ``[B, S, M, D]``.
    """
    streams: Buffer = (("b", "s", m, d), "float32")
    buffers: dict[str, Buffer] = {"keys": streams, "value": (("b", "s", d), "float32"), "streams": streams}
    buffers |= dict.fromkeys(("key_norm", "stream_norm", "conv_norm"), ((m, d), "float32"))
    buffers |= {
        "conv_weight": ((m * d, taps), "float32"),
        "conv_state": (("b", (taps - 1) * dilation, m * d), "float32"),
        "positions": (("b",), "int64"),
        "lengths": (("b",), "int64"),
        "out": streams,
    }
    grid = ("b * s", m)
    gate = Launch(
        device_call("engram_gate", m, d),
        ("keys", "value", "streams", "key_norm", "stream_norm", eps, "gates"),
        grid,
        256,
    )
    conv = Launch(
        device_call("engram_conv", m, d, taps, dilation),
        ("gates", "value", "streams", "conv_norm", "conv_weight", "conv_state", "positions", "s", "out"), grid, 256,
    )  # fmt: skip
    state = Launch(
        device_call("engram_state", m, d, taps, dilation),
        ("gates", "value", "conv_norm", "positions", "lengths", "s", "conv_state"), grid, 256,
    )  # fmt: skip
    return prim_func("engram_gate_conv", buffers, [gate, conv, state], {"gates": (("b", "s", m, 2), "float32")})
