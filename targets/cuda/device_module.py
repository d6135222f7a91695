"""Turns the CUDA source that TVM writes into machine code while a library is built, so that none is compiled later.

TVM hands its source to the global function ``ffi.Module.create.cuda``, which belongs to its CUDA runtime. That library
needs ``libcuda.so.1`` and ``libcudart.so.13``; where there is no driver, as on a build machine, stand-ins take their
place whose every call fails.
"""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from v4c.errors import Error, UnsupportedError
from v4c.runtime import cuda_library

from .toolchain import Binary

_CREATE = "ffi.Module.create.cuda"
_NO_DEVICE = 100  # cudaErrorNoDevice

# What TVM's CUDA runtime and `cuda_library` look up, for the stand-ins.
_DRIVER_FUNCTIONS = (
    "cuInit", "cuDriverGetVersion", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetAttribute", "cuDeviceGetName",
    "cuFuncSetAttribute", "cuGetErrorName", "cuGetErrorString", "cuLaunchKernelEx", "cuModuleGetFunction",
    "cuModuleLoadData", "cuModuleUnload", "cuTensorMapEncodeTiled",
)  # fmt: skip
_RUNTIME_FUNCTIONS = tuple(
    f"cuda{name}"
    for name in (
        "DeviceGetAttribute", "EventCreate", "EventDestroy", "EventElapsedTime", "EventRecord", "EventSynchronize",
        "Free", "FreeHost", "GetDevice", "GetDeviceCount", "GetDeviceProperties", "GetErrorName", "GetErrorString",
        "GetLastError", "GraphDestroy", "GraphExecDestroy", "GraphInstantiate", "GraphLaunch", "Malloc", "MallocHost",
        "MemGetInfo", "MemcpyAsync", "MemcpyPeerAsync", "PeekAtLastError", "SetDevice", "StreamBeginCapture",
        "StreamCreate", "StreamCreateWithFlags", "StreamDestroy", "StreamEndCapture", "StreamSynchronize",
        "StreamWaitEvent",
    )
)  # fmt: skip

Compiler = Callable[[str], Binary]


@contextlib.contextmanager
def machine_code(compiler: Compiler) -> Iterator[list[Binary]]:
    """While it lasts, TVM's CUDA source goes through `compiler`; yields what was made.

    An error of `compiler` reaches the caller as it is, not in the wrapping of TVM's calls.
    """
    import tvm

    load_runtime()
    create = tvm.get_global_func(_CREATE)
    made: list[Binary] = []
    failures: list[Error] = []

    def compiled(code: Any, kind: str, functions: Any, source: Any) -> Any:
        if kind != "cuda":
            return create(code, kind, functions, source)
        try:
            binary = compiler(code if isinstance(code, str) else bytes(code).decode())
        except Error as error:
            failures.append(error)
            raise
        made.append(binary)
        return create(binary.data, binary.kind, functions, {})

    tvm.register_global_func(_CREATE, compiled, override=True)
    try:
        yield made
    except Exception:
        if failures:
            raise failures[0] from None
        raise
    finally:
        tvm.register_global_func(_CREATE, create, override=True)


@cache
def load_runtime() -> None:
    """TVM's CUDA runtime, on the real libraries or on stand-ins."""
    import tvm  # noqa: F401  (loads the libraries that it is linked to)

    for opened, name, functions, versions in (
        (cuda_library.open_driver, cuda_library.DRIVER, _DRIVER_FUNCTIONS, ""),
        (cuda_library.open_runtime, cuda_library.RUNTIME, _RUNTIME_FUNCTIONS, "libcudart.so.13 { global: *; };\n"),
    ):
        try:
            opened()
        except UnsupportedError:
            _load_stand_in(name, functions, versions)
    cuda_library.open_tvm()


def _load_stand_in(name: str, functions: tuple[str, ...], versions: str) -> None:
    folder = Path(tempfile.mkdtemp(prefix="v4c-no-driver-"))
    source, script, library = folder / "stand_in.c", folder / "versions.map", folder / name
    source.write_text("".join(f"int {f}(void) {{ return {_NO_DEVICE}; }}\n" for f in functions))
    script.write_text(versions)
    command = ["g++", "-x", "c", "-shared", "-fPIC", f"-Wl,-soname,{name}", str(source), "-o", str(library)]
    if versions:
        command.append(f"-Wl,--version-script={script}")
    try:
        subprocess.run(command, check=True, capture_output=True)
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UnsupportedError(f"target cuda: expected g++ to make a stand-in for {name}, found: {error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
