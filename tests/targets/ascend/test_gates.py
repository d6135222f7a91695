"""All gates for a kernel and a device: what passes, and every planted fault with kernel and cause."""

import dataclasses
import json
import re

import numpy as np
import pytest

from tests.targets.ascend import programs
from tests.targets.ascend.requirements import DEVICES, needs_compiler, needs_mlir
from tests.targets.ascend.test_link_check import cast_to_int64
from v4c.targets.ascend import gates, toolchain
from v4c.targets.ascend.devices import find_device
from v4c.targets.ascend.gates import GATES, Example, GateError, check, check_all, difference, require

pytestmark = [needs_compiler, needs_mlir]


def rms_norm_example(program):
    example = Example.draw(program)
    wide = example.inputs["x_in"].astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-6) * example.inputs["w_in"].astype(np.float64)
    return dataclasses.replace(example, expected={"y_out": expected.astype(np.float16)}, tolerance=2e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_a_good_kernel_passes_every_gate(device):
    program = programs.rms_norm()
    report = check(program, device, rms_norm_example(program))
    assert report.passed == GATES
    assert report.ok
    assert report.omitted == ()
    assert "func.func @rms_norm" in report.hivm
    require([report])


@pytest.mark.parametrize("device", DEVICES)
def test_without_an_example_the_numbers_are_not_looked_at(device):
    report = check(programs.product(), device)
    assert report.ok
    assert report.passed == GATES[:3]
    assert [gate for gate, _ in report.omitted] == list(GATES[3:])


def failure(program, device, example=None):
    report = check(program, device, example)
    assert not report.ok
    first = report.failures[0]
    assert str(first).startswith(f"kernel {program.name}, {device}, {first.gate}: ")
    with pytest.raises(GateError, match=re.escape(str(first))) as info:
        require([report])
    assert "\n" not in str(info.value)
    return first


@pytest.mark.parametrize("device", DEVICES)
def test_over_large_tile(device):
    found = failure(programs.product(512, 512, 512, (512, 512, 64)), device)
    assert found.gate == "compile"
    assert "cc overflow, requires 8388608 bits" in found.cause


def test_fp8_on_910b():
    program = programs.product(dtype="float8_e4m3fn")
    found = failure(program, "Ascend910B1")
    assert found.gate == "compile"
    assert "doesn't support fp8" in found.cause
    assert check(program, "Ascend950PR_9599", Example.draw(program)).passed == GATES


def test_unlinkable_call():
    found = failure(cast_to_int64(), "Ascend950PR_9599")
    assert found.gate == "link"
    assert found.cause == "AIV calls _mlir_ciface_cast_half_to_int64_t, which the device library lacks"


def test_dropped_gather():
    program = programs.attention(gathered=True)
    found = failure(program, "Ascend910B1")
    assert found.gate == "sanity"
    assert found.cause == "dropped input: nothing on the device reads ids"
    example = Example.draw(program, limits={"ids": 100})
    assert check(program, "Ascend950PR_9599", example).passed == GATES


def test_a_fill_that_bishengir_moves_behind_a_copy():
    program = programs.rotated()
    example = Example.draw(program, {"n": 3})
    found = failure(program, "Ascend910B1", example)
    assert found.gate == "scheduled numerics"
    assert found.cause.startswith("y, order program: largest relative difference")
    assert check(program, "Ascend950PR_9599", example).passed == GATES


def planted(monkeypatch, change):
    """Lets bishengir's scheduled HIVM come back changed."""
    compile_program = toolchain.compile_program

    def changed(kernel, text, device, **options):
        compiled = compile_program(kernel, text, device, **options)
        scheduled = change(compiled.scheduled)
        assert scheduled != compiled.scheduled
        return dataclasses.replace(compiled, scheduled=scheduled)

    monkeypatch.setattr(gates, "compile_program", changed)
    monkeypatch.setattr(gates, "_reports", {})


def less(pattern):
    return lambda text: re.sub(rf"^.*{pattern}.*\n", "", text, count=1, flags=re.M)


@pytest.mark.parametrize("device", DEVICES)
def test_removed_sync_between_cores(device, monkeypatch):
    planted(monkeypatch, less(r'sync_block_wait"'))
    found = failure(programs.attention(), device)
    assert found.gate == "sanity"
    assert found.cause.startswith("missing cross-core sync")


@pytest.mark.parametrize("device", DEVICES)
def test_removed_flag_between_pipes(device, monkeypatch):
    planted(monkeypatch, less(r'hir\.wait_flag"'))
    program = programs.rms_norm()
    found = failure(program, device, rms_norm_example(program))
    assert found.gate == "scheduled numerics"
    assert found.cause.startswith("y_out, order consumers: ")


def test_scheduled_text_that_is_no_mlir(monkeypatch):
    planted(monkeypatch, lambda text: text[: len(text) // 2])
    assert failure(programs.rms_norm(), "Ascend910B1").gate == "sanity"


def test_wrong_numbers_of_the_text():
    program = programs.rms_norm()
    example = rms_norm_example(program)
    wrong = {"y_out": example.expected["y_out"] * np.float16(1.01)}
    found = failure(program, "Ascend910B1", dataclasses.replace(example, expected=wrong))
    assert found.gate == "tile numerics"
    assert re.fullmatch(r"y_out: largest relative difference \d\.\d\de-0\d, allowed 2e-03", found.cause)


def test_an_expected_array_nothing_writes():
    program = programs.rms_norm()
    example = dataclasses.replace(rms_norm_example(program), expected={"z": np.zeros(3)})
    assert "no argument of that name" in failure(program, "Ascend910B1", example).cause


def test_reports_stand_in_the_order_of_programs_and_devices():
    work = [(programs.rms_norm(), None), (programs.gather(), None)]
    reports = check_all(work, DEVICES, jobs=2)
    assert [(r.kernel, r.device) for r in reports] == [(p.name, d) for p, _ in work for d in DEVICES]


def test_require_counts_what_it_does_not_show():
    bad = programs.product(512, 512, 512, (512, 512, 64))
    with pytest.raises(GateError, match=r"^kernel product, Ascend910B1, compile: .* \(and 1 more\)$"):
        require(check(bad, device) for device in DEVICES)


def test_reports_are_kept_in_a_folder(tmp_path, monkeypatch):
    program = programs.rms_norm()
    example = rms_norm_example(program)
    monkeypatch.setattr(gates, "_reports", {})
    first = check(program, "Ascend910B1", example, tmp_path)
    (file,) = tmp_path.iterdir()

    monkeypatch.setattr(gates, "_reports", {})
    monkeypatch.setattr(gates, "_check", lambda *_: pytest.fail("checked again"))
    assert check(program, find_device("Ascend910B1"), example, tmp_path) == first

    # Anything the outcome depends on makes another report: device, example, text.
    for changed in (
        (program, "Ascend910B2", example),
        (program, "Ascend910B1", Example.draw(program, seed=5)),
        (dataclasses.replace(program, text=program.text + "\n"), "Ascend910B1", example),
    ):
        with pytest.raises(pytest.fail.Exception, match="checked again"):
            check(*changed, tmp_path)

    # A damaged report counts for none.
    monkeypatch.setattr(gates, "_reports", {})
    for damage in ("{", json.dumps({"kernel": "rms_norm"})):
        file.write_text(damage)
        with pytest.raises(pytest.fail.Exception, match="checked again"):
            check(program, "Ascend910B1", example, tmp_path)


def test_failures_are_kept_in_a_folder(tmp_path, monkeypatch):
    bad = programs.product(512, 512, 512, (512, 512, 64))
    monkeypatch.setattr(gates, "_reports", {})
    first = check(bad, "Ascend910B1", cache=tmp_path)
    monkeypatch.setattr(gates, "_reports", {})
    monkeypatch.setattr(gates, "_check", lambda *_: pytest.fail("checked again"))
    assert check(bad, "Ascend910B1", cache=tmp_path) == first


@pytest.mark.parametrize(
    ("found", "expected", "cause"),
    [
        ([1.0, 2.0], [1.0, 2.0], None),
        ([1.0, 2.01], [1.0, 2.0], "largest relative difference 5.00e-03, allowed 1e-03"),
        ([1.0, np.nan], [1.0, np.nan], None),
        ([1.0, np.nan], [1.0, 2.0], "1 of 2 elements are not finite"),
        ([1.0, 2.0], [1.0, np.nan], "largest relative difference inf"),
        ([np.inf, 1.0], [np.inf, 1.0], None),
        ([np.inf, 1.0], [-np.inf, 1.0], "1 of 2 elements are not finite"),
        ([1.0], [1.0, 2.0], r"expected shape \[2\], found \[1\]"),
        (np.array([1, 3]), np.array([1, 2]), "1 of 2 integers differ"),
        (np.array([]), np.array([]), None),
    ],
)
def test_difference(found, expected, cause):
    said = difference(np.asarray(found), np.asarray(expected), 1e-3)
    assert said is None if cause is None else re.match(cause, said)


def test_drawn_examples():
    program = programs.gather(rows=7)
    example = Example.draw(program, limits={"ids": 7}, seed=3)
    assert set(example.inputs) == {"ids", "table"}
    assert example.inputs["ids"].min() >= 0
    assert 1 < example.inputs["ids"].max() < 7
    assert example.inputs["table"].dtype == np.float16
