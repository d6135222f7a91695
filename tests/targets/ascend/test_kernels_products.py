"""Products, whole and block-diagonal, and in FP8, against NumPy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.targets.ascend.chain import Draw, accept, error, gate, limits, run
from tests.targets.ascend.requirements import DEVICES, needs_compiler, needs_mlir
from v4c.errors import UnsupportedError
from v4c.targets.ascend.kernels.products import FP8, linear, linear_fp8, quantise_rows

pytestmark = [needs_mlir]
PR = "Ascend950PR_9599"


def product(x, weight):
    return np.einsum("...k,...nk->...n", x.astype(np.float64), weight.astype(np.float64))


def draw_product(rows, n, k, dtype="float16", groups=()):
    draw = Draw(rows)
    return {"x": draw(rows, *groups, k, dtype=dtype), "weight": draw(*groups, n, k, dtype=dtype)}


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 150), st.sampled_from([(40, 72, None), (130, 48, 1), (16, 16, 40)]))
def test_any_number_of_rows(rows, kind):
    n, k, expected_rows = kind
    program = linear(n, k, limits(), out="float32", rows=expected_rows)
    buffers = draw_product(rows, n, k)
    y = run([program], {"rows": rows}, buffers)["y"]
    assert error(y, product(**buffers)) < 1e-5


@pytest.mark.parametrize(("dtype", "out", "tolerance"), [
    ("float16", "float16", 1e-3), ("bfloat16", "bfloat16", 8e-3), ("float32", "float32", 1e-6),
])  # fmt: skip
def test_dtypes(dtype, out, tolerance):
    buffers = draw_product(19, 40, 72, dtype)
    y = run([linear(40, 72, limits(), dtype=dtype, out=out)], {"rows": 19}, buffers)["y"]
    assert y.dtype == np.dtype(out)
    assert error(y, product(**buffers)) < tolerance


def test_groups_do_not_mix():
    buffers = draw_product(5, 40, 72, groups=(3,))
    y = run([linear(40, 72, limits(), groups=3, out="float32")], {"rows": 5}, buffers)["y"]
    expected = np.einsum("rgk,gnk->rgn", *(buffers[n].astype(np.float64) for n in ("x", "weight")))
    assert error(y, expected) < 1e-5


def test_fp8_with_a_scale_per_row_and_per_block():
    draw, rows, n, k = Draw(1), 21, 200, 256
    x = draw(rows, k, dtype="float16", scale=30)
    weight, scale = draw(n, k).astype(FP8), np.exp2(draw.whole(-6, 6, 2, 2)).astype(np.float32)
    programs = [quantise_rows(k, limits(PR)), linear_fp8(n, k, limits(PR), out="float32")]
    after = run(programs[:1], {"rows": rows}, {"x": x})
    assert error(after["quantised"].astype(np.float32) * after["scale"][:, None], x) < 0.04
    given_to = {"x": after["quantised"], "x_scale": after["scale"], "weight": weight, "weight_scale": scale}
    y = run(programs[1:], {"rows": rows}, given_to)["y"]
    wide = weight.astype(np.float64) * np.repeat(np.repeat(scale, 128, 0)[:n], 128, 1)
    assert error(y, (after["quantised"].astype(np.float64) * after["scale"][:, None]) @ wide.T) < 1e-5


def test_fp8_is_refused_where_the_cube_has_none():
    for make in (lambda at: linear(64, 64, at, dtype=FP8), lambda at: linear_fp8(64, 128, at),
                 lambda at: quantise_rows(64, at)):  # fmt: skip
        with pytest.raises(UnsupportedError, match=r"^Ascend910B1: "):
            make(limits())
    with pytest.raises(UnsupportedError, match="multiples of 128, found 72"):
        linear_fp8(64, 72, limits(PR))


@needs_compiler
@pytest.mark.parametrize("device", DEVICES)
def test_gates(device):
    buffers = draw_product(19, 40, 72)
    gate([linear(40, 72, limits(device))], device, {"rows": 19}, buffers)
    gate([linear(40, 72, limits(device), groups=3, rows=1)], device, {"rows": 1}, draw_product(1, 40, 72, groups=(3,)))


@needs_compiler
def test_fp8_is_accepted_on_the_950():
    accept(
        [linear_fp8(300, 256, limits(PR)), quantise_rows(256, limits(PR)), linear(128, 128, limits(PR), dtype=FP8)], PR
    )
