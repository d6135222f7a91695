"""The call of hivmc, with scripts in its place: Huawei's own is on no x86 machine of ours."""

import subprocess
import sys

import pytest
from click.testing import CliRunner

from tests.targets.ascend import programs
from tests.targets.ascend.requirements import DEVICES, needs_compiler
from v4c.targets.ascend import finish
from v4c.targets.ascend.devices import find_device
from v4c.targets.ascend.finish import ARGUMENTS, FinishError, find_hivmc, finish_folder, finish_kernel, program_name
from v4c.targets.ascend.toolchain import ToolMissing, compile_program, find, portable

WRITES = 'for a in "$@"; do last=$a; done\ncp "$1" "$last"\nprintf "%s\\n" "$@" > "$(dirname "$0")/arguments"\n'


@pytest.fixture
def no_cann(monkeypatch, tmp_path):
    """No hivmc anywhere."""
    for variable in finish._HOMES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(finish, "_INSTALLED", str(tmp_path / "not-installed"))


@pytest.fixture
def hivmc(no_cann, monkeypatch, tmp_path):
    """Writes a script in hivmc's place, for both architectures; returns its folder."""

    def write(body):
        folder = tmp_path / "cann"
        folder.mkdir(exist_ok=True)
        for name in ("hivmc", "hivmc-a5"):
            script = folder / name
            script.write_text("#!/bin/sh\n" + body)
            script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        return folder

    return write


@pytest.mark.parametrize("device", DEVICES)
def test_says_what_is_missing(no_cann, device):
    with pytest.raises(ToolMissing) as info:
        find_hivmc(find_device(device))
    message = str(info.value)
    assert message.startswith(
        f"device {device}: {program_name(find_device(device))} of Huawei's CANN toolkit is missing"
    )
    assert "looked in PATH, " in message
    assert "ASCEND_HOME_PATH and ASCEND_TOOLKIT_HOME are not set" in message
    assert "\n" not in message


def test_looks_in_the_installation_the_environment_names(no_cann, monkeypatch, tmp_path):
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    with pytest.raises(ToolMissing, match=r"looked in PATH, \$ASCEND_HOME_PATH, "):
        find_hivmc(find_device())
    program = tmp_path / "compiler" / "bin" / "hivmc"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert find_hivmc(find_device()) == program


@needs_compiler
@pytest.mark.parametrize("device", DEVICES)
def test_arguments_are_those_bishengir_passes(device):
    program = programs.gather()
    compiled = compile_program(program.name, program.text, find_device(device))
    expected = [a.format(device=device) for a in ARGUMENTS[find_device(device).architecture]]
    assert sorted(compiled.hivmc_arguments) == sorted(expected)


@needs_compiler
@pytest.mark.parametrize("device", DEVICES)
def test_writes_the_object(hivmc, device, tmp_path):
    folder = hivmc(WRITES)
    program = programs.gather()
    final = compile_program(program.name, program.text, find_device(device)).final
    made = finish_kernel("gather", portable(final), find_device(device), tmp_path / "out")
    assert made == tmp_path / "out" / "gather.o"
    assert made.read_text() == final  # the script's object is the text it was given, with this machine's libraries
    assert str(find().libraries) in final
    given = (folder / "arguments").read_text().splitlines()
    assert given[1:-2] == [a.format(device=device) for a in ARGUMENTS[find_device(device).architecture]]
    assert [p.name for p in made.parent.iterdir()] == ["gather.o"]


@needs_compiler
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("echo 'error: bad op'; exit 7\n", r"kernel k, Ascend910B1: hivmc failed \(exit 7\): error: bad op"),
        ("exit 0\n", r"hivmc failed \(exit 0\): no message"),
        ("sleep 60\n", "hivmc took more than 0.2 s"),
    ],
)
def test_a_failing_hivmc(hivmc, body, message, tmp_path):
    hivmc(body)
    with pytest.raises(FinishError, match=message):
        finish_kernel("k", "module {}", find_device("Ascend910B1"), tmp_path / "out", time_limit=0.2)
    assert not list(tmp_path.glob("out/*"))


@needs_compiler
def test_a_folder(hivmc, tmp_path):
    hivmc(WRITES)
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    with pytest.raises(FinishError, match=r"kernels: expected HIVM text in \.mlir files, found none"):
        finish_folder(kernels, find_device(), tmp_path / "out")
    for name in ("b", "a"):
        (kernels / f"{name}.mlir").write_text("module {}")
    assert [p.name for p in finish_folder(kernels, find_device(), tmp_path / "out")] == ["a.o", "b.o"]


@needs_compiler
def test_as_a_user_runs_it(hivmc, tmp_path):
    hivmc(WRITES)
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    (kernels / "k.mlir").write_text("module {}")

    command = [sys.executable, "-m", "v4c.targets.ascend.finish", kernels, "-o", tmp_path / "out"]
    done = subprocess.run([*command, "--device", "Ascend950PR_9599"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/out/k.o\n"


def test_command_says_what_is_wrong_in_one_line(no_cann, tmp_path):
    (tmp_path / "k.mlir").write_text("module {}")
    for options, message in (
        (["--device", "H100"], "error: device 'H100': expected "),
        ([], "error: device Ascend910B1: hivmc of Huawei's CANN toolkit is missing"),
    ):
        result = CliRunner().invoke(finish.main, [str(tmp_path), "-o", str(tmp_path / "out"), *options])
        assert result.exit_code == 2
        assert result.stderr.startswith(message)
        assert result.stderr.count("\n") == 1
