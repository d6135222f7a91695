"""FP8, FP4 and E8M0: every code against `ml_dtypes`, and blocks of every ragged shape against plain arithmetic."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4c.frontend.block_formats import E2M1, E4M3, E8M0, FP4, FP8, BlockFormat, decode, encode

ALL = np.arange(256, dtype=np.uint8)
BOTH = pytest.mark.parametrize("form", [FP8, FP4], ids=lambda form: form.name)


def test_every_code_is_that_of_ml_dtypes() -> None:
    assert np.array_equal(E4M3, ALL.view(ml_dtypes.float8_e4m3fn).astype(np.float32), equal_nan=True)
    assert np.array_equal(E8M0, ALL.view(ml_dtypes.float8_e8m0fnu).astype(np.float32), equal_nan=True)
    assert np.array_equal(E2M1, ALL[:16].view(ml_dtypes.float4_e2m1fn).astype(np.float32))
    for table in (E4M3, E2M1):  # zeros have signs too
        half = len(table) // 2
        assert np.signbit(table[half:][np.isfinite(table[half:])]).all()
        assert not np.signbit(table[:half][np.isfinite(table[:half])]).any()


def test_edges_of_the_formats() -> None:
    """Values the specification names."""
    assert (E4M3[0x7E], E4M3[0x01], E4M3[0x08]) == (448, 2.0**-9, 2.0**-6)
    assert (E2M1[7], E2M1[1]) == (6, 0.5)
    assert (E8M0[0], E8M0[127], E8M0[254]) == (np.float32(2.0**-127), 1, 2.0**127)
    assert E8M0[0] != 0  # a subnormal, kept
    assert [int(code) for code in np.flatnonzero(np.isnan(E4M3))] == [0x7F, 0xFF]
    assert np.flatnonzero(np.isnan(E8M0)) == 255


@pytest.mark.parametrize("scale", [0, 1, 126, 127, 128, 200, 254])
def test_every_code_at_edge_scales(scale: int) -> None:
    """All codes under one scale, against `ml_dtypes` in float64, rounded once."""
    with np.errstate(over="ignore"):
        wide = 2.0 ** (scale - 127)
        wanted = (ALL.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * wide).astype(np.float32)
        found = decode(FP8, ALL[None], np.full((1, 2), E8M0[scale]), 256)
        assert np.array_equal(found[0], wanted, equal_nan=True)
        halves = np.stack([ALL & 15, ALL >> 4], axis=1).reshape(-1)
        wanted = (halves.view(ml_dtypes.float4_e2m1fn).astype(np.float64) * wide).astype(np.float32)
        found = decode(FP4, ALL[None], np.full((1, 16), E8M0[scale]), 512)
        assert np.array_equal(found[0], wanted)


def plain(form: BlockFormat, codes: np.ndarray, scales: np.ndarray, columns: int) -> np.ndarray:
    """Element by element, with `ml_dtypes` for the codes."""
    if form is FP4:
        halves = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)
        values = halves.view(ml_dtypes.float4_e2m1fn).astype(np.float32)[:, :columns]
    else:
        values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    wide = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    return np.array(
        [
            [values[r, c] * wide[r // form.block_rows, c // form.block_columns] for c in range(columns)]
            for r in range(len(codes))
        ],
        np.float32,
    ).reshape(len(codes), columns)


@BOTH
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_ragged_shapes_and_slices(form: BlockFormat, data: st.DataObject) -> None:
    """Random codes of any shape, whole and from any row to any other."""
    rows, columns = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 150))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    codes = random.integers(0, 255, form.code_shape(rows, columns), np.uint8)
    if form is FP8:
        codes = np.where(codes & 0x7F == 0x7F, 0, codes).astype(np.uint8)
    scales = random.integers(100, 150, form.scale_shape(rows, columns), np.uint8)
    wanted = plain(form, codes, scales, columns)
    assert np.array_equal(decode(form, codes, E8M0[scales], columns), wanted)
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    blocks = scales[start // form.block_rows : -(-stop // form.block_rows)]
    found = decode(form, codes[start:stop], E8M0[blocks], columns, start)
    assert np.array_equal(found, wanted[start:stop])


@BOTH
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_encoding_is_the_nearest_code(form: BlockFormat, data: st.DataObject) -> None:
    """Power-of-two scales that are as small as they can be; every value rounded to nearest; what is coded stays."""
    rows, columns = data.draw(st.integers(1, 140)), data.draw(st.integers(1, 140))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    magnitude = 2.0 ** data.draw(st.integers(-60, 60))
    values = (random.standard_normal((rows, columns)) * magnitude).astype(np.float32)
    values[random.random(values.shape) < 0.1] = 0
    codes, scales = encode(form, values)
    assert codes.shape == form.code_shape(rows, columns)
    assert scales.shape == form.scale_shape(rows, columns)
    back = decode(form, codes, E8M0[scales], columns)
    table = np.unique(E4M3[np.isfinite(E4M3)] if form is FP8 else E2M1).astype(np.float64)
    wide = np.repeat(np.repeat(E8M0[scales], form.block_rows, 0), form.block_columns, 1)[:rows, :columns]
    scaled = values.astype(np.float64) / wide
    nearest = np.abs(scaled[..., None] - table).min(axis=-1)
    assert np.array_equal(np.abs(scaled - back / wide), nearest)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = values[i * form.block_rows :, j * form.block_columns :]
            largest = float(np.abs(block[: form.block_rows, : form.block_columns]).max())
            assert largest <= form.largest * float(E8M0[scales[i, j]])
            assert largest == 0 or largest > form.largest * float(E8M0[scales[i, j] - 1])
    again = encode(form, back)
    assert np.array_equal(decode(form, again[0], E8M0[again[1]], columns), back)


@BOTH
def test_ties_go_to_the_even_code(form: BlockFormat) -> None:
    table = E4M3[:0x7F] if form is FP8 else E2M1[:8]
    middles = (table[:-1].astype(np.float64) + table[1:]) / 2
    for start in range(0, len(middles), 31):
        # The largest value, behind them in the same block, fixes the scale at 1.
        row = np.append(middles[start : start + 31], form.largest)[None].astype(np.float32)
        codes, scales = encode(form, row)
        assert scales[0, 0] == 127
        single = codes[0] if form is FP8 else np.stack([codes[0] & 15, codes[0] >> 4], axis=1).reshape(-1)
        below = np.arange(start, start + row.size - 1)
        assert list(single[: row.size - 1]) == [code + code % 2 for code in below]


def test_extreme_values_keep_within_the_format() -> None:
    """Zeros, subnormals and the largest floats: the scale stays a number."""
    for form in (FP8, FP4):
        for value in (0.0, 1e-45, 2.0**-126, 1e38):
            codes, scales = encode(form, np.full((2, 3), value, np.float32))
            assert scales.max() < 255
            back = decode(form, codes, E8M0[scales], 3)
            assert np.isfinite(back).all()
            if value in (0.0, 1e38):
                assert np.allclose(back, value, rtol=0.2)
