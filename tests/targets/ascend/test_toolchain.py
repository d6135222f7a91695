"""One compilation by bishengir: what comes back, what is refused and how that is said, what is left behind."""

import importlib.util
import shutil
import tempfile

import pytest

from tests.targets.ascend import programs
from tests.targets.ascend.requirements import DEVICES, needs_compiler
from v4c.errors import Error
from v4c.targets.ascend import toolchain
from v4c.targets.ascend.devices import find_device
from v4c.targets.ascend.mlir_text import parse
from v4c.targets.ascend.toolchain import Rejected, ToolMissing, compile_program, localised, portable, tool


def compile_for(program, device, **options):
    return compile_program(program.name, program.text, find_device(device), **options)


@needs_compiler
@pytest.mark.parametrize("device", DEVICES)
def test_compiles_a_kernel(device):
    compiled = compile_for(programs.rms_norm(), device)
    assert "func.func @rms_norm" in compiled.final  # in the form hivmc reads
    assert "rms_norm" in parse(compiled.scheduled).functions  # in generic form
    assert "hivm.hir.pointer_cast" in compiled.scheduled
    assert "set_flag" in compiled.scheduled


@needs_compiler
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("program", "memory"),
    [(programs.product(512, 512, 512, (512, 512, 64)), "cc"), (programs.rms_norm(256, 8192, 64), "ub")],
    ids=["product", "rms_norm"],
)
def test_over_large_tile_is_refused(device, program, memory):
    with pytest.raises(
        Rejected, match=rf"^kernel {program.name}, {device}: {memory} overflow, requires \d+ bits"
    ) as info:
        compile_for(program, device)
    assert "\n" not in str(info.value)


@needs_compiler
def test_fp8_is_refused_on_910b():
    program = programs.product(dtype="float8_e4m3fn")
    with pytest.raises(Rejected, match=r"^kernel product, Ascend910B1: .*doesn't support fp8"):
        compile_for(program, "Ascend910B1")
    assert compile_for(program, "Ascend950PR_9599").final


@needs_compiler
def test_text_that_is_no_mlir_is_refused():
    with pytest.raises(Rejected, match=r"^kernel nonsense, Ascend910B1: custom op 'nonsense' is unknown[^/]*$"):
        compile_program("nonsense", "module { nonsense }", find_device("Ascend910B1"))


@needs_compiler
def test_a_compiler_that_dies_is_told():
    # Part of the sorted values with their indices makes the 950's compiler fail an assertion.
    body = programs.constants(0) + programs.load("x", "x_in", "%c0", 1, 256, 256, "float32")
    body += "    %v, %i = hfusion.sort ins(%x : tensor<1x256xf32>) descending = true sort_axis = 1"
    body += " -> tensor<1x256xf32>, tensor<1x256xi32>\n"
    for whole, part, t in (("v", "vt", "f32"), ("i", "it", "i32")):
        body += f"    %{part} = tensor.extract_slice %{whole}[0, 0] [1, 64] [1, 1]"
        body += f" : tensor<1x256x{t}> to tensor<1x64x{t}>\n"
    body += programs.store("vt", "values", "%c0", 1, 64, 64, "float32")
    body += programs.store("it", "places", "%c0", 1, 64, 64, "int32")
    arguments = (
        programs.argument("x_in", (256,), "float32"),
        programs.argument("values", (64,), "float32", programs.Role.WRITE),
        programs.argument("places", (64,), "int32", programs.Role.WRITE),
    )
    program = programs.program("order", programs.Work.VECTOR, arguments, body, 1)
    assert compile_for(program, "Ascend910B1").final
    with pytest.raises(Rejected, match=r"^kernel order, Ascend950PR_9599: Assertion "):
        compile_for(program, "Ascend950PR_9599")


@needs_compiler
def test_time_limit():
    program = programs.rms_norm(width=272)  # in no cache
    with pytest.raises(Rejected, match=r"kernel rms_norm, Ascend910B1: bishengir-compile took more than 0.001 s"):
        compile_for(program, "Ascend910B1", time_limit=0.001)


@needs_compiler
def test_outcomes_are_kept_in_the_process(monkeypatch):
    good, bad = programs.gather(), programs.product(dtype="float8_e4m3fn")
    first = compile_for(good, "Ascend910B1")
    with pytest.raises(Rejected) as refused:
        compile_for(bad, "Ascend910B1")

    def fail(*_):
        raise AssertionError("compiled again")

    monkeypatch.setattr(toolchain, "_compile", fail)
    assert compile_for(good, "Ascend910B1") is first
    with pytest.raises(Rejected) as again:
        compile_for(bad, "Ascend910B1")
    assert str(again.value) == str(refused.value)
    with pytest.raises(AssertionError, match="compiled again"):
        compile_for(good, "Ascend910B2")


@needs_compiler
def test_a_real_hivmc_on_the_path_is_not_called(tmp_path, monkeypatch):
    for name in ("hivmc", "hivmc-a5"):
        script = tmp_path / name
        script.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\nexit 1\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for device in DEVICES:
        assert compile_for(programs.exponential(tile=320), device).final
    assert not (tmp_path / "called").exists()


@needs_compiler
def test_leaves_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    compile_for(programs.rms_norm(width=304), "Ascend910B1")
    with pytest.raises(Rejected):
        compile_program("k", "module { ", find_device("Ascend910B1"))
    assert not list(tmp_path.iterdir())


@needs_compiler
def test_portable_text_names_no_folder_of_this_machine():
    final = compile_for(programs.gather(), "Ascend910B1").final
    text = portable(final)
    assert str(toolchain.find().libraries) in final
    assert "/ascendnpuir/" not in text
    assert localised(text) == final


def test_without_the_extra(monkeypatch):
    toolchain.find.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    try:
        with pytest.raises(ToolMissing) as info:
            toolchain.find()
    finally:
        toolchain.find.cache_clear()
    assert str(info.value) == (
        "target ascend: bishengir-compile (PyPI ascendnpu-ir) is not installed: pip install 'v4c[ascend]'"
    )
    assert isinstance(info.value, Error)


def test_without_llvm(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ToolMissing, match=r"needs mlir-opt of LLVM 19: apt-get install mlir-19-tools$"):
        tool("mlir-opt", "mlir-19-tools")


def test_another_llvm_is_not_taken(tmp_path, monkeypatch):
    script = tmp_path / "mlir-opt"
    script.write_text("#!/bin/sh\necho LLVM version 14.0.6\n")
    script.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(script))
    with pytest.raises(ToolMissing, match="needs mlir-opt of LLVM 19"):
        tool("mlir-opt", "mlir-19-tools")
