"""Narrow cache rows: bytes against `ml_dtypes`, and the kernels that write and read them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm.script import tirx as T

import v4c
from tests.targets import narrow_rows
from tests.targets.cpu_harness import compiled, run
from tests.targets.test_cpu_attention import RATIO, TOP_K, Config, attend_reference, sequence
from v4c.frontend.estimate import row_bytes
from v4c.frontend.model.cache_rounding import rounded_index_row, rounded_row
from v4c.frontend.presets import PRESETS
from v4c.targets.cpu.kernels.attention import (
    compressed_sparse_attention,
    heavily_compressed_attention,
    sliding_window_attention,
)
from v4c.targets.cpu.kernels.compress import kv_compress, kv_compress_pair
from v4c.targets.cpu.kernels.index import lightning_index
from v4c.targets.cpu.kernels.row_formats import cache_rows, fp4_bytes, fp8_bytes, row_format

FORMATS = [(512, "fp8:64"), (24, "fp8:8"), (72, "fp8:6"), (64, "bfloat16"), (128, "fp4"), (16, "fp4"), (40, "fp4")]
SEEDS = st.integers(0, 2**32 - 1)


def writer(width: int, name: str) -> Any:
    """A kernel that writes ``[n, width]`` into a cache ``[1, n, columns]``."""
    stored = cache_rows(width, name)

    @T.prim_func(private=True, s_tir=True)
    def write(x_: T.handle, cache_: T.handle):
        n = T.int64()
        x = T.match_buffer(x_, (n, T.int64(width)), "float32")
        cache = T.match_buffer(cache_, (T.int64(1), n, T.int64(stored.columns)), stored.dtype)
        for at in range(n):
            stored.write(cache, T.int64(0), at, x, at)

    return write


def reader(width: int, name: str) -> Any:
    """The reverse of `writer`, in the format's own order."""
    stored = cache_rows(width, name)

    @T.prim_func(private=True, s_tir=True)
    def read(cache_: T.handle, x_: T.handle):
        n = T.int64()
        cache = T.match_buffer(cache_, (T.int64(1), n, T.int64(stored.columns)), stored.dtype)
        x = T.match_buffer(x_, (n, T.int64(width)), "float32")
        for at in range(n):
            stored.read(x, at, cache, T.int64(0), at)

    return read


def finite_reader(width: int, name: str) -> Any:
    """A kernel that says 1 if all elements of a cache ``[1, n, columns]`` are finite, else 0."""
    stored = cache_rows(width, name)

    @T.prim_func(private=True, s_tir=True)
    def read(cache_: T.handle, finite_: T.handle):
        n = T.int64()
        cache = T.match_buffer(cache_, (T.int64(1), n, T.int64(stored.columns)), stored.dtype)
        finite = T.match_buffer(finite_, (T.int64(1),), "int64")
        line = T.alloc_buffer((T.int64(1), T.int64(width)), "float32")
        finite[0] = T.int64(1)
        for at in range(n):
            stored.read(line, T.int64(0), cache, T.int64(0), at)
            for d in range(T.int64(width)):
                if T.bitwise_and(T.reinterpret("int32", line[0, d]), T.int32(0x7F800000)) == T.int32(0x7F800000):
                    finite[0] = T.int64(0)

    return read


def write(x: np.ndarray, name: str) -> np.ndarray:
    cache = narrow_rows.stored(np.zeros_like(x), name)[None]
    return run(compiled(writer, x.shape[1], name), [x, cache], []).inputs[1][0]


def read(cache: np.ndarray, width: int, name: str) -> np.ndarray:
    out = run(compiled(reader, width, name), [cache[None]], [((len(cache), width), "float32")]).outputs[0]
    stored: Any = cache_rows(width, name)
    return out[:, [int(stored.place(T.int64(d))) for d in range(width)]] if name == "fp4" else out


