"""Each check on scheduled HIVM, on kernels as bishengir makes them and on planted faults."""

import re

import pytest

from tests.targets.ascend import programs
from tests.targets.ascend.requirements import DEVICES, needs_compiler
from v4c.targets.ascend.devices import find_device
from v4c.targets.ascend.sanity import check_sanity
from v4c.targets.ascend.toolchain import compile_program

GOOD = (
    programs.rms_norm(),
    programs.rms_norm(dtype="bfloat16"),
    programs.exponential(),
    programs.product(),
    programs.gather(),
    programs.attention(),
    programs.set_row(),  # what it updates it does not read
)


def scheduled(program, device):
    return compile_program(program.name, program.text, find_device(device)).scheduled


def without(text, pattern, which=0):
    """The text less one of the lines that match."""
    lines = text.splitlines()
    found = [i for i, line in enumerate(lines) if re.search(pattern, line)]
    assert found, f"no line matches {pattern}"
    del lines[found[which]]
    return "\n".join(lines)


@needs_compiler
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("program", GOOD, ids=lambda p: f"{p.name}-{p.arguments[0].dtype}")
def test_good_kernels_pass(program, device):
    assert check_sanity(program, scheduled(program, device)) == []


@needs_compiler
def test_a_gather_that_bishengir_drops():
    program = programs.attention(gathered=True)
    assert check_sanity(program, scheduled(program, "Ascend950PR_9599")) == []
    causes = check_sanity(program, scheduled(program, "Ascend910B1"))
    assert "dropped input: nothing on the device reads table" in causes
    assert "dropped gather: the program loads indices from ids, the device does not" in causes
    assert any("a buffer without an address" in cause for cause in causes)
    assert any("mmadL1 reads a buffer in cbuf that nothing has written" in cause for cause in causes)


@needs_compiler
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("operation", ["sync_block_set", "sync_block_wait"])
def test_removed_sync(device, operation, which):
    program = programs.attention()
    text = without(scheduled(program, device), rf'hir\.{operation}"', which)
    (cause,) = check_sanity(program, text)
    assert cause.startswith("missing cross-core sync: AI")


@needs_compiler
@pytest.mark.parametrize("device", DEVICES)
def test_removed_load(device):
    program = programs.rms_norm()
    text = without(scheduled(program, device), r'hivm\.hir\.load"')
    causes = check_sanity(program, text)
    assert "dropped input: nothing on the device reads x_in" in causes
    assert any(re.search(r"reads ub bytes \d+ to \d+, which nothing has written", cause) for cause in causes)


@needs_compiler
@pytest.mark.parametrize("device", DEVICES)
def test_removed_store(device):
    program = programs.gather()
    causes = check_sanity(program, without(scheduled(program, device), r'hivm\.hir\.store"'))
    assert causes == ["dropped output: nothing on the device writes y"]


@needs_compiler
def test_vector_operation_on_global_memory():
    program = programs.rms_norm()
    text = scheduled(program, "Ascend910B1")
    line = next(line for line in text.splitlines() if 'hivm.hir.vmul"' in line)
    on_gm = line.replace("address_space<ub>", "address_space<gm>")
    causes = check_sanity(program, text.replace(line, on_gm))
    assert causes
    assert all(cause.startswith("rms_norm: hivm.hir.vmul works on global memory (") for cause in causes)


@needs_compiler
def test_vector_function_on_global_memory():
    program = programs.exponential()
    text = scheduled(program, "Ascend950PR_9599")
    line = next(line for line in text.splitlines() if '"func.call"' in line)
    causes = check_sanity(program, text.replace(line, line.replace("address_space<ub>", "address_space<gm>")))
    assert any(cause.startswith("exponential: func.call works on global memory") for cause in causes)


@needs_compiler
def test_another_kernels_text():
    text = scheduled(programs.gather(), "Ascend910B1")
    assert check_sanity(programs.rms_norm(), text) == ["no device function rms_norm in the scheduled HIVM"]
