"""Tile programs on x86, against NumPy in float64."""

import dataclasses

import ml_dtypes  # noqa: F401
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.targets.ascend import programs
from tests.targets.ascend.programs import Role, Work, argument, axis, constants, load, store
from tests.targets.ascend.requirements import needs_mlir
from v4c.targets.ascend import tile_simulator
from v4c.targets.ascend.tile_simulator import SimulationError, simulate, tile_kernel
from v4c.targets.ascend.toolchain import ToolMissing

pytestmark = needs_mlir


def normal(seed, shape, dtype):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def relative(found, expected):
    return np.abs(found.astype(np.float64) - expected).max() / np.abs(expected).max()


@settings(max_examples=4, deadline=None)
@given(
    blocks=st.integers(1, 4),
    tile=st.integers(1, 9),
    width=st.integers(1, 12).map(lambda n: 16 * n),
    dtype=st.sampled_from(["float16", "bfloat16"]),
    seed=st.integers(0, 99),
)
def test_rms_norm(blocks, tile, width, dtype, seed):
    x, w = normal(seed, (blocks * tile, width), dtype), normal(seed + 1, (width,), dtype)
    y = simulate(programs.rms_norm(blocks * tile, width, tile, dtype), {"x_in": x, "w_in": w})["y_out"]
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-6) * w.astype(np.float64)
    assert relative(y, expected) < (1e-3 if dtype == "float16" else 8e-3)


@settings(max_examples=4, deadline=None)
@given(
    blocks=st.tuples(*[st.integers(1, 3)] * 3),
    tile=st.tuples(*[st.integers(1, 3).map(lambda n: 16 * n)] * 3),
    dtype=st.sampled_from(["float16", "bfloat16", "float32", "float8_e4m3fn"]),
    seed=st.integers(0, 99),
)
def test_product(blocks, tile, dtype, seed):
    (m, n, k), (tm, tn, tk) = (b * t for b, t in zip(blocks, tile, strict=True)), tile
    a, b = normal(seed, (m, k), dtype), normal(seed + 1, (k, n), dtype)
    c = simulate(programs.product(m, k, n, (tm, tn, tk), dtype), {"a": a, "b": b})["c"]
    assert relative(c, a.astype(np.float64) @ b.astype(np.float64)) < 1e-5


@settings(max_examples=6, deadline=None)
@given(n=st.integers(1, 1000))
def test_tail(n):
    x = normal(n, n, np.float32)
    y = simulate(programs.exponential(), {"x": x}, {"n": n})["y"]
    assert relative(y, np.exp(x.astype(np.float64))) < 1e-6


def test_gather_is_exact():
    table, ids = normal(0, (100, 128), np.float16), np.random.default_rng(1).integers(0, 100, 48).astype(np.int32)
    np.testing.assert_array_equal(simulate(programs.gather(), {"ids": ids, "table": table})["y"], table[ids])


@pytest.mark.parametrize("gathered", [False, True])
def test_attention(gathered):
    q, table = normal(0, (2, 32, 128), np.float16), normal(1, (100, 128), np.float16)
    ids = np.random.default_rng(2).integers(0, 100, (2, 64)).astype(np.int32)
    inputs = {"q_in": q, "table": table, "ids": ids} if gathered else {"q_in": q, "kv": table[ids]}
    rows = table[ids].astype(np.float64)
    scores = np.einsum("thd,tkd->thk", q.astype(np.float64), rows) * 128**-0.5
    weights = np.exp(scores - scores.max(2, keepdims=True))
    expected = np.einsum("thk,tkd->thd", weights / weights.sum(2, keepdims=True), rows)
    assert relative(simulate(programs.attention(gathered=gathered), inputs)["y"], expected) < 2e-3


def test_a_copy_outside_its_buffer_names_program_and_buffer():
    ids = np.zeros(48, np.int32)
    ids[37] = 100
    with pytest.raises(SimulationError) as info:
        simulate(programs.gather(), {"ids": ids, "table": normal(0, (100, 128), np.float16)})
    assert str(info.value) == "kernel gather: program 2 reads elements 12800 to 12927 of table, which has 12800"


def test_writing_outside_a_buffer():
    program = programs.rms_norm(rows=16)
    longer = dataclasses.replace(program, grid=(axis(3),))
    inputs = {"x_in": normal(0, (16, 256), np.float16), "w_in": normal(1, (256,), np.float16)}
    with pytest.raises(SimulationError, match=r"program 2 (reads|writes) elements 4096 to 6143 of (x_in|y_out)"):
        simulate(longer, inputs)


def test_what_is_not_written_stays_nan():
    program = dataclasses.replace(programs.rms_norm(), grid=(axis(2),))
    inputs = {"x_in": normal(0, (24, 256), np.float16), "w_in": normal(1, (256,), np.float16)}
    y = simulate(program, inputs)["y_out"]
    assert np.isfinite(y[:16]).all()
    assert np.isnan(y[16:]).all()


def test_local_memory_that_was_never_loaded_is_nan():
    body = constants(0) + "    %l = memref.alloc() : memref<4x16xf32>\n"
    body += "    %x = bufferization.to_tensor %l restrict writable : memref<4x16xf32>\n"
    body += store("x", "y", "%c0", 4, 16, 16, "float32")
    program = programs.program("unset", Work.VECTOR, (argument("y", (4, 16), "float32", Role.WRITE),), body, 1)
    assert np.isnan(simulate(program, {})["y"]).all()


