"""bishengir's scheduled HIVM on x86: the numbers of good kernels, and what planted faults do to them."""

import dataclasses
import re

import ml_dtypes  # noqa: F401
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.targets.ascend import programs
from tests.targets.ascend.requirements import DEVICES, needs_compiler, needs_mlir
from v4c.targets.ascend.devices import find_device
from v4c.targets.ascend.gates import Example, difference
from v4c.targets.ascend.hivm_memory import Buffer, HIVMError
from v4c.targets.ascend.hivm_scalars import affine_map, constant, typed
from v4c.targets.ascend.hivm_simulator import ORDERS, simulate_scheduled
from v4c.targets.ascend.program import Work
from v4c.targets.ascend.tile_simulator import SimulationError, simulate
from v4c.targets.ascend.toolchain import compile_program

CASES = {
    "rms_norm": (programs.rms_norm(), {}, {}),
    "rms_norm-bf16": (programs.rms_norm(dtype="bfloat16"), {}, {}),
    "exponential": (programs.exponential(), {"n": 700}, {}),
    "gather": (programs.gather(), {}, {"ids": 100}),
    "product": (programs.product(), {}, {}),
    "attention": (programs.attention(), {}, {}),
    "set_row": (programs.set_row(), {"n": 5}, {}),
}


def compiled(program, device):
    return compile_program(program.name, program.text, find_device(device))


def orders(program, code, example):
    """Results in every order the hardware may take."""
    return [simulate_scheduled(program, code, example.inputs, example.scalars, order) for order in ORDERS[program.work]]


def fault(program, code, example):
    """What the simulation finds wrong, None where all orders give the text's numbers."""
    text = simulate(program, example.inputs, example.scalars)
    try:
        for written in orders(program, code, example):
            for name, array in written.items():
                if (cause := difference(array, text[name], 5e-3)) is not None:
                    return cause
    except SimulationError as error:
        return str(error)
    return None


def lines_less(code, index):
    lines = code.scheduled.splitlines()
    return dataclasses.replace(code, scheduled="\n".join(lines[:index] + lines[index + 1 :]))


def places(code, pattern):
    return [i for i, line in enumerate(code.scheduled.splitlines()) if re.search(pattern, line)]


@needs_compiler
@needs_mlir
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_good_kernels_give_the_texts_numbers(case, device):
    program, scalars, limits = CASES[case]
    assert fault(program, compiled(program, device), Example.draw(program, scalars, limits)) is None


@needs_compiler
@needs_mlir
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float32"])
def test_other_products_of_the_950(dtype):
    program = programs.product(dtype=dtype)
    assert fault(program, compiled(program, "Ascend950PR_9599"), Example.draw(program)) is None


@needs_compiler
@needs_mlir
@pytest.mark.parametrize("target", ["float8_e4m3fn", "float8_e5m2"])
def test_rounding_to_fp8_on_the_950(target):
    program = programs.rounding(target=target)
    assert fault(program, compiled(program, "Ascend950PR_9599"), Example.draw(program)) is None


@needs_compiler
@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=3, deadline=None)
@given(tile=st.integers(1, 12), width=st.integers(1, 20).map(lambda n: 16 * n), seed=st.integers(0, 99))
def test_rms_norm_of_any_width(device, tile, width, seed):
    program = programs.rms_norm(2 * tile, width, tile)
    example = Example.draw(program, seed=seed)
    wide = example.inputs["x_in"].astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-6) * example.inputs["w_in"].astype(np.float64)
    for written in orders(program, compiled(program, device), example):
        assert np.abs(written["y_out"] - expected).max() < 2e-3 * np.abs(expected).max()


@needs_compiler
@needs_mlir
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", ["rms_norm", "exponential", "gather"])
def test_every_flag_of_a_vector_kernel_is_needed(case, device):
    program, scalars, limits = CASES[case]
    code, example = compiled(program, device), Example.draw(program, scalars, limits)
    flags = places(code, r'hivm\.hir\.(set|wait)_flag"')
    assert flags
    for index in flags:
        assert fault(program, lines_less(code, index), example) is not None, code.scheduled.splitlines()[index]


@needs_compiler
@needs_mlir
@pytest.mark.parametrize("device", DEVICES)
def test_every_sync_between_cores_is_needed(device):
    program, _, _ = CASES["attention"]
    code, example = compiled(program, device), Example.draw(program)
    flags = places(code, r'hivm\.hir\.sync_block_(set|wait)"')
    assert len(flags) == 4
    for index in flags:
        assert fault(program, lines_less(code, index), example) is not None


@needs_compiler
def test_cores_that_wait_for_each_other():
    program, _, _ = CASES["attention"]
    code = compiled(program, "Ascend910B1")
    code = lines_less(code, places(code, r'sync_block_set"')[0])
    with pytest.raises(SimulationError, match=r"^kernel attention, Ascend910B1, .*wait for each other"):
        orders(program, code, Example.draw(program))


@needs_compiler
@needs_mlir
def test_two_buffers_at_one_address():
    program, _, _ = CASES["rms_norm"]
    code = compiled(program, "Ascend910B1")
    addresses = sorted({int(n) for n in re.findall(r"value = (\d+) : i64", code.scheduled)})
    assert len(addresses) > 2
    clash = code.scheduled.replace(f"value = {addresses[1]} : i64", f"value = {addresses[0]} : i64")
    assert fault(program, dataclasses.replace(code, scheduled=clash), Example.draw(program)) is not None


