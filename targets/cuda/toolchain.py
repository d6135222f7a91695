"""Compiles CUDA source to a fat binary: machine code of one architecture, and PTX for newer chips.

nvcc is taken from ``CUDA_HOME``, the path, or ``/usr/local/cuda``; without one, NVRTC and nvFatbin from PyPI (`nvrtc`).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from v4c.errors import Error, UnsupportedError

from . import nvrtc
from .architectures import Architecture

SOURCE = Path(__file__).parent / "kernels" / "source"
HEADERS = (
    "common.cuh", "weights.cuh", "gemv.cuh", "gemm.cuh", "experts.cuh", "attention.cuh", "attention_tiles.cuh",
    "index.cuh", "index_tiles.cuh", "compress.cuh", "mhc.cuh", "rows.cuh", "engram.cuh", "limits.cuh",
)  # fmt: skip
"""The device functions, in the order in which they build on each other."""

FLAGS = ("-O3", "--std=c++17", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-diag-suppress", "177,186")


_KERNEL_BEGINS = 'extern "C" __global__'
_NULL = "((void*)v4c_null())"  # what TVM writes for the argument "null" (`launch`)


@dataclass(frozen=True)
class Resources:
    """What one kernel takes of a processor, as ptxas reports it.

    Attributes:
        registers: per thread.
        stack: bytes of local memory per thread: arrays that are not in registers.
        spilled: bytes written to local memory for want of registers, and read back.
        shared: bytes of static shared memory per block.
    """

    registers: int
    stack: int
    spilled: int
    shared: int


@dataclass(frozen=True)
class Binary:
    """Compiled code.

    Attributes:
        data: the bytes that the driver loads.
        kind: ``"fatbin"`` or ``"cubin"``.
        resources: by kernel.
        compiler: name and version.
    """

    data: bytes
    kind: str
    resources: dict[str, Resources]
    compiler: str


def device_source() -> str:
    """The text of all device functions."""
    return "\n".join((SOURCE / name).read_text() for name in HEADERS)


def nvcc() -> str | None:
    """Path of nvcc, None where there is none."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [Path(h) / "bin" / "nvcc" for h in homes if h]
    on_path = shutil.which("nvcc")
    candidates += [Path(p) for p in (on_path, "/usr/local/cuda/bin/nvcc") if p]
    return next((str(c) for c in candidates if c.is_file() and os.access(c, os.X_OK)), None)


def compile_source(source: str, architecture: Architecture) -> Binary:
    """Machine code and PTX of CUDA `source` (without the device functions, which are put in front).

    Raises:
        UnsupportedError: neither nvcc nor NVRTC is installed.
        Error: the compiler refuses the source; its first error is in the message.
    """
    compiler = nvcc()
    if compiler is not None:
        return _with_nvcc(compiler, with_device_functions(source), architecture)
    if nvrtc.available():
        return _with_nvrtc(source, architecture)
    raise UnsupportedError(
        "target cuda: expected nvcc (CUDA_HOME, PATH or /usr/local/cuda) or NVRTC (pip install 'v4c[cuda]'), "
        "found neither"
    )


def with_device_functions(source: str) -> str:
    """TVM's source with the device functions behind its own headers and before its first kernel."""
    kernels = first_kernel_on(source)
    return f"{source[: source.find(_KERNEL_BEGINS)]}\n{device_source()}\n{kernels}" if kernels else source


def first_kernel_on(source: str) -> str:
    """TVM's source from its first kernel on; empty where it has none."""
    first = source.find(_KERNEL_BEGINS)
    return source[first:].replace(_NULL, "nullptr") if first >= 0 else ""


@cache
def version(compiler: str) -> str:
    """``nvcc`` and its release, such as ``nvcc 13.0.88``."""
    text = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", text)
    return f"nvcc {found[1]}" if found else "nvcc"


def gencode(architecture: Architecture) -> list[str]:
    """nvcc's arguments for machine code of `architecture` and PTX for chips after it."""
    virtual, real = architecture.name.replace("sm_", "compute_"), architecture.name
    kept = architecture.virtual
    return ["-gencode", f"arch={virtual},code={real}", "-gencode", f"arch={kept},code={kept}"]


def _with_nvcc(compiler: str, text: str, architecture: Architecture) -> Binary:
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "kernels.cu", Path(folder) / "kernels.fatbin"
        source.write_text(text)
        command = [compiler, "--fatbin", *FLAGS, *gencode(architecture), "-o", str(binary), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Error(f"nvcc: expected {architecture.name} code, found: {_first_error(done.stderr + done.stdout)}")
        return Binary(binary.read_bytes(), "fatbin", dict(resources(done.stderr + done.stdout)), version(compiler))


def _with_nvrtc(source: str, architecture: Architecture) -> Binary:
    data, log = nvrtc.fat_binary(first_kernel_on(source), device_source(), architecture)
    return Binary(data, "fatbin", dict(resources(log)), nvrtc.version())


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no message")


_KERNEL = re.compile(r"Compiling entry function '([^']+)' for '([^']+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def resources(log: str) -> Iterator[tuple[str, Resources]]:
    """Kernels and what they take, from what ``ptxas -v`` prints."""
    name, stack, spilled = "", 0, 0
    for line in log.splitlines():
        if found := _KERNEL.search(line):
            name, stack, spilled = found[1], 0, 0
        elif found := _STACK.search(line):
            stack, spilled = int(found[1]), int(found[2]) + int(found[3])
        elif (found := _USED.search(line)) and name:
            shared = _SHARED.search(line)
            yield name, Resources(int(found[1]), stack, spilled, int(shared[1]) if shared else 0)
            name = ""


def source_digest() -> str:
    """SHA-256 of the device functions: what measured schedules belong to."""
    return hashlib.sha256(device_source().encode()).hexdigest()
