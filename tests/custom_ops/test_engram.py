"""The three Engram ops, chunk by chunk with state, against one plain reference over whole texts.

The reference hashes with Python integers reduced mod 2**64 and computes the rest in float64, token by token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from tests.custom_ops.harness import OnnxOp, spec
from v4c.custom_ops.engram_gate_conv import ENGRAM_GATE_CONV, engram_gate_conv
from v4c.custom_ops.engram_hash import ENGRAM_HASH, engram_hash
from v4c.custom_ops.engram_lookup import ENGRAM_LOOKUP, engram_lookup

VOCAB = 13
EPS = 1e-6
Arrays = dict[str, np.ndarray]
seeds = st.integers(0, 2**32 - 1)


@dataclass(frozen=True)
class Sizes:
    """Widths of one Engram layer: n-gram orders up to `grams`, heads per order, table width, streams, width, taps."""

    grams: int
    heads: int
    embed: int
    streams: int
    width: int
    taps: int
    dilation: int
    pad_id: int

    @property
    def addresses(self) -> int:
        return (self.grams - 1) * self.heads

    @property
    def conv_rows(self) -> int:
        return (self.taps - 1) * self.dilation


@st.composite
def sizes(draw: st.DrawFn) -> Sizes:
    bounds = {"grams": (2, 4), "heads": (1, 3), "embed": (1, 4), "streams": (1, 3), "width": (1, 6)}
    bounds |= {"taps": (2, 4), "dilation": (1, 4), "pad_id": (0, 3)}
    drawn = {name: draw(st.integers(low, high), name) for name, (low, high) in bounds.items()}
    return Sizes(**drawn)


@st.composite
def schedules(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    """Chunk width S, and per call the live tokens of each row (0..S): rows advance at different paces."""
    chunk, batch = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    call = st.lists(st.integers(0, chunk), min_size=batch, max_size=batch)
    return chunk, draw(st.lists(call, min_size=1, max_size=5))


def make_weights(rng: np.random.Generator, z: Sizes) -> Arrays:
    """Weights of a layer; multipliers use all 64 bits, so that products overflow."""
    primes = rng.choice([3, 5, 7, 11, 13, 17, 19, 23, 29], z.addresses, replace=False)
    md = z.streams * z.width
    # Some streams barely see the keys, or not at all: their gates lie where s(x) is flat, or at sign(0).
    key_scale = rng.choice([1.0, 1e-4, 1e-8, 0.0], (z.streams, 1), p=[0.55, 0.15, 0.2, 0.1])
    return {
        "lookup": rng.integers(0, VOCAB, VOCAB),
        "multipliers": rng.integers(-(2**63), 2**63 - 1, z.grams) | 1,
        "primes": primes,
        "offsets": np.concatenate([[0], np.cumsum(primes)[:-1]]),
        "table": rng.normal(size=(primes.sum(), z.embed)),
        "key_proj": rng.normal(size=(z.streams, z.width, z.addresses * z.embed)),
        "value_proj": rng.normal(size=(z.width, z.addresses * z.embed)),
        "key_norm": rng.normal(size=(z.streams, z.width)) * key_scale,
        "stream_norm": rng.normal(size=(z.streams, z.width)),
        "conv_norm": rng.normal(size=(z.streams, z.width)),
        "conv_weight": rng.normal(size=(md, z.taps)),
    }


def wrap(value: int) -> int:
    """An unbounded integer as the int64 that two's complement arithmetic leaves."""
    return (value + 2**63) % 2**64 - 2**63


def reference_addresses(w: Arrays, z: Sizes, text: np.ndarray) -> np.ndarray:
    """Addresses ``[len(text), T]`` of one row's whole text."""
    ids = [int(i) for i in w["lookup"][text]]
    pad = int(w["lookup"][z.pad_id])
    out = np.zeros((len(ids), z.addresses), np.int64)
    for t in range(len(ids)):
        for n in range(2, z.grams + 1):
            mix = 0
            for k in range(n):
                mix ^= wrap((ids[t - k] if t >= k else pad) * int(w["multipliers"][k]))
            for head in range(z.heads):
                column = (n - 2) * z.heads + head
                out[t, column] = mix % int(w["primes"][column]) + int(w["offsets"][column])
    return out