@needs_compiler
def test_an_address_beyond_the_memory():
    program, _, _ = CASES["rms_norm"]
    code = compiled(program, "Ascend910B1")
    address = max(int(n) for n in re.findall(r"value = (\d+) : i64", code.scheduled))
    far = code.scheduled.replace(f"value = {address} : i64", "value = 196600 : i64")
    with pytest.raises(SimulationError, match=r"ub overflow: bytes 196600 to \d+ of 196608"):
        orders(program, dataclasses.replace(code, scheduled=far), Example.draw(program))


@needs_compiler
def test_a_gather_outside_its_table():
    program, scalars, _ = CASES["gather"]
    example = Example.draw(program, scalars, {"ids": 1})
    example.inputs["ids"][5] = 100
    with pytest.raises(SimulationError, match=r"elements 12800 to 12927 of table \(gm\), which has 12800"):
        orders(program, compiled(program, "Ascend910B1"), example)


@needs_compiler
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('"hivm.hir.vmystery"() : () -> ()', "operation hivm.hir.vmystery is not simulated"),
        ('"test.unknown"() : () -> ()', "operation test.unknown is not simulated"),
        ('"hivm.hir.get_block_num"() : () -> ()', "programs that loop over blocks"),
    ],
)
def test_operations_it_does_not_know_are_errors(line, message):
    program, _, _ = CASES["gather"]
    code = compiled(program, "Ascend910B1")
    text = code.scheduled.replace('"hivm.hir.set_mask_norm"() : () -> ()', line)
    assert text != code.scheduled
    with pytest.raises(SimulationError, match=re.escape(message)):
        orders(program, dataclasses.replace(code, scheduled=text), Example.draw(program))


@needs_compiler
def test_attributes_it_does_not_know_are_errors():
    program, _, _ = CASES["rms_norm"]
    code = compiled(program, "Ascend910B1")
    text = code.scheduled.replace("transpose = array<i64>", "transpose = array<i64: 1, 0>")
    with pytest.raises(SimulationError, match="with transpose = array<i64: 1, 0>"):
        orders(program, dataclasses.replace(code, scheduled=text), Example.draw(program))


def test_every_kind_of_work_has_an_order():
    assert set(ORDERS) == set(Work)


@pytest.mark.parametrize(
    ("text", "arguments", "expected"),
    [
        ("affine_map<(d0)[s0] -> (d0 * 4 + s0)>", (3, 1), [13]),
        ("affine_map<()[s0] -> (s0 floordiv 4, s0 mod 4, s0 ceildiv 4)>", (7,), [1, 3, 2]),
        ("affine_map<(d0) -> (-d0 + 1024, 0)>", (24,), [1000, 0]),
        ("affine_map<(d0) -> ((-d0) ceildiv 4 - d0 * -2)>", (6,), [11]),
    ],
)
def test_affine_maps(text, arguments, expected):
    assert affine_map("#map", {"#map": text})(*arguments) == expected


@pytest.mark.parametrize(
    ("value", "type_text", "expected"),
    [
        (200, "i8", -56),
        (-1, "i64", -1),
        (2**31, "i32", -(2**31)),
        (3, "i1", True),
        (70000.0, "f16", np.inf),
        (1 / 3, "bf16", 0.333984375),
    ],
)
def test_values_are_as_wide_as_their_type(value, type_text, expected):
    assert typed(value, type_text) == expected


@pytest.mark.parametrize(
    ("text", "type_text", "expected"),
    [
        ("0xFF800000 : f32", "f32", -np.inf),
        ("0xFC00 : f16", "f16", -np.inf),
        ("-7 : i32", "i32", -7),
        ("true", "i1", True),
        ("dense<[1, 2]> : vector<2xi32>", "vector<2xi32>", [1, 2]),
        ("dense<0xFF80> : vector<2xbf16>", "vector<2xbf16>", [-np.inf, -np.inf]),
        ('dense<"0x0000803F00000040"> : vector<2xf32>', "vector<2xf32>", [1.0, 2.0]),
    ],
)
def test_constants(text, type_text, expected):
    np.testing.assert_array_equal(np.asarray(constant(text, type_text), np.float64), expected)


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
    offset=st.integers(0, 3),
    data=st.data(),
)
def test_views_are_numpys(shape, offset, data):
    whole = np.arange(200)
    strides = tuple(data.draw(st.integers(1, 12)) for _ in shape)
    buffer = Buffer(whole, offset, shape, strides, "gm", "x")
    expected = np.array([whole[offset + np.dot(i, strides)] for i in np.ndindex(shape)]).reshape(shape)
    np.testing.assert_array_equal(buffer.view(), expected)
    starts = [data.draw(st.integers(0, n - 1)) for n in shape]
    sizes = [data.draw(st.integers(1, n - s)) for n, s in zip(shape, starts, strict=True)]
    part = buffer.subview(starts, sizes, [1] * len(shape), len(shape), [False] * len(shape))
    slices = tuple(slice(s, s + n) for s, n in zip(starts, sizes, strict=True))
    np.testing.assert_array_equal(part.view(), expected[slices])


def test_a_view_outside_its_memory():
    with pytest.raises(HIVMError, match=r"elements 8 to 11 of x \(ub\), which has 10"):
        Buffer(np.zeros(10), 8, (4,), (1,), "ub", "x").view()
