"""The libraries that CUDA artifacts run on: NVIDIA's driver, the CUDA runtime, and TVM's part for CUDA.

Each is looked for once, and what is missing is said in one line. None of them is needed by artifacts of other targets.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from v4c.errors import UnsupportedError

DRIVER, RUNTIME, TVM = "libcuda.so.1", "libcudart.so.13", "libtvm_runtime_cuda.so"

_MAJOR, _MINOR, _PROCESSORS = 75, 76, 16  # CUdevice_attribute


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        name: as the driver gives it.
        capability: compute capability, major and minor.
        processors: number of multiprocessors.
    """

    name: str
    capability: tuple[int, int]
    processors: int


@cache
def open_driver() -> ctypes.CDLL:
    """NVIDIA's driver, loaded and not yet asked for anything; UnsupportedError where there is none."""
    try:
        return ctypes.CDLL(DRIVER, ctypes.RTLD_GLOBAL)
    except OSError:
        raise UnsupportedError(f"target cuda: expected NVIDIA's driver ({DRIVER}), found none") from None


@cache
def find_device() -> Device:
    """The first GPU.

    Raises:
        UnsupportedError: there is no driver, or it knows no GPU.
    """
    driver = open_driver()
    count = ctypes.c_int(0)
    error = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if error or count.value == 0:
        found = f"CUDA error {error}" if error else "none"
        raise UnsupportedError(f"target cuda: expected an NVIDIA GPU that the driver can use, found {found}")
    device, name = ctypes.c_int(0), ctypes.create_string_buffer(256)
    driver.cuDeviceGet(ctypes.byref(device), 0)
    driver.cuDeviceGetName(name, len(name), device)

    def attribute(number: int) -> int:
        value = ctypes.c_int(0)
        driver.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return value.value

    return Device(name.value.decode(), (attribute(_MAJOR), attribute(_MINOR)), attribute(_PROCESSORS))


@cache
def open_runtime() -> ctypes.CDLL:
    """The CUDA runtime, loaded: of the system, of PyPI's ``nvidia-cuda-runtime``, or of a toolkit.

    Raises:
        UnsupportedError: there is none.
    """
    for candidate in (RUNTIME, *map(str, _runtime_files())):
        try:
            return ctypes.CDLL(candidate, ctypes.RTLD_GLOBAL)
        except OSError:
            continue
    raise UnsupportedError(
        f"target cuda: expected the CUDA runtime ({RUNTIME}: pip install nvidia-cuda-runtime, or a toolkit), found none"
    )


def _runtime_files() -> Iterator[Path]:
    for folder in sys.path:
        yield Path(folder) / "nvidia" / "cu13" / "lib" / RUNTIME
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home:
            yield from (Path(home) / part / RUNTIME for part in ("lib64", "lib"))


@cache
def open_tvm() -> None:
    """TVM's CUDA runtime, after the two others and ``libtvm_runtime.so``.

    Raises:
        UnsupportedError: the installed apache-tvm has none, or it does not load.
    """
    spec = importlib.util.find_spec("tvm")  # finds the folder; importing it would load the compiler
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    library = next((f for f in (Path(folder) / "lib" / TVM for folder in folders) if f.exists()), None)
    if library is None:
        raise UnsupportedError(
            f"target cuda: expected TVM's CUDA runtime ({TVM}) in the installed apache-tvm, found none"
        )
    try:
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise UnsupportedError(f"target cuda: expected TVM's CUDA runtime to load, found: {error}") from None
