"""The Ascend target by name, what it stores weights as, and what it says where something is missing."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.targets.ascend.requirements import needs_compiler, needs_mlir
from tests.v4c.cli_harness import assert_one_line, invoke
from v4c import targets
from v4c.errors import UnsupportedError
from v4c.passes.pipeline import OPTIONAL
from v4c.passes.relax.layouts import Layout, Storage, WeightSpec
from v4c.targets.ascend import packing, toolchain
from v4c.targets.base import Simulated


@needs_compiler
@needs_mlir
def test_by_name():
    assert targets.find("ascend").name == "ascend-sim:Ascend910B1"
    device = targets.find("ascend:Ascend950PR_9599")
    assert device.name == "ascend-sim:Ascend950PR_9599"
    assert isinstance(device, Simulated)
    assert set(device.without_passes) <= set(OPTIONAL)
    with pytest.raises(UnsupportedError, match="did you mean Ascend910B1"):
        targets.find("ascend:ascend910b1")


def test_the_cpu_has_no_needs_of_its_own():
    assert not isinstance(targets.find("cpu"), Simulated)


@needs_compiler
@needs_mlir
def test_matrices_are_half_precision():
    device = targets.find("ascend")
    assert isinstance(device, Simulated)
    assert device.storage(Storage()) == Storage("float16", "float16")
    assert device.storage(Storage("bfloat16", "bfloat16")) == Storage("bfloat16", "bfloat16")
    with pytest.raises(UnsupportedError, match="int8"):
        device.storage(Storage("float32", "int8"))


def test_says_in_one_line_what_to_install(monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ascendnpuir" else found(name))
    toolchain.find.cache_clear()
    try:
        result = invoke("compile", "--preset", "v4-nano", "--no-weights", "--target", "ascend", "-o", tmp_path / "a")
    finally:
        toolchain.find.cache_clear()
    assert_one_line(result, "bishengir-compile", "pip install 'v4c[ascend]'")
    assert not (tmp_path / "a").exists()


def test_finishing_needs_no_compiler_of_ours():
    code = "import sys, v4c.targets.ascend.finish; print([m for m in ('tvm', 'torch', 'onnx') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.strip() == "[]"


def spec(layout: Layout, shape: tuple[int, ...], dtype: str = "float16", groups: int = 1) -> WeightSpec:
    return WeightSpec("w", layout, shape, groups, dtype)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(list(Layout)), st.integers(1, 4), st.integers(1, 5), st.integers(1, 6))
def test_packing(layout, groups, n, k):
    """Nothing is lost, and the shape is the one that is declared."""
    grouped = layout == Layout.GROUPED_LINEAR
    weight = spec(layout, (groups * n, k), groups=groups if grouped else 1)
    array = np.arange(groups * n * k, dtype=np.float32).reshape(weight.shape)
    packed, declared = packing.pack(weight, array), packing.packed(weight)
    assert (packed.shape, packed.dtype.name) == (declared.shape, declared.dtype)
    assert packed.flags.c_contiguous
    turned = layout in (Layout.LINEAR_KN, Layout.CONVOLUTION)
    assert np.array_equal((packed.T if turned else packed.reshape(weight.shape)).astype(np.float32), array)


@pytest.mark.parametrize("layout", [Layout.LINEAR, Layout.GROUPED_LINEAR, Layout.TABLE, Layout.EXPERTS_DOWN])
def test_slices_one_behind_the_other_are_the_whole(layout):
    weight = spec(layout, (6, 4), groups=3 if layout == Layout.GROUPED_LINEAR else 1)
    array = np.random.default_rng(0).standard_normal((6, 4), np.float32)
    unit = packing.pack_unit(weight)
    assert unit is not None
    parts = [
        packing.pack(WeightSpec("w", layout, (unit, 4), 1, "float16"), array[i : i + unit]) for i in range(0, 6, unit)
    ]
    assert np.array_equal(np.concatenate(parts).reshape(-1), packing.pack(weight, array).reshape(-1))


def test_integers_of_tables_are_int32():
    assert packing.packed(spec(Layout.TABLE, (9, 2), "int64")).dtype == "int32"
    assert packing.packed(spec(Layout.PLAIN, (9,), "int64")).dtype == "int64"
    with pytest.raises(UnsupportedError, match="weight w: expected magnitudes of at most"):
        packing.pack(spec(Layout.TABLE, (1,), "int64"), np.array([2**33]))


def test_a_number_that_float16_does_not_hold():
    with pytest.raises(UnsupportedError, match="65504 for float16, found 70000"):
        packing.pack(spec(Layout.LINEAR, (1, 2)), np.array([[1, -70000]], np.float32))
    stored = packing.pack(spec(Layout.LINEAR, (1, 2), "bfloat16"), np.array([[1, -70000]], np.float32))
    assert stored.dtype == ml_dtypes.bfloat16
