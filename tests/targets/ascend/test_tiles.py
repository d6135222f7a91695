"""Tile sizes: inside the capacities, whatever the sizes."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from v4c.errors import UnsupportedError
from v4c.targets.ascend.devices import DEVICES
from v4c.targets.ascend.emit import BYTES
from v4c.targets.ascend.tiles import column_tile, power_below, product_tiles, row_tile

LIMITS = [DEVICES[name].limits for name in ("Ascend910B1", "Ascend950PR_9599")]
devices = st.sampled_from(LIMITS)


@given(devices, st.integers(1, 200_000), st.integers(1, 20_000), st.sampled_from(["float16", "bfloat16", "float32"]),
       st.one_of(st.none(), st.integers(1, 5000)))  # fmt: skip
def test_product_tiles(limits, n, k, dtype, rows):
    tiles = product_tiles(limits, n, k, dtype, rows)
    assert 4 * tiles.m * tiles.n <= limits.l0c
    assert 2 * (tiles.m + tiles.n) * tiles.k * BYTES[dtype] <= limits.l1
    assert tiles.k <= max(k, 16)
    assert tiles.n <= n + 15
    if rows is not None:
        assert tiles.m <= max(16, 2 * rows)


def test_a_decode_product_is_spread_over_the_cores():
    for limits in LIMITS:
        tiles = product_tiles(limits, 4096, 4096, "float16", rows=1)
        assert -(-4096 // tiles.n) >= limits.cube_cores


@given(devices, st.integers(1, 6000), st.floats(1, 6))
def test_row_tile(limits, width, live):
    tile = row_tile(limits, width, live)
    assert tile & (tile - 1) == 0
    assert 1 <= tile <= 64
    assert tile * live * 4 * width <= limits.unified_buffer


@given(devices, st.integers(1, 100_000), st.integers(1, 64), st.floats(1, 9))
def test_column_tile(limits, width, rows, live):
    tile = column_tile(limits, width, rows, live)
    assert 1 <= tile <= width
    assert tile * rows * live * 4 <= limits.unified_buffer


def test_smaller_memories_give_smaller_tiles_and_then_a_refusal():
    small = dataclasses.replace(LIMITS[0], unified_buffer=8192, l0c=8192)
    assert row_tile(small, 512, 3) < row_tile(LIMITS[0], 512, 3)
    assert product_tiles(small, 4096, 4096, "float16").n < product_tiles(LIMITS[0], 4096, 4096, "float16").n
    with pytest.raises(
        UnsupportedError, match=r"^Ascend910B1: a row of 4096 elements needs 61440 bytes .* at most 8192"
    ):
        row_tile(small, 4096, 3)
    with pytest.raises(UnsupportedError, match="products of int64: expected one of bfloat16, float16"):
        product_tiles(LIMITS[0], 64, 64, "int64")


@given(st.floats(0, 1e6), st.integers(1, 1 << 20))
def test_power_below(x, most):
    power = power_below(x, most)
    assert power & (power - 1) == 0
    assert power == 1 or power <= min(x, most)
    assert 2 * power > min(x, most)
