"""bishengir, as PyPI's ``ascendnpu-ir`` ships it: where it is, and one compilation of one tile program.

bishengir-compile tiles, plans the on-chip memories, splits cube and vector work and inserts synchronisation; then it
hands HIVM text to CANN's ``hivmc``, which no x86 package brings. In hivmc's place stands a script that keeps the text
it is handed and makes no device code: see `finish.py` for the real one.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from v4c.errors import Error, UnsupportedError

from .devices import Device

PACKAGE = "ascendnpu-ir"
INSTALL = "pip install 'v4c[ascend]'"
TIME_LIMIT = 300.0
"""Seconds one compilation may take; usual ones take less than one."""

OPTIONS = ("--enable-hfusion-compile=true", "--enable-hivm-compile=true", "--enable-triton-kernel-compile=true")
"""What Triton-Ascend passes too: tensors to HIVM, and the ABI of Triton's kernels."""

_SCHEDULED_BEFORE = {"c220": "convert-hivm-to-std", "c310": "convert-vector-to-hivmave"}
"""The pass that ends the stage in which memory is planned and synchronised but operations are still named."""

_STAND_IN = """\
#!/bin/sh
# Stands where CANN's hivmc is called: it makes no device code, it keeps what it is handed.
for argument in "$@"; do
    case "$argument" in
        --version|-version) echo "hivmc {version}"; exit 0 ;;
        *.mlir) cp "$argument" "{folder}/final.mlir" ;;
    esac
done
printf '%s\\n' "$@" > "{folder}/arguments"
"""


class ToolMissing(UnsupportedError):
    """A program that the Ascend target needs is not installed; the message says how to install it."""


class Rejected(Error):
    """bishengir refuses a tile program. `kernel`, `device` and `cause` are in the message, which is one line."""

    def __init__(self, kernel: str, device: str, cause: str) -> None:
        super().__init__(f"kernel {kernel}, {device}: {cause}")
        self.kernel, self.device, self.cause = kernel, device, cause


@dataclass(frozen=True)
class Toolchain:
    """An installed bishengir: the folder of its programs, that of its device libraries, its version."""

    programs: Path
    libraries: Path
    version: str

    def compiler(self, device: Device) -> Path:
        return self.programs / ("bishengir-compile-a5" if device.architecture == "c310" else "bishengir-compile")


@dataclass(frozen=True)
class Compiled:
    """What bishengir makes of a tile program for one device.

    Attributes:
        final: HIVM text as hivmc is handed it.
        scheduled: the module in generic form one stage before: on-chip addresses and synchronisation are decided,
            operations are not yet calls of the device library.
        hivmc_arguments: the command line hivmc would be called with, less the file names.
    """

    kernel: str
    device: str
    final: str
    scheduled: str
    hivmc_arguments: tuple[str, ...]


_LIBRARIES = "@ascendnpu-ir@"


def portable(final: str) -> str:
    """HIVM text with the folder of the device libraries written as ``@ascendnpu-ir@``: equal on every machine."""
    return final.replace(str(find().libraries), _LIBRARIES)


def localised(hivm: str) -> str:
    """`portable` undone with the folder of this machine."""
    return hivm.replace(_LIBRARIES, str(find().libraries))


@functools.cache
def find() -> Toolchain:
    """The toolchain of this environment; ToolMissing says what to install."""
    spec = importlib.util.find_spec("ascendnpuir")
    for root in spec.submodule_search_locations or () if spec else ():
        programs, libraries = Path(root, "bin"), Path(root, "lib")
        if all((programs / name).is_file() for name in ("bishengir-compile", "bishengir-compile-a5")):
            return Toolchain(programs, libraries, _version(programs / "bishengir-compile"))
    raise ToolMissing(f"target ascend: bishengir-compile (PyPI {PACKAGE}) is not installed: {INSTALL}")


@functools.cache
def _version(program: Path) -> str:
    """``1.2.0 (8796a8ac1508 2026-07-29)``: the release and the commit it was built from, as hivmc writes its own."""
    try:
        text = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolMissing(f"target ascend: {program} does not run: {error}") from None
    found = re.search(r"(\d+\.\d+\.\d+) \((?:\S+ )?(\w+ [\d-]+)\)", text)
    if found is None:
        raise ToolMissing(f"target ascend: {program} --version: expected a release, found {text.strip()[:80]!r}")
    return f"{found[1]} ({found[2]})"


def fingerprint(text: str, device: Device) -> str:
    """SHA-256 of all a compilation depends on: program text, device, compiler, options."""
    compiler = find().compiler(device)
    parts = (text, device.name, _version(compiler), *OPTIONS)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


_compiled: dict[tuple[str, str], Compiled | Rejected] = {}


def compile_program(kernel: str, text: str, device: Device, time_limit: float = TIME_LIMIT) -> Compiled:
    """Compiles MLIR text whose function is `kernel`; Rejected has the compiler's reason.

    Outcomes are kept in the process by `fingerprint`, rejections too.
    """
    key = (kernel, fingerprint(text, device))
    if key not in _compiled:
        try:
            _compiled[key] = _compile(kernel, text, device, time_limit)
        except Rejected as rejected:
            _compiled[key] = rejected
    outcome = _compiled[key]
    if isinstance(outcome, Rejected):
        raise Rejected(outcome.kernel, outcome.device, outcome.cause)
    return outcome


