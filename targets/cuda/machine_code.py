"""Reads a cubin without NVIDIA's tools: which kernels it has, and which instructions they are made of.

A cubin is an ELF file with a section ``.text.NAME`` per kernel. An instruction is 16 bytes from sm_70 on; its low
twelve bits are the opcode (as nvdisasm shows it beside the text).
"""

from __future__ import annotations

import struct
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from v4c.errors import Error

from . import nvrtc
from .architectures import Architecture
from .toolchain import FLAGS, device_source, first_kernel_on, with_device_functions

TENSOR_CORE = 0x23C  # HMMA: half-precision matrix multiply and add
MATRIX_LOAD = 0x83B  # LDSM: fragments out of shared memory
GLOBAL_LOAD, GLOBAL_STORE = 0x981, 0x986  # LDG, STG
ASYNC_COPY = 0xFAE  # LDGSTS: device memory into shared memory past the registers

_INSTRUCTION_BYTES = 16


def compile_cubin(compiler: str | None, source: str, architecture: Architecture) -> tuple[bytes, str]:
    """Machine code alone of CUDA `source`, by nvcc or, where `compiler` is None, NVRTC, and what the compiler printed.

    Raises:
        Error: it refuses the source.
    """
    if compiler is None:
        return nvrtc.compile_cubin(first_kernel_on(source), device_source(), architecture)
    with tempfile.TemporaryDirectory() as folder:
        text, cubin = Path(folder) / "kernels.cu", Path(folder) / "kernels.cubin"
        text.write_text(with_device_functions(source))
        virtual = architecture.name.replace("sm_", "compute_")
        target = ["-gencode", f"arch={virtual},code={architecture.name}"]
        command = [compiler, "--cubin", *FLAGS, *target, "-o", str(cubin), str(text)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Error(f"nvcc: {architecture.name}: {(done.stderr or done.stdout).strip()[:500]}")
        return cubin.read_bytes(), done.stderr + done.stdout


def opcodes(cubin: bytes) -> dict[str, Counter[int]]:
    """How often each opcode stands in each kernel of a 64-bit little-endian cubin."""
    return {name: Counter(found) for name, found in instructions(cubin).items()}


def instructions(cubin: bytes) -> dict[str, list[int]]:
    """The opcodes of each kernel of a 64-bit little-endian cubin, in their order."""
    if cubin[:6] != b"\x7fELF\x02\x01":
        raise Error("cubin: expected a 64-bit ELF file, found something else")
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    start_of_names = sections[names][4]
    found: dict[str, list[int]] = {}
    for name_at, _, _, _, start, length in sections:
        begin = start_of_names + name_at
        name = cubin[begin : cubin.index(b"\0", begin)].decode()
        if name.startswith(".text."):
            words = (cubin[i : i + 2] for i in range(start, start + length, _INSTRUCTION_BYTES))
            found[name.removeprefix(".text.")] = [int.from_bytes(w, "little") & 0xFFF for w in words]
    return found