def reference_layer(w: Arrays, z: Sizes, text: np.ndarray, streams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """New streams ``[L, M, D]`` of one row's whole text, and the rows ``[L, M * D]`` its convolution read."""
    addresses = reference_addresses(w, z, text)
    out, rows = np.zeros_like(streams), np.zeros((len(text), z.streams * z.width))

    def rms(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x) + EPS)

    for t in range(len(text)):
        e = np.concatenate([w["table"][a] for a in addresses[t]])
        value = w["value_proj"] @ e
        for i in range(z.streams):
            key = rms(w["key_proj"][i] @ e) * w["key_norm"][i]
            x = np.dot(key, rms(streams[t, i]) * w["stream_norm"][i]) / np.sqrt(z.width)
            x = np.sign(x) * np.sqrt(max(abs(x), 1e-6))
            gated = value / (1 + np.exp(-x))
            out[t, i] = streams[t, i] + gated
            rows[t, i * z.width : (i + 1) * z.width] = rms(gated) * w["conv_norm"][i]
        conv = np.zeros(z.streams * z.width)
        for j in range(z.taps):
            back = t - (z.taps - 1 - j) * z.dilation
            if back >= 0:
                conv = conv + w["conv_weight"][:, j] * rows[back]
        out[t] += (conv / (1 + np.exp(-conv))).reshape(z.streams, z.width)
    return out, rows


@cache
def onnx_hash(pad_id: int) -> OnnxOp:
    shapes = {"input_ids": "BS", "lookup": "V", "multipliers": "G", "primes": "T", "offsets": "T", "history": "BR"}
    specs = {name: spec(*dims, dtype="int64") for name, dims in {**shapes, "positions": "B", "lengths": "B"}.items()}
    return OnnxOp(ENGRAM_HASH, specs, pad_id=pad_id)


@cache
def onnx_lookup(heads: int, embed: int, dtype: str = "float32") -> OnnxOp:
    specs = {"table": spec("rows", embed, dtype=dtype), "addresses": spec("B", "S", heads, dtype="int64")}
    return OnnxOp(ENGRAM_LOOKUP, specs)


@cache
def onnx_gate_conv(dilation: int) -> OnnxOp:
    shapes = {"keys": "BSMD", "value": "BSD", "streams": "BSMD", "key_norm": "MD", "stream_norm": "MD"}
    specs = {name: spec(*dims) for name, dims in {**shapes, "conv_norm": "MD", "conv_weight": "Zk"}.items()}
    specs |= {"conv_state": spec("B", "R", "Z"), "positions": spec("B", dtype="int64")}
    return OnnxOp(ENGRAM_GATE_CONV, {**specs, "lengths": spec("B", dtype="int64")}, dilation=dilation, eps=EPS)


def call_torch(reference: Callable[..., Any], inputs: Arrays, *attributes: int | float) -> list[np.ndarray]:
    """The torch reference on copies of `inputs`; it must leave them as they were."""
    tensors = [torch.from_numpy(a.copy()) for a in inputs.values()]
    out = reference(*tensors, *attributes)
    for tensor, array in zip(tensors, inputs.values(), strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array)
    return [t.numpy() for t in (out if isinstance(out, tuple) else (out,))]


class Ops:
    """The three ops of one layer, in torch (any float dtype) or in ONNX Runtime (float32)."""

    def __init__(self, z: Sizes, in_onnx: bool) -> None:
        self.z, self.in_onnx = z, in_onnx

    def hash(self, **inputs: np.ndarray) -> list[np.ndarray]:
        if self.in_onnx:
            return onnx_hash(self.z.pad_id)(inputs)
        return call_torch(engram_hash, inputs, self.z.pad_id)

    def lookup(self, **inputs: np.ndarray) -> np.ndarray:
        if self.in_onnx:
            return onnx_lookup(self.z.addresses, self.z.embed)(inputs)[0]
        return call_torch(engram_lookup, inputs)[0]

    def gate_conv(self, **inputs: np.ndarray) -> list[np.ndarray]:
        if self.in_onnx:
            return onnx_gate_conv(self.z.dilation)(inputs)
        return call_torch(engram_gate_conv, inputs, self.z.dilation, EPS)