def awkward(rows: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of every size, with zeros, ties, largest codes and tiny numbers among them."""
    x = rng.standard_normal((rows, width)) * 2.0 ** rng.integers(-60, 60, (rows, 1))
    x = np.where(rng.random(x.shape) < 0.3, np.round(x / np.abs(x).max() * 64) / 64 * 448, x)
    x[rng.random(x.shape) < 0.1] = 0
    x[0] = 0
    x[-1] *= 2.0**-50
    return x.astype(np.float32)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(FORMATS), SEEDS)
def test_rows_are_the_published_bytes(form: tuple[int, str], seed: int) -> None:
    width, name = form
    x = awkward(6, width, np.random.default_rng(seed))
    cache = write(x, name)
    np.testing.assert_array_equal(cache.view(np.uint8), narrow_rows.stored(x, name).view(np.uint8))
    back = read(cache, width, name)
    np.testing.assert_array_equal(back, narrow_rows.values(cache, width, name))
    np.testing.assert_array_equal(read(write(back, name), width, name), back)
    kv, rope = ("bf16", 0) if name == "bfloat16" else ("fp8", int(name.partition(":")[2] or 0))
    torch_rows = torch.from_numpy(x)
    rounded = rounded_index_row(torch_rows, "fp8") if name == "fp4" else rounded_row(torch_rows, kv, rope)
    np.testing.assert_array_equal(rounded.numpy(), back)


def test_every_code_is_read_and_written_back() -> None:
    codes = np.array([c for c in range(256) if c & 0x7F != 0x7F], np.uint8)
    for start in range(0, len(codes), 63):  # with 448 among each group, its scale is 1
        group = np.append(codes[start : start + 63], 0x7E).astype(np.uint8)
        row = np.concatenate([np.resize(group, 64), [127], np.zeros(7, np.uint8)]).astype(np.uint8)[None]
        values = read(row, 64, "fp8:0")
        expected = row[0, :64].view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        np.testing.assert_array_equal(values[0], expected)
        np.testing.assert_array_equal(write(values, "fp8:0"), row)
    row = np.append([low | ((low + 1) % 16) << 4 for low in range(16)], 127).astype(np.uint8)[None]
    np.testing.assert_array_equal(read(row, 32, "fp4"), narrow_rows.values(row, 32, "fp4"))
    np.testing.assert_array_equal(write(read(row, 32, "fp4"), "fp4"), row)


@pytest.mark.parametrize("name", ["fp8:8", "fp4", "bfloat16"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_stays_none(name: str, wrong: float) -> None:
    x = np.ones((2, 40), np.float32)
    x[0, 3] = wrong
    x[1, 39] = wrong  # one of the rotated dims of FP8 rows
    for at, cache in enumerate(write(x, name)):
        finite = run(compiled(finite_reader, 40, name), [cache[None, None]], [((1,), "int64")]).outputs[0]
        assert finite == 0, at
    ones = write(np.ones_like(x), name)[None]
    assert run(compiled(finite_reader, 40, name), [ones], [((1,), "int64")]).outputs[0] == 1


def test_sizes_agree_with_the_estimator() -> None:
    for config in PRESETS.values():
        row, index_row = row_bytes(config, "fp8")
        assert fp8_bytes(config.head_dim, config.qk_rope_head_dim) == row
        assert fp4_bytes(config.index_head_dim) == index_row
        assert row_format(config.head_dim, row, "uint8") == f"fp8:{config.qk_rope_head_dim}"
        assert row_format(config.index_head_dim, index_row, "uint8") == "fp4"
    assert (fp8_bytes(512, 64), fp4_bytes(128)) == (584, 68)


def test_rows_of_no_layout_are_refused() -> None:
    with pytest.raises(v4c.UnsupportedError, match="cache rows of 64 dims in 5 bytes: expected one layout, found 0"):
        row_format(64, 5, "uint8")
    with pytest.raises(v4c.UnsupportedError, match="FP4 rows: expected an even number of dims, found 7"):
        cache_rows(7, "fp4")


def attention(kind: str, config: Config, name: str) -> Any:
    heads, width, window = config
    if kind == "sliding":
        return compiled(sliding_window_attention, heads, width, window, config.scale, 0, name)
    if kind == "csa":
        return compiled(compressed_sparse_attention, heads, width, window, TOP_K, config.scale, 0, name)
    return compiled(heavily_compressed_attention, heads, width, window, RATIO, config.scale, 0, name)


@settings(deadline=None, max_examples=15)
@given(
    kind=st.sampled_from(["sliding", "csa", "hca"]),
    form=st.sampled_from([(Config(2, 24, 8), "fp8:8"), (Config(12, 40, 3), "bfloat16")]),
    cuts=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    seed=SEEDS,
)  # fmt: skip
def test_attention_reads_rounded_rows_however_the_text_is_cut(
    kind: str, form: tuple[Config, str], cuts: list[int], seed: int
) -> None:
    config, name = form
    rng = np.random.default_rng(seed)
    seq = sequence(config, 1, sum(cuts), rng)
    rows = narrow_rows.stored(seq.rows, name)
    own = narrow_rows.stored(seq.kv, name)
    kept = seq._replace(
        kv=narrow_rows.values(own, config.width, name), rows=narrow_rows.values(rows, config.width, name)
    )
    window = np.resize(own[:, :1], (1, config.window, own.shape[2]))
    window.view(np.uint8)[...] = 0xFF  # NaN: what was never written may not be read
    start = 0
    for n in cuts:
        taken = slice(start, start + n)
        compressed = {"sliding": [], "csa": [rows, seq.indices[:, taken]], "hca": [rows]}[kind]
        own_rows = [seq.q[:, taken], seq.kv[:, taken]]
        arguments = [*own_rows, window, *compressed, seq.sinks, np.array([start]), np.array([n])]
        result = run(attention(kind, config, name), arguments, [(seq.q[:, taken].shape, "float32")])
        window = result.inputs[2]
        for j in range(n):
            expected = attend_reference(kind, config, kept, 0, start + j)
            np.testing.assert_allclose(result.outputs[0][0, j], expected, rtol=1e-5, atol=2e-6)
        start += n
        for t in range(max(0, start - config.window), start):
            np.testing.assert_array_equal(window[0, t % config.window].view(np.uint8), own[0, t].view(np.uint8))


@settings(deadline=None, max_examples=10)
@given(form=st.sampled_from([("bfloat16", "bfloat16"), ("fp8:8", "fp4")]), chunk=st.integers(1, 20), seed=SEEDS)
def test_compressors_write_the_rounded_rows(form: tuple[str, str], chunk: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    width, index_width, rotary, ratio = 40, 16, 8, 4

    def state(columns: int, row: int, name: str) -> list[np.ndarray]:
        new = [rng.standard_normal((1, chunk, 2 * columns)).astype(np.float32) for _ in range(2)]
        bias = rng.standard_normal((ratio, 2 * columns)).astype(np.float32)
        rings = [np.zeros((1, 2 * ratio, 2 * columns), np.float32) for _ in range(2)]
        cache = narrow_rows.stored(np.zeros((1, 6, row), np.float32), name)
        return [*new, bias, rng.standard_normal(row).astype(np.float32), *rings, cache]

    plain = [*state(width, width, "float32"), *state(index_width, index_width, "float32")]
    shared = [np.full(rotary // 2, 0.1, np.float32), np.array([0]), np.array([chunk])]
    narrow = list(plain)
    narrow[6], narrow[13] = (narrow_rows.stored(plain[at], name) for at, name in zip((6, 13), form, strict=True))
    sizes = (2 * width, width, 2 * index_width, index_width, rotary, ratio, 1e-6)
    expected = run(compiled(kv_compress_pair, *sizes), [*plain, *shared], []).inputs
    found = run(compiled(kv_compress_pair, *sizes, *form), [*narrow, *shared], []).inputs
    for at, name in zip((6, 13), form, strict=True):
        done = chunk // ratio
        wanted = narrow_rows.stored(expected[at][:, :done], name)
        if done:
            np.testing.assert_array_equal(found[at][:, :done].view(np.uint8), wanted.view(np.uint8))
    for at in (4, 5, 11, 12):
        np.testing.assert_array_equal(found[at], expected[at])
    kv, gate, bias, norm, *rings, rows = narrow[:7]
    alone = run(
        compiled(kv_compress, 2 * width, width, rotary, ratio, 1e-6, form[0]),
        [kv, gate, bias, norm, shared[0], *rings, rows, *shared[1:]], [],
    ).inputs  # fmt: skip
    np.testing.assert_array_equal(alone[7].view(np.uint8), found[6].view(np.uint8))


@settings(deadline=None, max_examples=20)
@given(
    form=st.sampled_from([("bfloat16", 24, 3, 8), ("fp4", 16, 16, 8), ("fp4", 40, 3, 0), ("fp4", 128, 64, 8)]),
    total=st.integers(1, 300),
    seed=SEEDS,
)
def test_the_indexer_scores_rounded_rows(form: tuple[str, int, int, int], total: int, seed: int) -> None:
    (name, width, heads, rotary), top_k, chunk = form, 20, min(total, 7)
    rng = np.random.default_rng(seed)
    # Small integers, and rotation by no angle: sums are exact in any order.
    q = rng.integers(-3, 4, (1, chunk, heads, width)).astype(np.float32)
    weights = rng.integers(-2, 5, (1, chunk, heads)).astype(np.float32)
    cache = narrow_rows.stored(rng.integers(-9, 10, (1, max(1, total // RATIO), width)).astype(np.float32), name)
    where = [np.array([total - chunk]), np.array([chunk])]
    angles = [np.zeros(rotary // 2, np.float32)] if rotary else []
    rows = narrow_rows.values(cache, width, name)
    results = []
    for form_name, held in (("float32", rows), (name, cache)):
        kernel = compiled(lightning_index, heads, width, RATIO, top_k, rotary, form_name)
        results.append(run(kernel, [q, weights, held, *where, *angles], [((1, chunk, top_k), "int64")]).outputs[0])
    np.testing.assert_array_equal(results[0], results[1])
