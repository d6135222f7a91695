"""Builds the simulated driver, and kernels for it: the text that nvcc compiles, compiled by g++ for this processor.

TVM's own CUDA runtime then loads, launches and captures as on a GPU. It shows that kernels and runtime are right -
sums, indices, barriers, copies, arguments, graphs - and nothing of how fast they are.
"""

from __future__ import annotations

import ctypes
import re
import struct
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from v4c.errors import Error, UnsupportedError

from ..toolchain import Binary, device_source, first_kernel_on

_HERE = Path(__file__).parent
_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-w", "-fno-strict-aliasing", "-fpermissive")
_DYNAMIC = re.compile(r"extern __shared__ [^;]*?\buchar (\w+)\[\];")
_KERNEL = re.compile(r'extern "C" __global__ void(?: __launch_bounds__\(\d+\))? (\w+)\(')
_MAGIC = b"V4CSIM01"


def build_driver(folder: Path) -> tuple[Path, Path]:
    """``libcuda.so.1`` and ``libcudart.so.13`` of the simulated device, in `folder`."""
    driver, runtime = folder / "libcuda.so.1", folder / "libcudart.so.13"
    versions = folder / "versions.map"
    versions.write_text("libcudart.so.13 { global: cuda*; };\n")
    _compile([*_FLAGS, f"-Wl,-soname,{driver.name}", str(_HERE / "driver.cc"), "-o", str(driver), "-ldl"])
    _compile([
        *_FLAGS, f"-Wl,-soname,{runtime.name}", f"-Wl,--version-script={versions}", str(_HERE / "runtime.cc"),
        "-o", str(runtime), str(driver),
    ])  # fmt: skip
    return driver, runtime


@cache
def load_driver() -> None:
    """Make the simulated device this process's CUDA device, for good."""
    folder = Path(tempfile.mkdtemp(prefix="v4c-simulated-gpu-"))
    for library in build_driver(folder):
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def compile_simulated(source: str) -> Binary:
    """Kernels of TVM's CUDA `source` for the simulated device."""
    kernels = _DYNAMIC.sub(r"uchar* \1 = sim_shared;", first_kernel_on(source))
    names = sorted(set(_KERNEL.findall(kernels)))
    lines = ['#include "device.h"', device_source(), "V4C_SIMULATED_INTRINSICS", kernels]
    for name in names:
        lines.append(
            f'extern "C" const SimKernel {name}__sim = {{[](void** a) {{ sim_call({name}, a); }}, sim_count({name})}};'
        )
    with tempfile.TemporaryDirectory() as folder:
        text, library = Path(folder) / "kernels.cc", Path(folder) / "kernels.so"
        text.write_text("\n".join(lines) + "\n")
        _compile([*_FLAGS, f"-I{_HERE}", str(text), "-o", str(library)])
        data = library.read_bytes()
    return Binary(_MAGIC + struct.pack("<Q", len(data)) + data, "cubin", {}, "g++")


def _compile(arguments: list[str]) -> None:
    try:
        done = subprocess.run(["g++", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UnsupportedError("simulated GPU: expected g++ to be installed, found none") from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        raise Error(f"simulated GPU: g++: {(errors or [done.stderr])[0]}")
