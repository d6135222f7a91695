"""Compiles CUDA source with NVRTC and nvFatbin, NVIDIA's compiler as libraries, from PyPI: where there is no nvcc.

What TVM writes in front of its kernels needs headers of further packages, and none of it is used: the device functions
and a few names of types stand in its place.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from v4c.errors import Error, UnsupportedError

from .architectures import Architecture

PACKAGES = ("nvidia-cuda-nvrtc", "nvidia-nvfatbin", "nvidia-cuda-runtime", "cuda-bindings")
"""Of the extra ``cuda``; the runtime has the headers."""

_TYPES = """
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
"""
_REFUSED = 3  # exit status
_FLAGS = ("--std=c++17", "--ptxas-options=-v", "--diag-suppress=177,186,1046")


def available() -> bool:
    """Whether all packages are installed."""
    return all(_version(package) for package in PACKAGES)


def version() -> str:
    """``nvrtc`` and its release, such as ``nvrtc 13.0.88``."""
    return f"nvrtc {_version(PACKAGES[0])}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def fat_binary(kernels: str, device_source: str, architecture: Architecture) -> tuple[bytes, str]:
    """Machine code of an architecture with PTX for chips after it, and what the compiler printed of the former.

    Args:
        kernels: CUDA source from the first kernel on.
        device_source: of the device functions.
        architecture: what to compile for.

    Raises:
        UnsupportedError: a package is incomplete.
        Error: the compiler refuses the source; its first error is in the message.
    """
    return _in_child(kernels, device_source, architecture, "fatbin")


def compile_cubin(kernels: str, device_source: str, architecture: Architecture) -> tuple[bytes, str]:
    """Machine code alone, and what the compiler printed; arguments and errors as of `fat_binary`."""
    return _in_child(kernels, device_source, architecture, "cubin")


def _in_child(kernels: str, device_source: str, architecture: Architecture, kind: str) -> tuple[bytes, str]:
    """What `main` makes in a process of its own: where TVM has compiled with its LLVM, NVRTC crashes with its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "kernels.cu").write_text(_TYPES + device_source + kernels)
        command = [sys.executable, "-m", "v4c.targets.cuda.nvrtc", name, architecture.name, architecture.virtual, kind]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == _REFUSED:
            raise Error(f"NVRTC: expected {architecture.name} code, found: {done.stdout.strip()}")
        if done.returncode:
            found = (done.stdout or done.stderr).strip().splitlines() or [f"exit status {done.returncode}"]
            raise UnsupportedError(f"NVRTC (pip install 'v4c[cuda]'): expected machine code, found: {found[-1]}")
        return (folder / "kernels.out").read_bytes(), (folder / "log").read_text()


def main(folder: Path, real: str, virtual: str, kind: str) -> None:
    """Compile ``kernels.cu`` in `folder` to ``kernels.out`` and ``log``; exit status `_REFUSED` for bad source."""
    text = (folder / "kernels.cu").read_text()
    made, log = _compile(text, real, "CUBIN")
    if kind == "fatbin":
        made = _joined(made, real, _compile(text, virtual, "PTX")[0], virtual)
    (folder / "kernels.out").write_bytes(made)
    (folder / "log").write_text(log)


def _joined(cubin: bytes, real: str, ptx: bytes, virtual: str) -> bytes:
    """A fat binary of both."""
    from cuda.bindings import nvfatbin

    handle = nvfatbin.create(["-64"], 1)
    try:
        nvfatbin.add_cubin(handle, cubin, len(cubin), real.removeprefix("sm_"), "kernels")
        nvfatbin.add_ptx(handle, ptx, len(ptx), virtual.removeprefix("compute_"), "kernels", "")
        made = bytearray(nvfatbin.size(handle))
        nvfatbin.get(handle, made)
        return bytes(made)
    finally:
        nvfatbin.destroy(handle)


def _compile(text: str, architecture: str, kind: str) -> tuple[bytes, str]:
    from cuda.bindings import nvrtc

    def call(name: str, *arguments: Any) -> Any:
        error, *results = getattr(nvrtc, name)(*arguments)
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"{name}: {error.name}")
        return results[0] if results else None

    def filled(what: str) -> bytes:
        """What the library writes into a string of ours; Python shares short ones, and this must be nobody else's."""
        memory = b"".join((b" " * call(f"nvrtcGet{what}Size", program), b"  "))
        call(f"nvrtcGet{what}", program, memory)
        return memory[:-2]

    program = call("nvrtcCreateProgram", text.encode(), b"kernels.cu", 0, [], [])
    options = [f"--gpu-architecture={architecture}", *_FLAGS, *(f"-I{folder}" for folder in _headers())]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    log = filled("ProgramLog").rstrip(b"\0").decode(errors="replace")
    if error == nvrtc.nvrtcResult.NVRTC_ERROR_COMPILATION:
        print(next((line.strip() for line in log.splitlines() if "error" in line.lower()), error.name))
        raise SystemExit(_REFUSED)
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"nvrtcCompileProgram: {error.name}")
    return filled(kind), log


def _headers() -> list[Path]:
    """Folders of NVIDIA's headers, of the package that comes with the CUDA runtime."""
    found = [Path(folder) / "nvidia" / "cu13" / "include" for folder in sys.path]
    return [folder for folder in found if (folder / "cuda_bf16.h").is_file()]


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