def test_updates_in_place_and_leaves_inputs():
    body = constants(0, 64) + "    %o = arith.muli %p, %c64 : index\n" + load("x", "x_in", "%o", 4, 16, 16, "float32")
    body += load("h", "state", "%o", 4, 16, 16, "float32") + "    %s = arith.addf %x, %h : tensor<4x16xf32>\n"
    body += store("s", "state", "%o", 4, 16, 16, "float32")
    arguments = (argument("x_in", (8, 16), "float32"), argument("state", (8, 16), "float32", Role.UPDATE))
    program = programs.program("accumulate", Work.VECTOR, arguments, body, 2)
    x, state = normal(0, (8, 16), np.float32), normal(1, (8, 16), np.float32)
    before = state.copy()
    np.testing.assert_array_equal(simulate(program, {"x_in": x, "state": state})["state"], x + before)
    np.testing.assert_array_equal(state, before)
    tile_kernel(program)({"x_in": x, "state": state})
    np.testing.assert_array_equal(state, x + before)


def test_three_grid_axes():
    body = constants(0, 1, 2, 3, 4) + "".join(f"    %i{a} = arith.index_cast %p{a} : i32 to index\n" for a in "xyz")
    body += """    %a = arith.muli %ix, %c3 : index
    %b = arith.addi %a, %iy : index
    %c = arith.muli %b, %c4 : index
    %o = arith.addi %c, %iz : index
    %v = arith.index_cast %o : index to i32
    %t = tensor.splat %v : tensor<1x1xi32>
"""
    body += store("t", "y", "%o", 1, 1, 1, "int32")
    arguments = (argument("y", (2, 3, 4), "int32", Role.WRITE),)
    program = programs.program("places", Work.VECTOR, arguments, body, 1)
    program = dataclasses.replace(program, grid=(axis(2), axis(3), axis(4)))
    np.testing.assert_array_equal(simulate(program, {})["y"], np.arange(24).reshape(2, 3, 4))


GOOD = {"x_in": normal(0, (24, 256), np.float16), "w_in": normal(1, (256,), np.float16)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_in": GOOD["x_in"].astype(np.float32)}, r"argument x_in: expected float16 \[24, 256\], found float32"),
        ({"x_in": GOOD["x_in"][:23]}, r"argument x_in: expected float16 \[24, 256\], found float16 \[23, 256\]"),
        ({"w_in": GOOD["x_in"].reshape(-1)[::24]}, r"argument w_in: expected a contiguous array"),
    ],
)
def test_arrays_that_do_not_fit(change, message):
    with pytest.raises(SimulationError, match=f"^kernel rms_norm: {message}"):
        simulate(programs.rms_norm(), GOOD | change)


def test_missing_arguments():
    with pytest.raises(SimulationError, match="kernel rms_norm: argument w_in has no array"):
        simulate(programs.rms_norm(), {"x_in": GOOD["x_in"]})
    with pytest.raises(SimulationError, match="kernel exponential: scalar n has no value"):
        tile_kernel(programs.exponential())({"x": np.zeros(3, np.float32), "y": np.zeros(3, np.float32)}, {})


def test_text_that_upstream_mlir_refuses_is_told_in_one_line():
    program = programs.program("odd", Work.VECTOR, (), "    %x = hfusion.thing %p : index\n", 1)
    with pytest.raises(SimulationError, match=r"^kernel odd: mlir-opt: .*hfusion") as info:
        simulate(program, {})
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("source", ["float32", "float16"])
@pytest.mark.parametrize("target", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.filterwarnings("ignore:.*encountered in cast")
def test_rounding_to_fp8(source, target):
    with np.errstate(all="ignore"):
        x = normal(0, (16, 64), np.float32) * np.logspace(-12, 6, 16)[:, None].astype(np.float32)
        x = np.concatenate([x[1:], np.array([[0.0, -0.0, np.inf, -np.inf, 448, 464, 465, 57344] * 8])]).astype(source)
        expected = x.astype(np.float32).astype(target)
    y = simulate(programs.rounding(source=source, target=target), {"x_in": x})["y_out"]
    same = (y.view(np.uint8) == expected.view(np.uint8)) | (np.isnan(y) & np.isnan(expected))
    assert same.all(), (x[~same], y[~same], expected[~same])


def test_rounding_a_part_to_fp8_is_refused():
    text = programs.rounding().text.replace(
        "tensor<16x64xf32> to tensor<16x64xf8E4M3FN>", "tensor<?x64xf32> to tensor<?x64xf8E4M3FN>"
    )
    with pytest.raises(SimulationError, match=r"kernel rounding: rounding tensor<.x64xf32> .* is not simulated"):
        simulate(dataclasses.replace(programs.rounding(), text=text), {"x_in": normal(0, (16, 64), np.float32)})


@pytest.mark.parametrize("n", [0, 3, 7])
def test_two_copies_into_one_buffer(n):
    ring = normal(0, (8, 128), np.float32)
    np.testing.assert_array_equal(simulate(programs.rotated(), {"ring": ring}, {"n": n})["y"], np.roll(ring, -n, 0))


def test_compiled_programs_are_kept(monkeypatch):
    first = tile_kernel(programs.rms_norm())
    monkeypatch.setattr(tile_simulator, "_run", lambda *_: pytest.fail("compiled again"))
    assert tile_kernel(programs.rms_norm()) is first


def test_without_llvm(monkeypatch):
    def missing(name, package):
        raise ToolMissing(f"simulating tile programs needs {name} of LLVM 19: apt-get install {package}")

    monkeypatch.setattr(tile_simulator, "tool", missing)
    with pytest.raises(ToolMissing, match="apt-get install"):
        simulate(programs.rms_norm(rows=40), GOOD | {"x_in": normal(0, (40, 256), np.float16)})
