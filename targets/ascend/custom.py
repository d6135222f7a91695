"""Buffers and tile programs of every custom op.

Borders are the op's inputs in order, then the outputs that are not written over one. A name with ``32`` is a float32
buffer of the host graph that a program of its own rounds to half precision, or widens from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from v4c.custom_ops import CustomOp, TensorSpec

from .kernels.attention import AttentionSizes, attend, gather
from .kernels.casts import cast_rows
from .kernels.compressor import kv_compress
from .kernels.engram import engram_gate_conv, engram_hash, engram_lookup
from .kernels.experts import ExpertSizes, grouped_experts
from .kernels.history import ring_history, ring_write
from .kernels.index import index_scores
from .kernels.mhc import mhc_head, mhc_post, mhc_pre
from .kernels.rope import rope_angles, trailing_rope
from .kernels.routes import hash_route, topk_route
from .kernels.swiglu import swiglu
from .kernels.top_k import index_top_k
from .operation import Border, Dim
from .program import DeviceLimits, Role, TileProgram

Programs = Callable[[DeviceLimits, int | None], tuple[TileProgram, ...]]
Attributes = Mapping[str, Any]
_B, _S, _N = "batch", "chunk", "capacity"


@dataclass(frozen=True)
class Unnamed:
    """An operation before it has a name and a device."""

    borders: tuple[Border, ...]
    programs: Programs
    ratio: int = 1
    by_rows: bool = False


class Inputs:
    """The inputs of a custom op by name."""

    def __init__(self, op: CustomOp, specs: Sequence[TensorSpec]) -> None:
        self.specs = dict(zip(op.inputs, specs, strict=True))

    def size(self, name: str, axis: int) -> int:
        """A static dimension."""
        return int(self.specs[name].shape[axis])

    def dtype(self, name: str) -> str:
        return self.specs[name].dtype


def floats(name: str, *shape: Dim, role: Role = Role.READ, dtype: str = "float32") -> Border:
    return Border(name, shape, dtype, role)


def _whole(name: str, *shape: Dim, role: Role = Role.READ, draw: tuple[int, int] = (0, 1)) -> Border:
    """Integers: int64 in the host graph, int32 on the device."""
    return Border(name, shape, "int32", role, "int64", draw)


def _positions(*, lengths: bool = True) -> tuple[Border, ...]:
    return tuple(_whole(n, _B) for n in (("positions", "lengths") if lengths else ("positions",)))


def _rope(i: Inputs, a: Attributes) -> Unnamed:
    heads, width, half = i.size("x", 2), i.size("x", 3), i.size("inv_freq", 0)
    shape = (_B, _S, heads, width)
    borders = (floats("x", *shape), *_positions(lengths=False), floats("inv_freq", half),
               floats("y", *shape, role=Role.WRITE))  # fmt: skip
    return Unnamed(borders, lambda at, rows: (
        rope_angles(2 * half, at), trailing_rope(heads, width, 2 * half, a["sign"], at, dtype="float32"),
    ))  # fmt: skip


def _mhc_pre(i: Inputs, a: Attributes) -> Unnamed:
    m, width = i.size("streams", 2), i.size("streams", 3)
    logits = (2 + m) * m
    borders = (
        floats("streams", _B, _S, m, width), floats("fn", logits, m * width), floats("base", logits),
        floats("scale", 3), floats("collapsed", _B, _S, width, role=Role.WRITE),
        # One vector of tokens per weight: what stands in these two is only ever read by MHCPost.
        floats("post", _B, _S, m, role=Role.WRITE), floats("comb", _B, _S, m, m, role=Role.WRITE),
    )  # fmt: skip
    sizes = (m, width, a["iterations"], a["hc_eps"], a["norm_eps"])
    return Unnamed(borders, lambda at, rows: mhc_pre(*sizes, at, out="float32", rows=rows), by_rows=True)


def _mhc_post(i: Inputs, a: Attributes) -> Unnamed:
    m, width = i.size("streams", 2), i.size("streams", 3)
    borders = (
        floats("x", _B, _S, width), floats("streams", _B, _S, m, width), floats("post", _B, _S, m),
        floats("comb", _B, _S, m, m), floats("mixed", _B, _S, m, width, role=Role.WRITE),
    )  # fmt: skip
    return Unnamed(borders, lambda at, rows: (mhc_post(m, width, at, dtype="float32"),))


def _mhc_head(i: Inputs, a: Attributes) -> Unnamed:
    m, width = i.size("streams", 2), i.size("streams", 3)
    borders = (
        floats("streams", _B, _S, m, width), floats("fn", m, m * width), floats("base", m), floats("scale", 1),
        floats("collapsed", _B, _S, width, role=Role.WRITE),
    )  # fmt: skip
    sizes = (m, width, a["hc_eps"], a["norm_eps"])
    return Unnamed(borders, lambda at, rows: mhc_head(*sizes, at, out="float32", rows=rows), by_rows=True)


def _kv_compress(i: Inputs, a: Attributes) -> Unnamed:
    width, columns, half, ratio = i.size("kv", 2), i.size("rows", 2), i.size("inv_freq", 0), a["ratio"]
    ring = ratio * (width // columns)
    borders = (
        floats("kv", _B, _S, width), floats("gate", _B, _S, width), floats("bias", ratio, width),
        floats("norm", columns), floats("inv_freq", half), floats("state_kv", _B, ring, width, role=Role.UPDATE),
        floats("state_gate", _B, ring, width, role=Role.UPDATE),
        floats("rows", _B, _N, columns, role=Role.UPDATE, dtype=i.dtype("rows")), *_positions(),
    )  # fmt: skip
    sizes = (width, columns, 2 * half, ratio, a["eps"])
    return Unnamed(borders, lambda at, rows: kv_compress(*sizes, at, dtype=i.dtype("rows")), ratio)


def _lightning_index(i: Inputs, a: Attributes) -> Unnamed:
    heads, width, ratio, top_k = i.size("q", 2), i.size("q", 3), a["ratio"], a["top_k"]
    dtype = i.dtype("index_rows")
    borders = (
        floats("q32", _B, _S, heads, width), floats("weights", _B, _S, heads),
        floats("index_rows", _B, _N, width, dtype=dtype), *_positions(),
        _whole("indices", _B, _S, top_k, role=Role.WRITE),
    )  # fmt: skip
    return Unnamed(borders, lambda at, rows: (
        cast_rows(heads * width, "float32", dtype, at, op="LightningIndex", names=("q32", "q")),
        index_scores(heads, width, ratio, at, dtype=dtype), *index_top_k(top_k, ratio, at),
    ), ratio)  # fmt: skip


def _attention(i: Inputs, a: Attributes) -> Unnamed:
    chosen = i.size("indices", 2) if "indices" in i.specs else 0
    s = AttentionSizes(i.size("q", 2), i.size("q", 3), i.size("window", 1), a["scale"], a.get("ratio", 0), chosen,
                       i.dtype("window"))  # fmt: skip
    shape = (_B, _S, s.heads, s.width)
    has_rows = chosen or s.ratio
    borders = (
        floats("q32", *shape), floats("kv", _B, _S, s.width),
        floats("window", _B, s.window, s.width, role=Role.UPDATE, dtype=s.dtype),
        *((floats("rows", _B, _N, s.width, dtype=s.dtype),) if has_rows else ()),
        *((_whole("indices", _B, _S, chosen, draw=(-1, 2)),) if chosen else ()),
        floats("sinks", s.heads), *_positions(), floats("out32", *shape, role=Role.WRITE),
    )  # fmt: skip

    def programs(at: DeviceLimits, rows: int | None) -> tuple[TileProgram, ...]:
        wide = s.heads * s.width
        return (
            cast_rows(wide, "float32", s.dtype, at, op=s.op, names=("q32", "q")),
            *ring_history(
                s.window,
                s.width,
                at,
                op=s.op,
                ring="window",
                new="kv",
                history="history",
                ring_dtype=s.dtype,
                new_dtype="float32",
            ),
            *((gather(s, at),) if chosen else ()),
            *attend(s, at),
            ring_write(s.window, s.width, at, op=s.op, ring="window", history="history", dtype=s.dtype),
            cast_rows(wide, s.dtype, "float32", at, op=s.op, names=("out", "out32")),
        )

    return Unnamed(borders, programs, s.ratio or (4 if chosen else 1))


def _engram_hash(i: Inputs, a: Attributes) -> Unnamed:
    longest, addresses = i.size("multipliers", 0), i.size("primes", 0)

    def wide(name: str, *shape: Dim, low: int = 0, high: int = 64) -> Border:
        return Border(name, shape, "int64", draw=(low, high))

    borders = (
        _whole("input_ids", _B, _S, draw=(0, 64)), Border("lookup", ("vocabulary",), "int32", draw=(0, 64)),
        wide("multipliers", longest, low=2**61, high=2**62), wide("primes", addresses, low=101, high=5000),
        wide("offsets", addresses), _whole("history", _B, longest - 1, role=Role.UPDATE, draw=(0, 64)),
        *_positions(), _whole("addresses", _B, _S, addresses, role=Role.WRITE),
    )  # fmt: skip
    return Unnamed(borders, lambda at, rows: engram_hash(longest, addresses, a["pad_id"], at))


def _engram_lookup(i: Inputs, a: Attributes) -> Unnamed:
    addresses, width, dtype = i.size("addresses", 2), i.size("table", 1), i.dtype("table")
    borders = (
        floats("table", "table_rows", width, dtype=dtype),
        _whole("addresses", _B, _S, addresses, draw=(0, 64)),
        floats("embedding32", _B, _S, addresses * width, role=Role.WRITE),
    )  # fmt: skip
    return Unnamed(borders, lambda at, rows: (
        engram_lookup(width, addresses, at, dtype=dtype),
        cast_rows(addresses * width, dtype, "float32", at, op="EngramLookup", names=("embedding", "embedding32")),
    ))  # fmt: skip


def _engram_gate_conv(i: Inputs, a: Attributes) -> Unnamed:
    m, width, taps = i.size("streams", 2), i.size("streams", 3), i.size("conv_weight", 1)
    size = (taps - 1) * a["dilation"]
    borders = (
        floats("keys", _B, _S, m, width), floats("value", _B, _S, width), floats("streams", _B, _S, m, width),
        *(floats(n, m, width) for n in ("key_norm", "stream_norm", "conv_norm")),
        floats("conv_weight", taps, m * width), floats("conv_state", _B, size, m * width, role=Role.UPDATE),
        *_positions(), floats("mixed", _B, _S, m, width, role=Role.WRITE),
    )  # fmt: skip
    sizes = (m, width, taps, a["dilation"], a["eps"])
    return Unnamed(borders, lambda at, rows: engram_gate_conv(*sizes, at, dtype="float32"))


def _topk_route(i: Inputs, a: Attributes) -> Unnamed:
    experts, top_k = i.size("logits", 2), a["top_k"]
    borders = (
        floats("logits", _B, _S, experts), floats("bias", experts),
        floats("weights", _B, _S, top_k, role=Role.WRITE), _whole("indices", _B, _S, top_k, role=Role.WRITE),
    )  # fmt: skip
    return Unnamed(borders, lambda at, rows: (topk_route(experts, top_k, a["scaling"], at),))


def _hash_route(i: Inputs, a: Attributes) -> Unnamed:
    experts, top_k = i.size("logits", 2), i.size("table", 1)
    borders = (
        floats("logits", _B, _S, experts), _whole("input_ids", _B, _S, draw=(0, 64)),
        Border("table", ("vocabulary", top_k), "int32", draw=(0, experts)),
        floats("weights", _B, _S, top_k, role=Role.WRITE), _whole("indices", _B, _S, top_k, role=Role.WRITE),
    )  # fmt: skip
    return Unnamed(borders, lambda at, rows: (hash_route(experts, top_k, a["scaling"], at),))


def _grouped_experts(i: Inputs, a: Attributes) -> Unnamed:
    experts, hidden, width, top_k = i.size("gate_up", 0), i.size("x", 2), i.size("down", 2), i.size("indices", 2)
    dtype = i.dtype("gate_up")
    borders = (
        floats("x32", _B, _S, hidden), floats("weights", _B, _S, top_k),
        _whole("indices", _B, _S, top_k, draw=(-1, experts)),
        floats("gate_up", experts, 2 * width, hidden, dtype=dtype),
        floats("down", experts, hidden, width, dtype=dtype),
        floats("y32", _B, _S, hidden, role=Role.WRITE),
    )  # fmt: skip
    op = "GroupedExperts"

    def programs(at: DeviceLimits, rows: int | None) -> tuple[TileProgram, ...]:
        sizes = ExpertSizes(experts, hidden, width, top_k, a["limit"], dtype, rows)
        return (
            cast_rows(hidden, "float32", dtype, at, op=op, names=("x32", "x")),
            *grouped_experts(sizes, at),
            cast_rows(hidden, dtype, "float32", at, op=op, names=("y", "y32")),
        )

    return Unnamed(borders, programs, by_rows=True)


def _swiglu(i: Inputs, a: Attributes) -> Unnamed:
    width = i.size("gate", 2)
    borders = (
        floats("gate", _B, _S, width),
        floats("up", _B, _S, width),
        floats("y", _B, _S, width, role=Role.WRITE),
    )
    return Unnamed(borders, lambda at, rows: (swiglu(width, a["limit"], at, dtype="float32"),))


CUSTOM: dict[str, Callable[[Inputs, Attributes], Unnamed]] = {
    "TrailingRope": _rope,
    "MHCPre": _mhc_pre,
    "MHCPost": _mhc_post,
    "MHCHead": _mhc_head,
    "KVCompress": _kv_compress,
    "LightningIndex": _lightning_index,
    "CompressedSparseAttention": _attention,
    "HeavilyCompressedAttention": _attention,
    "SlidingWindowAttention": _attention,
    "EngramHash": _engram_hash,
    "EngramLookup": _engram_lookup,
    "EngramGateConv": _engram_gate_conv,
    "TopKRoute": _topk_route,
    "HashRoute": _hash_route,
    "GroupedExperts": _grouped_experts,
    "ClampedSwiGLU": _swiglu,
}
