"""Compiles CUDA source with NVRTC and nvFatbin, NVIDIA's compiler as libraries, from PyPI: where there is no nvcc.

What TVM writes in front of its kernels needs headers of further packages, and none of it is used: the device functions
and a few names of types stand in its place.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from v4c.errors import Error, UnsupportedError

from .architectures import Architecture

PACKAGES = ("cuda.bindings", "nvidia.cu13")
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
_FLAGS = ("--std=c++17", "--ptxas-options=-v", "--diag-suppress=177,186,1046")


def available() -> bool:
    """Whether the packages are installed."""
    return importlib.util.find_spec("cuda") is not None and all(map(importlib.util.find_spec, PACKAGES))


def version() -> str:
    """``nvrtc`` and its release, such as ``nvrtc 13.0``."""
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    return f"nvrtc {major}.{minor}"


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
    from cuda.bindings import nvfatbin

    cubin, log = compile_cubin(kernels, device_source, architecture)
    text = _TYPES + device_source + kernels
    ptx, _ = _compile(text, architecture.virtual, "PTX")
    try:
        handle = nvfatbin.create(["-64"], 1)
        try:
            nvfatbin.add_cubin(handle, cubin, len(cubin), architecture.name.removeprefix("sm_"), "kernels")
            name = architecture.virtual.removeprefix("compute_")
            nvfatbin.add_ptx(handle, ptx, len(ptx), name, "kernels", "")
            made = bytearray(nvfatbin.size(handle))
            nvfatbin.get(handle, made)
        finally:
            nvfatbin.destroy(handle)
    except Exception as error:
        raise UnsupportedError(f"nvFatbin (pip install 'v4c[cuda]'): expected a fat binary, found: {error}") from error
    return bytes(made), log


def compile_cubin(kernels: str, device_source: str, architecture: Architecture) -> tuple[bytes, str]:
    """Machine code alone, and what the compiler printed."""
    return _compile(_TYPES + device_source + kernels, architecture.name, "CUBIN")


def _compile(text: str, architecture: str, kind: str) -> tuple[bytes, str]:
    from cuda.bindings import nvrtc

    def call(name: str, *arguments: Any) -> Any:
        try:
            error, *results = getattr(nvrtc, name)(*arguments)
        except RuntimeError as problem:
            raise UnsupportedError(f"NVRTC (pip install 'v4c[cuda]'): expected it to load, found: {problem}") from None
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise Error(f"NVRTC: expected {architecture} code, found: {log() or error.name}")
        return results[0] if results else None

    def log() -> str:
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        printed = b" " * size
        nvrtc.nvrtcGetProgramLog(program, printed)
        lines = [line.strip() for line in printed.decode(errors="replace").splitlines()]
        return next((line for line in lines if "error" in line.lower()), "")

    program: Any = None
    program = call("nvrtcCreateProgram", text.encode(), b"kernels.cu", 0, [], [])
    try:
        options = [f"--gpu-architecture={architecture}", *_FLAGS, *(f"-I{folder}" for folder in _headers())]
        call("nvrtcCompileProgram", program, len(options), [option.encode() for option in options])
        printed = b" " * call("nvrtcGetProgramLogSize", program)
        call("nvrtcGetProgramLog", program, printed)
        made = b" " * call(f"nvrtcGet{kind}Size", program)
        call(f"nvrtcGet{kind}", program, made)
        return made, printed.decode(errors="replace")
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _headers() -> list[Path]:
    """Folders of NVIDIA's headers, of the package that comes with the CUDA runtime."""
    found = [Path(folder) / "nvidia" / "cu13" / "include" for folder in sys.path]
    return [folder for folder in found if (folder / "cuda_bf16.h").is_file()]
