"""The KV compressor, alone or with the indexer's."""

from __future__ import annotations

from typing import Any

from ..launch import Buffer, Launch, Step, ceil_div, device_call, prim_func


def kv_compress(z: int, c: int, rotary: int, ratio: int, eps: float) -> Any:
    """Every window of `ratio` tokens becomes one row (V4 paper, on CSA and HCA).

    Arguments of the PrimFunc, float32 unless noted: kv, gate ``[B, S, Z]``, bias ``[ratio, Z]``, norm ``[C]``, inv_freq
    ``[rotary / 2]``; in place: state_kv, state_gate ``[B, Q, Z]``, rows ``[B, N, C]``; positions, lengths ``[B]``
    int64.
    """
    names = ("kv", "gate", "bias", "norm", "state_kv", "state_gate", "rows")
    own = _buffers(names, z, c, ratio, "n")
    buffers = {k: own[k] for k in names[:4]} | {"inv_freq": ((rotary // 2,), "float32")}
    buffers |= {k: own[k] for k in names[4:]} | _call()
    return prim_func("kv_compress", buffers, _steps(names, z, c, rotary, ratio, eps, "n"))


def kv_compress_pair(z: int, c: int, index_z: int, index_c: int, rotary: int, ratio: int, eps: float) -> Any:
    """Two `kv_compress` over the same tokens: the second's seven tensors follow the first's, then what they share."""
    first = ("kv", "gate", "bias", "norm", "state_kv", "state_gate", "rows")
    second = tuple(f"index_{n}" for n in ("kv", "gate", "bias", "norm", "state_kv", "state_gate", "rows"))
    buffers = _buffers(first, z, c, ratio, "n") | _buffers(second, index_z, index_c, ratio, "k")
    buffers |= {"inv_freq": ((rotary // 2,), "float32")} | _call()
    steps = _steps(first, z, c, rotary, ratio, eps, "n") + _steps(second, index_z, index_c, rotary, ratio, eps, "k")
    return prim_func("kv_compress_pair", buffers, steps)


def _call() -> dict[str, Buffer]:
    return {"positions": (("b",), "int64"), "lengths": (("b",), "int64")}


def _buffers(names: tuple[str, ...], z: int, c: int, ratio: int, rows: str) -> dict[str, Buffer]:
    ring = ("b", ratio if z == c else 2 * ratio, z)
    shapes = (("b", "s", z), ("b", "s", z), (ratio, z), (c,), ring, ring, ("b", rows, c))
    return {name: (shape, "float32") for name, shape in zip(names, shapes, strict=True)}  # type: ignore[misc]


def _steps(names: tuple[str, ...], z: int, c: int, rotary: int, ratio: int, eps: float, rows: str) -> list[Step]:
    kv, gate, bias, norm, ring_kv, ring_gate, out = names
    threads = min(512, -(-c // 32) * 32)
    pool = Launch(
        device_call("compress", c, z, ratio, rotary // 2, threads),
        (kv, gate, bias, norm, "inv_freq", ring_kv, ring_gate, out, "positions", "lengths", "s", rows, eps),
        (ceil_div("s", ratio), "b"), threads,
    )  # fmt: skip
    ring = ratio if z == c else 2 * ratio
    write = Launch(
        device_call("write_rings", z, ring),
        (kv, gate, ring_kv, ring_gate, "positions", "lengths", "s"),
        ("b * s",),
        128,
    )
    return [pool, write]