def _compile(kernel: str, text: str, device: Device, time_limit: float) -> Compiled:
    compiler = find().compiler(device)
    with tempfile.TemporaryDirectory(prefix="v4c-ascend-") as name:
        folder = Path(name)
        _write_stand_in(folder, _version(compiler))
        (folder / "program.mlir").write_text(text)
        command = [str(compiler), "program.mlir", f"--target={device.name}", *OPTIONS, "-o", str(folder / "kernel.o")]
        _run(command, folder, time_limit, kernel, device)
        handed = (folder / "arguments").read_text().splitlines()
        arguments = tuple(a for i, a in enumerate(handed[1:], 1) if a != "-o" and handed[i - 1] != "-o")
        final = (folder / "final.mlir").read_text()
        # Generic form holds for everything a run prints, also for what hivmc is handed: hence a second run.
        command += [
            f"--mlir-print-ir-before={_SCHEDULED_BEFORE[device.architecture]}",
            "--mlir-print-ir-module-scope",
            "--mlir-print-op-generic",
            "--mlir-disable-threading",
        ]
        scheduled = _last_dump(_run(command, folder, time_limit, kernel, device))
        if scheduled is None:
            raise Rejected(
                kernel, device.name, f"bishengir-compile prints nothing before {_SCHEDULED_BEFORE[device.architecture]}"
            )
        return Compiled(kernel, device.name, final, scheduled, arguments)


def _run(command: list[str], folder: Path, time_limit: float, kernel: str, device: Device) -> str:
    """One run of the compiler, which must reach hivmc; returns its log."""
    (folder / "final.mlir").unlink(missing_ok=True)
    status, log = run_limited(command, folder, time_limit)
    if status is None:
        raise Rejected(kernel, device.name, f"bishengir-compile took more than {time_limit:g} s")
    if status != 0 or not (folder / "final.mlir").is_file():
        raise Rejected(kernel, device.name, _cause(status, log))
    return log


def _write_stand_in(folder: Path, version: str) -> None:
    for name in ("hivmc", "hivmc-a5"):
        script = folder / name
        script.write_text(_STAND_IN.format(version=version, folder=folder))
        script.chmod(0o755)


def run_limited(command: list[str], folder: Path, time_limit: float) -> tuple[int | None, str]:
    """Runs a program in `folder`, with `folder` first on its path; (None, log so far) when it takes too long.

    It leads a process group of its own, so that what it started ends with it.
    """
    environment = {
        "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "TMPDIR": str(folder),
        "HOME": str(folder),
        "LC_ALL": "C.UTF-8",
    }
    log = folder / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
            start_new_session=True,
        )  # fmt: skip
        try:
            status: int | None = process.wait(time_limit)
        except subprocess.TimeoutExpired:
            status = None
        except BaseException:
            _end(process)
            raise
        if status is None:
            _end(process)
    return status, log.read_text(errors="replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


_DUMP = re.compile(r"^// -----// IR Dump [^\n]*\n", re.M)


def _last_dump(log: str) -> str | None:
    """The last module printed: the compiler tries again with other settings when the first does not fit."""
    starts = list(_DUMP.finditer(log))
    if not starts:
        return None
    text = log[starts[-1].end() :]
    lines = text.split("\n")
    for i, line in enumerate(lines):
        if line.startswith("})") and line.endswith("-> ()"):
            return "\n".join(lines[: i + 1]) + "\n"
    return None


_NOISE = ("Failed to run ", "Failed to parse input", "Executing:", "External hivmc")
_LOCATION = re.compile(r'^(?:loc\(".*?"(?::\d+)*\)|\S+\.mlir:\d+:\d+): *')


def _cause(status: int | None, log: str) -> str:
    """The compiler's own words in one line: overflows first, then errors, then how it ended."""
    lines = [line for line in _DUMP.sub("", log).splitlines() if not line.lstrip().startswith(('"', "%", "^", "#"))]
    said = []
    for line in lines:
        if any(noise in line for noise in _NOISE):
            continue
        if "error:" in line or "overflow" in line or "Assertion" in line or "[ERROR]" in line:
            words = _LOCATION.sub("", line.strip())
            words = words.removeprefix("error: ").removeprefix("[ERROR] ").strip()
            if "Assertion" in words:
                words = words[words.index("Assertion") :]
            if words not in said:
                said.append(words)
    said.sort(key=lambda words: "overflow" not in words)
    said = [words for words in said if not words.startswith("[NOTE]")] or said
    if said:
        return "; ".join(said[:2])[:400]
    if status is not None and status < 0:
        return f"bishengir-compile ended by {signal.Signals(-status).name}"
    return f"bishengir-compile failed (exit {status}) and gave no reason"


def tool(name: str, package: str) -> str:
    """The path of an LLVM 19 program, as Debian installs it; ToolMissing names the package."""
    for candidate in (f"/usr/lib/llvm-19/bin/{name}", f"{name}-19", name):
        path = shutil.which(candidate)
        if path is not None and _is_llvm_19(path):
            return path
    raise ToolMissing(f"simulating tile programs needs {name} of LLVM 19: apt-get install {package}")


@functools.cache
def _is_llvm_19(path: str) -> bool:
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    return re.search(r"LLVM version 19\.", text) is not None
