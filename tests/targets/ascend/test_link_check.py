"""Whether called library functions exist: the bitcode reader against llvm-nm, and calls that cannot be linked."""

import subprocess

import pytest

from tests.targets.ascend import programs
from tests.targets.ascend.requirements import DEVICES, needs_compiler, needs_mlir
from v4c.targets.ascend.devices import find_device
from v4c.targets.ascend.link_check import BitcodeError, Missing, defined_functions, missing_functions
from v4c.targets.ascend.toolchain import compile_program, find, tool


def final_text(program, device):
    return compile_program(program.name, program.text, find_device(device)).final


@needs_compiler
@needs_mlir
@pytest.mark.parametrize("name", ["meta_op.aic.c220.bc", "meta_op.aiv.c220.bc", "meta_op.mix.aiv.bc"])
def test_names_are_those_llvm_nm_lists(name):
    path = find().libraries / name
    listed = subprocess.run([tool("llvm-nm", "llvm-19"), path], capture_output=True, text=True, check=True).stdout
    expected = {line.split()[-1] for line in listed.splitlines() if line.split()[-2] in "TtWw"}
    assert defined_functions(path) == expected
    assert len(expected) > 300


@needs_compiler
def test_reads_the_library_llvm_19_cannot():
    assert "_mlir_ciface_load_gm_to_ubuf_1d_float" in defined_functions(find().libraries / "meta_op.aiv.c310.bc")


@needs_compiler
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "program",
    [programs.rms_norm(), programs.product(), programs.gather(), programs.attention()],
    ids=lambda program: program.name,
)
def test_calls_of_good_kernels_exist(device, program):
    final = final_text(program, device)
    assert "func.func private" in final
    assert missing_functions(final) == []


@needs_compiler
@pytest.mark.parametrize("device", DEVICES)
def test_a_call_that_does_not_exist(device):
    final = final_text(programs.gather(), device)
    name = "store_ubuf_to_gm_1d_half"
    assert name in final
    assert missing_functions(final.replace(name, "store_ubuf_to_gm_9d_half")) == [
        Missing("store_ubuf_to_gm_9d_half", "AIV")
    ]


def cast_to_int64():
    """bishengir accepts it for the 950 and calls a function that its library does not have."""
    body = programs.constants(0) + programs.load("x", "x_in", "%c0", 8, 64, 64, "float16")
    body += "    %y = arith.fptosi %x : tensor<8x64xf16> to tensor<8x64xi64>\n"
    body += programs.store("y", "y_out", "%c0", 8, 64, 64, "int64")
    arguments = (
        programs.argument("x_in", (8, 64), "float16"),
        programs.argument("y_out", (8, 64), "int64", programs.Role.WRITE),
    )
    return programs.program("cast_to_int64", programs.Work.VECTOR, arguments, body, 1)


@needs_compiler
def test_a_call_bishengir_invents():
    missing = missing_functions(final_text(cast_to_int64(), "Ascend950PR_9599"))
    assert missing == [Missing("_mlir_ciface_cast_half_to_int64_t", "AIV")]


@needs_compiler
def test_a_function_must_be_in_the_library_of_its_core():
    final = final_text(programs.gather(), "Ascend910B1")
    moved = final.replace("func_core_type<AIV>, llvm.emit_c_interface", "func_core_type<AIC>, llvm.emit_c_interface")
    assert {m.core for m in missing_functions(moved)} == {"AIC"}


def test_text_without_libraries():
    with pytest.raises(BitcodeError, match="names no device library for AIC and AIV"):
        missing_functions("module {}")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"ELF!", "expected LLVM bitcode, found 454c4621"), (b"BC\xc0\xde" + b"\0" * 64, "expected functions")],
)
def test_files_that_are_no_library(tmp_path, content, message):
    path = tmp_path / "lib.bc"
    path.write_bytes(content)
    with pytest.raises(BitcodeError, match=message):
        defined_functions(path)


@needs_compiler
def test_a_library_that_ends_early(tmp_path):
    whole = (find().libraries / "meta_op.mix.aic.bc").read_bytes()
    path = tmp_path / "short.bc"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BitcodeError, match=r"short\.bc: "):
        defined_functions(path)


def test_a_library_that_is_not_there(tmp_path):
    with pytest.raises(BitcodeError, match=r"none\.bc: No such file"):
        defined_functions(tmp_path / "none.bc")
