"""Quantised weights: codes and scales against their definition, packed bytes against a decoder of the layout."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.targets.quantised_reference import BITS
from v4c.errors import UnsupportedError
from v4c.passes.relax.layouts import Layout, WeightSpec
from v4c.targets.cpu import packing
from v4c.targets.cpu.kernels.packing import PANEL
from v4c.targets.cpu.kernels.quant_packing import (
    quant_pack_gate_up,
    quant_pack_rows,
    quant_packed_gate_up_shape,
    quant_packed_shape,
)
from v4c.targets.quantisation import GROUP, dequantised

SEEDS = st.integers(0, 2**32 - 1)
LARGEST = {8: 127, 4: 8}


def decoded(packed: np.ndarray, n: int, k: int, bits: int) -> np.ndarray:
    """``[n, k]`` float32 of packed panels, weight by weight, from the description of the layout."""
    weight = np.empty((n, k), np.float32)
    for row in range(n):
        panel, output = packed[row // PANEL], row % PANEL
        for column in range(k):
            block = panel[column // GROUP]
            scale = np.frombuffer(block[2 * output : 2 * output + 2].tobytes(), "<f2")[0]
            data, step, byte = block[2 * PANEL :], column % GROUP // 4, column % 4
            if bits == 8:
                code = int(data[step * 128 + output * 4 + byte]) - 128
            else:
                both = int(data[step * 64 + output % 16 * 4 + byte])
                code = (both >> 4 if output >= 16 else both & 15) - 8
            weight[row, column] = np.float32(scale) * np.float32(code)
    return weight


@settings(deadline=None, max_examples=12)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([8, 4]), SEEDS)
def test_packed_bytes_hold_the_dequantised_weight(n: int, k: int, bits: int, seed: int) -> None:
    weight = np.random.default_rng(seed).standard_normal((2, n, k), dtype=np.float32)
    packed = quant_pack_rows(weight, bits)
    assert packed.shape == quant_packed_shape(weight.shape, bits)
    assert packed.dtype == np.uint8
    for part, values in zip(packed, dequantised(weight, bits), strict=True):
        np.testing.assert_array_equal(decoded(part, n, k, bits), values)


@pytest.mark.parametrize("bits", [8, 4])
def test_missing_inputs_and_outputs_have_weight_zero(bits: int) -> None:
    weight = np.random.default_rng(0).standard_normal((33, 35), dtype=np.float32)
    whole = decoded(quant_pack_rows(weight, bits), 2 * PANEL, 2 * GROUP, bits)
    assert not np.any(whole[33:])
    assert not np.any(whole[:, 35:])


@pytest.mark.parametrize("bits", [8, 4])
def test_large_weights_are_packed_chunk_by_chunk(bits: int) -> None:
    weight = np.random.default_rng(1).standard_normal((5 * PANEL + 1, 4096 + 5), dtype=np.float32)
    packed = quant_pack_rows(weight, bits)
    for panel in range(len(packed)):
        rows = slice(panel * PANEL, (panel + 1) * PANEL)
        np.testing.assert_array_equal(packed[panel : panel + 1], quant_pack_rows(weight[rows], bits))


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 40), st.integers(1, 80), st.sampled_from([8, 4]), st.integers(-18, 13), SEEDS)
def test_no_weight_is_off_by_more_than_half_a_step(n: int, k: int, bits: int, exponent: int, seed: int) -> None:
    weight = np.random.default_rng(seed).standard_normal((n, k), dtype=np.float32) * np.float32(2.0**exponent)
    error = np.abs(dequantised(weight, bits) - weight)
    for first in range(0, k, GROUP):
        part = slice(first, first + GROUP)
        largest = np.abs(weight[:, part]).max(-1, keepdims=True)
        # Half a step, but for the ends of the range: a 4-bit scale may cut off the largest values for the others' sake.
        step = largest / LARGEST[bits]
        allowed = 0.51 * step if bits == 8 else 1.5 * step
        assert np.all(error[:, part] <= allowed + 127 * 2.0**-25)


def test_four_bits_are_no_worse_than_q4_0() -> None:
    weight = np.random.default_rng(2).standard_normal((400, GROUP), dtype=np.float32)
    largest = np.take_along_axis(weight, np.abs(weight).argmax(-1)[:, None], -1)
    scale = (largest / -8).astype(np.float16).astype(np.float32)
    q4_0 = np.clip(np.rint(weight / scale), -8, 7) * scale
    error, reference = (((w - weight) ** 2).sum(-1) for w in (dequantised(weight, 4), q4_0))
    assert np.all(error <= reference * 1.001)
    assert error.sum() < 0.92 * reference.sum()


@pytest.mark.parametrize("bits", [8, 4])
def test_extreme_groups(bits: int) -> None:
    weight = np.zeros((5, GROUP), np.float32)
    weight[1] = 60000.0
    weight[2, 7] = -300.0  # alone in its group
    weight[3] = 1e-30  # too small for a float16 scale
    weight[4] = 1e-42  # not even a normal float32
    values = dequantised(weight, bits)
    np.testing.assert_array_equal(values[[0, 3, 4]], 0)
    np.testing.assert_allclose(values[1:3], weight[1:3], rtol=1e-3)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_weights_without_a_scale_are_refused(bits: int, value: float) -> None:
    weight = np.zeros((3, GROUP), np.float32)
    weight[1, 2] = value
    with pytest.raises(ValueError, match=f"int{bits} weights: expected finite numbers"):
        quant_pack_rows(weight, bits)


@pytest.mark.parametrize("bits", [8, 4])
def test_gate_and_up_panels_alternate(bits: int) -> None:
    weight = np.random.default_rng(3).standard_normal((3, 2 * 40, 50), dtype=np.float32)
    packed = quant_pack_gate_up(weight, bits)
    assert packed.shape == quant_packed_gate_up_shape(weight.shape, bits)
    np.testing.assert_array_equal(packed[:, 0::2], quant_pack_rows(weight[:, :40], bits))
    np.testing.assert_array_equal(packed[:, 1::2], quant_pack_rows(weight[:, 40:], bits))


PARTS = (("a", (40, 50)), ("b", (3, 50)))


@pytest.mark.parametrize("dtype", sorted(BITS))
@pytest.mark.parametrize(
    ("layout", "shape", "groups", "parts"),
    [
        (Layout.LINEAR, (43, 50), 1, ()),
        (Layout.LINEAR, (43, 50), 1, PARTS),
        (Layout.LINEAR_KN, (43, 50), 1, ()),
        (Layout.GROUPED_LINEAR, (80, 50), 2, ()),
        (Layout.GATE_UP, (3, 80, 50), 1, ()),
        (Layout.EXPERTS_DOWN, (3, 40, 50), 1, ()),
    ],
)
def test_the_target_packs_every_layout(
    layout: Layout, shape: tuple[int, ...], groups: int, parts: tuple[tuple[str, tuple[int, ...]], ...], dtype: str
) -> None:
    spec = WeightSpec("w", layout, shape, groups, dtype, parts)
    weight = np.random.default_rng(4).standard_normal(shape, dtype=np.float32)
    made = packing.pack(spec, weight)
    described = packing.packed(spec)
    assert (made.shape, str(made.dtype)) == (described.shape, described.dtype)
    bits = BITS[dtype]
    if parts:
        halves = [quant_pack_rows(weight[:40], bits), quant_pack_rows(weight[40:], bits)]
        np.testing.assert_array_equal(made, np.concatenate(halves))
    elif layout == Layout.LINEAR_KN:
        np.testing.assert_array_equal(made, quant_pack_rows(weight.T.copy(), bits))
    elif layout == Layout.GROUPED_LINEAR:
        np.testing.assert_array_equal(made[1], quant_pack_rows(weight[40:], bits))


@pytest.mark.parametrize("layout", [Layout.TABLE, Layout.ROUTER, Layout.PLAIN])
def test_only_products_are_quantised(layout: Layout) -> None:
    spec = WeightSpec("head", layout, (4, 4), 1, "int8")
    with pytest.raises(UnsupportedError, match="weight head: expected the matrix of a product for int8"):
        packing.packed(spec)