def run_chunks(
    ops: Ops, w: Arrays, texts: list[np.ndarray], streams: list[np.ndarray], chunk: int, calls: list[list[int]]
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray, np.ndarray]:
    """Run the layer over right-padded chunks from states full of garbage.

    Returns:
        Live addresses and new streams of each row, the final hash history and the final convolution state.
    """
    z, batch, dtype = ops.z, len(texts), streams[0].dtype
    w = {n: a.astype(dtype) if a.dtype.kind == "f" else a for n, a in w.items()}
    history = np.full((batch, z.grams - 1), 2**62 + 12345)
    conv_state = np.full((batch, z.conv_rows, z.streams * z.width), np.nan, dtype)
    positions = np.zeros(batch, np.int64)
    addresses: list[list[np.ndarray]] = [[] for _ in texts]
    out: list[list[np.ndarray]] = [[] for _ in texts]
    for live in calls:
        lengths = np.array(live)
        ids = np.full((batch, chunk), VOCAB - 1)
        x = np.full((batch, chunk, z.streams, z.width), 7.0, dtype)
        for b, n in enumerate(live):
            ids[b, :n] = texts[b][positions[b] : positions[b] + n]
            x[b, :n] = streams[b][positions[b] : positions[b] + n]
        at = {"positions": positions, "lengths": lengths}
        names = ("lookup", "multipliers", "primes", "offsets")
        found, new_history = ops.hash(input_ids=ids, **{n: w[n] for n in names}, history=history, **at)
        e = ops.lookup(table=w["table"], addresses=found)
        keys = np.einsum("bse,mde->bsmd", e, w["key_proj"])
        norms = {n: w[n] for n in ("key_norm", "stream_norm", "conv_norm", "conv_weight")}
        y, new_state = ops.gate_conv(
            keys=keys, value=e @ w["value_proj"].T, streams=x, **norms, conv_state=conv_state, **at
        )
        assert np.isfinite(y).all()
        for b, n in enumerate(live):
            addresses[b].append(found[b, :n])
            out[b].append(y[b, :n])
            if n == 0:  # an idle row keeps every bit of its state, garbage included
                np.testing.assert_array_equal(new_history[b], history[b])
                np.testing.assert_array_equal(new_state[b], conv_state[b])
        history, conv_state, positions = new_history, new_state, positions + lengths
    return [np.concatenate(a) for a in addresses], [np.concatenate(o) for o in out], history, conv_state


def check_against_reference(
    z: Sizes, chunk: int, calls: list[list[int]], seed: int, in_onnx: bool, dtype: type, tolerance: float
) -> None:
    rng = np.random.default_rng(seed)
    w = make_weights(rng, z)
    totals = np.sum(calls, axis=0)
    texts = [rng.integers(0, VOCAB, n) for n in totals]
    streams = [rng.normal(size=(n, z.streams, z.width)) for n in totals]
    addresses, out, history, conv_state = run_chunks(
        Ops(z, in_onnx), w, texts, [s.astype(dtype) for s in streams], chunk, calls
    )
    for b, text in enumerate(texts):
        np.testing.assert_array_equal(addresses[b], reference_addresses(w, z, text))
        expected, rows = reference_layer(w, z, text, streams[b])
        np.testing.assert_allclose(out[b], expected, rtol=tolerance, atol=tolerance)
        for t in range(max(0, len(text) - (z.grams - 1)), len(text)):
            assert history[b, t % (z.grams - 1)] == w["lookup"][text[t]]
        for t in range(max(0, len(text) - z.conv_rows), len(text)):
            np.testing.assert_allclose(conv_state[b, t % z.conv_rows], rows[t], rtol=tolerance, atol=tolerance)


@settings(deadline=None, max_examples=100)
@given(sizes(), schedules(), seeds)
def test_torch_chunks_match_the_reference(z: Sizes, schedule: tuple[int, list[list[int]]], seed: int) -> None:
    check_against_reference(z, *schedule, seed, in_onnx=False, dtype=np.float64, tolerance=1e-8)


