"""The last step to a device object: CANN's hivmc, called where it is found.

v4c stops at HIVM text, because no x86 package brings hivmc. It is part of Huawei's CANN toolkit (its ``bisheng``
compiler too, which hivmc calls). On a machine with CANN::

    python -m v4c.targets.ascend.finish KERNELS --device Ascend910B1 -o OBJECTS

where KERNELS holds ``<kernel>.mlir`` files as a `GateReport`'s `hivm`. This step itself has only been tested with
scripts in hivmc's place: objects are made by Huawei's tools, and v4c has not run any on a device.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import click

from v4c.errors import Error, OutputError

from .devices import Device, find_device
from .toolchain import TIME_LIMIT, ToolMissing, localised, run_limited

ARGUMENTS = {
    "c220": (
        "--enable-debug-info=false",
        "--enable-static-bare-ptr=true",
        "--enable-bin-relocation=true",
        "--enable-hivm-inject-barrier-all-sync=false",
        "--enable-sanitizer=false",
    ),
    "c310": (
        "--target={device}",
        "--enable-hfusion-compile=true",
        "--enable-hivm-compile=true",
        "--enable-triton-kernel-compile=true",
        "--only-run-hivm-pipeline=false",
    ),
}
"""The command line bishengir 1.2.0 calls hivmc with, less the file names; a test compares."""

_HOMES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "ASCEND_INSTALL_PATH")
_INSTALLED = "/usr/local/Ascend/ascend-toolkit/latest"
_FOLDERS = ("bin", "compiler/bin", "compiler/bishengir/bin", "tools/bishengir/bin", "bishengir/bin")


class FinishError(Error):
    """hivmc refuses a kernel's HIVM; the message has its words."""


def program_name(device: Device) -> str:
    """``hivmc-a5`` for the 950, ``hivmc`` otherwise: the names bishengir calls."""
    return "hivmc-a5" if device.architecture == "c310" else "hivmc"


def find_hivmc(device: Device) -> Path:
    """hivmc on the path or in a CANN installation; ToolMissing says what is missing and where it was looked for."""
    name = program_name(device)
    on_path = shutil.which(name)
    if on_path is not None:
        return Path(on_path)
    set_homes = [variable for variable in _HOMES if os.environ.get(variable)]
    for home in [*(os.environ[variable] for variable in set_homes), _INSTALLED]:
        for folder in _FOLDERS:
            candidate = Path(home, folder, name)
            if candidate.is_file() and os.access(candidate, os.X_OK):
                return candidate
    looked = ", ".join(("PATH", *(f"${v}" for v in set_homes), _INSTALLED))
    hint = "" if set_homes else f"; {' and '.join(_HOMES[:2])} are not set"
    raise ToolMissing(
        f"device {device.name}: {name} of Huawei's CANN toolkit is missing, which turns HIVM into a device object "
        f"(looked in {looked}{hint})"
    )


def finish_kernel(kernel: str, hivm: str, device: Device, destination: Path, time_limit: float = TIME_LIMIT) -> Path:
    """Writes ``<kernel>.o`` into `destination` from HIVM text.

    Raises:
        ToolMissing: hivmc or the device libraries (PyPI ``ascendnpu-ir``) are not installed.
        FinishError: hivmc fails, writes nothing, or takes longer than `time_limit` seconds.
    """
    hivmc = find_hivmc(device)
    text = localised(hivm)
    with tempfile.TemporaryDirectory(prefix="v4c-hivmc-") as name:
        folder = Path(name)
        (folder / "module.hivm.opt.mlir").write_text(text)
        arguments = [argument.format(device=device.name) for argument in ARGUMENTS[device.architecture]]
        made = folder / f"{kernel}.o"
        command = [str(hivmc), str(folder / "module.hivm.opt.mlir"), *arguments, "-o", str(made)]
        status, log = run_limited(command, folder, time_limit)
        if status is None:
            raise FinishError(f"kernel {kernel}, {device.name}: {hivmc.name} took more than {time_limit:g} s")
        if status != 0 or not made.is_file():
            said = next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "no message")
            raise FinishError(f"kernel {kernel}, {device.name}: {hivmc.name} failed (exit {status}): {said[:300]}")
        target = destination / made.name
        beside = destination / f".{made.name}.part"
        try:
            destination.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(made, beside)
            os.replace(beside, target)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise OutputError(f"{target}: {error.strerror}") from None
    return target


def finish_folder(folder: Path, device: Device, destination: Path) -> list[Path]:
    """`finish_kernel` for every ``*.mlir`` file of a folder, by name."""
    files = sorted(folder.glob("*.mlir"))
    if not files:
        raise FinishError(f"{folder}: expected HIVM text in .mlir files, found none")
    find_hivmc(device)
    return [finish_kernel(file.stem, file.read_text(), device, destination) for file in files]


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--device", default="", help="As for v4c compile --target ascend:DEVICE.")
@click.option(
    "-o", "--output", required=True, type=click.Path(file_okay=False, path_type=Path), help="For the objects."
)
def main(folder: Path, device: str, output: Path) -> None:
    """Turn the HIVM text in FOLDER into device objects with CANN's hivmc."""
    try:
        for path in finish_folder(folder, find_device(device), output):
            click.echo(path)
    except Error as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
