"""RMSNorm, rotary embedding, SwiGLU and sums, against the ops' references."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.targets.ascend.chain import Draw, error, gate, limits, reference, run
from tests.targets.ascend.requirements import DEVICES, needs_compiler, needs_mlir
from v4c.custom_ops.clamped_swiglu import clamped_swiglu
from v4c.custom_ops.trailing_rope import trailing_rope as rope_reference
from v4c.errors import UnsupportedError
from v4c.targets.ascend.kernels.norms import rms_norm
from v4c.targets.ascend.kernels.rope import rope_angles, trailing_rope
from v4c.targets.ascend.kernels.swiglu import add, swiglu

pytestmark = [needs_mlir]
PARTS = 16


def normed(x, weight=None):
    wide = x.astype(np.float64)
    wide = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + 1e-6)
    return wide if weight is None else wide * weight


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 40), st.sampled_from([48, 512]), st.booleans())
def test_rms_norm(rows, width, weighted):
    draw = Draw(rows)
    buffers = {"x": draw(rows, width, dtype="float16", scale=3)} | ({"weight": draw(width)} if weighted else {})
    y = run([rms_norm(width, 1e-6, limits(), weighted=weighted)], {"rows": rows}, buffers)["y"]
    assert error(y, normed(buffers["x"], buffers.get("weight"))) < 1e-3


def test_a_row_that_does_not_fit_is_refused():
    with pytest.raises(UnsupportedError, match=r"^Ascend910B1: a row of 65536 elements needs \d+ bytes"):
        rms_norm(65536, 1e-6, limits())


def frequencies(dims, theta=160000.0):
    return (theta ** -(np.arange(dims // 2) / (dims // 2))).astype(np.float32)


@pytest.mark.parametrize("positions", [[0, 77], [1000, 1048000]])
def test_angles_up_to_a_million_positions(positions):
    """Of the float32 angle that the reference takes the cosine of, to a few units in the last place."""
    where, inv_freq = np.array(positions, np.int32), frequencies(PARTS)
    after = run([rope_angles(PARTS, limits())], {"batch": 2, "chunk": 75}, {"positions": where, "inv_freq": inv_freq})
    angle = ((where[:, None] + np.arange(75)).astype(np.float32)[..., None] * inv_freq).astype(np.float64)
    assert np.abs(after["cosine"] - np.cos(angle)).max() < 4e-7
    assert np.abs(after["sine"] - np.sin(angle)).max() < 4e-7


@pytest.mark.parametrize(("heads", "sign"), [(1, 1.0), (8, -1.0), (6, 1.0)])
def test_trailing_rope(heads, sign):
    draw, batch, chunk, width = Draw(heads), 2, 35, 64
    x, positions = draw(batch, chunk, heads, width, dtype="float16"), np.array([3, 4000], np.int32)
    angles = rope_angles(PARTS, limits())
    tables = run([angles], {"batch": batch, "chunk": chunk}, {"positions": positions, "inv_freq": frequencies(PARTS)})
    rows = batch * chunk
    buffers = {n: tables[n].reshape(rows, -1) for n in ("cosine", "sine")} | {"x": x.reshape(rows, heads, width)}
    y = run([trailing_rope(heads, width, PARTS, sign, limits())], {"rows": rows}, buffers)["y"]
    expected = rope_reference(reference(x), reference(positions), torch.from_numpy(frequencies(PARTS)), sign)
    assert error(y, expected.reshape(y.shape)) < 1e-3
    assert np.array_equal(y[..., : width - PARTS], buffers["x"][..., : width - PARTS])


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 20), st.just(72), st.booleans())
def test_swiglu(rows, width, joined):
    draw = Draw(rows)
    gate_, up = (draw(rows, width, dtype="float16", scale=9) for _ in range(2))
    gate_[0, :2] = 60000, -60000
    buffers = {"gate": np.concatenate([gate_, up], 1)} if joined else {"gate": gate_, "up": up}
    y = run([swiglu(width, 10.0, limits(), joined=joined)], {"rows": rows}, buffers)["y"]
    assert error(y, clamped_swiglu(reference(gate_), reference(up), 10.0)) < 1e-3


def test_add():
    draw = Draw()
    buffers = {"left": draw(9, 100, dtype="float16"), "right": draw(9, 100, dtype="float16")}
    y = run([add(100, limits())], {"rows": 9}, buffers)["y"]
    assert np.array_equal(y, buffers["left"] + buffers["right"])


@needs_compiler
@pytest.mark.parametrize("device", DEVICES)
def test_gates(device):
    at, draw = limits(device), Draw()
    gate([rms_norm(128, 1e-6, at)], device, {"rows": 21}, {"x": draw(21, 128, dtype="float16"), "weight": draw(128)})
    scalars = {"batch": 1, "chunk": 5, "rows": 5}
    buffers = {"positions": np.array([1000], np.int32), "inv_freq": frequencies(PARTS)}
    gate([rope_angles(PARTS, at)], device, scalars, buffers)
    tables = run([rope_angles(PARTS, at)], scalars, buffers)
    buffers = {n: tables[n][0] for n in ("cosine", "sine")} | {"x": draw(5, 8, 64, dtype="float16")}
    gate([trailing_rope(8, 64, PARTS, 1.0, at)], device, scalars, buffers)
    both = {"gate": draw(5, 128, dtype="float16"), "left": draw(5, 128, dtype="float16")}
    both["right"] = both["left"]
    gate([swiglu(64, 10.0, at, joined=True), add(128, at, names=("left", "right", "sum"))], device, scalars, both)