@settings(deadline=None, max_examples=100)
@given(sizes(), schedules(), seeds)
def test_onnx_chunks_match_the_reference(z: Sizes, schedule: tuple[int, list[list[int]]], seed: int) -> None:
    # s(x) multiplies rounding near zero by up to 500.
    check_against_reference(z, *schedule, seed, in_onnx=True, dtype=np.float32, tolerance=2e-3)


@settings(deadline=None, max_examples=25)
@given(sizes(), st.integers(1, 6), st.integers(1, 3), seeds)
def test_onnx_gate_conv_matches_torch_in_float32(z: Sizes, chunk: int, batch: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    w = make_weights(rng, z)
    grid = (batch, chunk, z.streams, z.width)
    inputs = {
        "keys": rng.normal(size=grid),
        "value": rng.normal(size=(batch, chunk, z.width)),
        "streams": rng.normal(size=grid),
        **{n: w[n] for n in ("key_norm", "stream_norm", "conv_norm", "conv_weight")},
        "conv_state": rng.normal(size=(batch, z.conv_rows, z.streams * z.width)),
    }
    inputs = {n: a.astype(np.float32) for n, a in inputs.items()}
    inputs |= {"positions": rng.integers(0, 40, batch), "lengths": rng.integers(0, chunk + 1, batch)}
    got = onnx_gate_conv(z.dilation)(inputs)
    for found, want in zip(got, call_torch(engram_gate_conv, inputs, z.dilation, EPS), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_lookup_concatenates_rows_in_float32(dtype: str) -> None:
    g = torch.Generator().manual_seed(3)
    table = torch.randn(19, 4, generator=g).to(getattr(torch, dtype))
    addresses = torch.randint(0, 19, (2, 5, 3), generator=g)
    expected = torch.stack([table[addresses[..., i]] for i in range(3)], 2).reshape(2, 5, 12).float()
    got = engram_lookup(table, addresses)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=0)

    bits = table.numpy() if dtype == "float32" else table.view(torch.uint16).numpy()
    kind = TensorProto.FLOAT if dtype == "float32" else getattr(TensorProto, dtype.upper())
    feeds = {
        "table": ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, kind),
        "addresses": ort.OrtValue.ortvalue_from_numpy(addresses.numpy()),
    }
    (in_onnx,) = onnx_lookup(3, 4, dtype).session.run_with_ort_values(None, feeds)
    np.testing.assert_array_equal(in_onnx.numpy(), expected.numpy())


def test_torch_ops_are_pure_and_declare_their_shapes() -> None:
    z = Sizes(grams=3, heads=2, embed=2, streams=2, width=4, taps=4, dilation=3, pad_id=1)
    w = {n: torch.from_numpy(a) for n, a in make_weights(np.random.default_rng(0), z).items()}
    w = {n: t.float() if t.is_floating_point() else t for n, t in w.items()}
    ids, positions, lengths = torch.randint(0, VOCAB, (2, 5)), torch.tensor([0, 9]), torch.tensor([5, 3])
    checks = ("test_schema", "test_faketensor")
    weights = [w[n] for n in ("lookup", "multipliers", "primes", "offsets")]
    hash_args = (ids, *weights, torch.zeros(2, 2, dtype=torch.int64), positions, lengths, 1)
    torch.library.opcheck(ENGRAM_HASH.torch_op, hash_args, test_utils=checks)
    addresses, _ = ENGRAM_HASH.torch_op(*hash_args)
    torch.library.opcheck(ENGRAM_LOOKUP.torch_op, (w["table"], addresses), test_utils=checks)
    norms = [w[n] for n in ("key_norm", "stream_norm", "conv_norm", "conv_weight")]
    tensors = (torch.randn(2, 5, 2, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 2, 4), *norms, torch.randn(2, 9, 8))
    torch.library.opcheck(ENGRAM_GATE_CONV.torch_op, (*tensors, positions, lengths, 3, EPS), test_utils=checks)
