"""Compile one CPU kernel and call it with NumPy arrays: what every kernel test needs.

Every argument lies between guard bytes, and outputs start filled with a sentinel, so a kernel that writes outside an
argument, or leaves part of an output unwritten, is caught by the harness itself. The guard bytes are NaN as a float, so
that a value read from outside shows in the result.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TVM_NUM_THREADS", "2")  # read once, when TVM is imported

import ml_dtypes
import numpy as np
import tvm

from v4c.targets.cpu.kernels.pair_product import with_instruction
from v4c.targets.cpu.stack import on_stack

_ALIGNMENT = 64
_GUARD = 0xFF
_GUARD_BYTES = 256
_UNWRITTEN_INT = -(2**40) - 7


class Result(NamedTuple):
    """What a call leaves behind."""

    outputs: list[np.ndarray]
    """The outputs, in order."""
    inputs: list[np.ndarray]
    """The inputs after the call: state that a kernel updates in place is read from here."""


def target() -> tvm.target.Target:
    """The host's LLVM target, with AVX-512 where the host has it."""
    cpu_flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    kind: dict[str, Any] = {"kind": "llvm"}
    if "avx512_bf16" in cpu_flags:
        kind["mcpu"] = "znver4"
    return tvm.target.Target(kind)


@functools.lru_cache(maxsize=256)
def compiled(factory: Callable[..., tvm.tirx.PrimFunc], *args: Any, **kwargs: Any) -> tvm.runtime.Executable:
    """Compile ``factory(*args, **kwargs)`` once; later calls with equal arguments return the same kernel."""
    function = with_instruction(on_stack(factory(*args, **kwargs).with_attr("global_symbol", "main")))
    return tvm.compile(tvm.IRModule({"main": function}), target=target())


def run(
    kernel: tvm.runtime.Executable,
    inputs: Sequence[np.ndarray],
    outputs: Sequence[tuple[tuple[int, ...], str]],
) -> Result:
    """Call `kernel` with copies of `inputs`, then with fresh outputs.

    Args:
        kernel: what `compiled` returned.
        inputs: arrays in the order of the kernel's arguments; copied, so the caller's stay as they are.
        outputs: shape and dtype of each output that is not in place.

    Raises:
        AssertionError: the kernel wrote outside one of its arguments, or left part of an output unwritten.
    """
    held = [_guarded(a.shape, a.dtype) for a in inputs] + [_guarded(s, _dtype(d)) for s, d in outputs]
    arrays = [array for _, array in held]
    for array, source in zip(arrays, inputs, strict=False):
        array[...] = source
    made = arrays[len(inputs) :]
    for array in made:
        array[...] = _UNWRITTEN_INT if array.dtype == np.int64 else np.nan
    kernel["main"](*[_tensor(a) for a in arrays])
    for number, (raw, array) in enumerate(held):
        start = array.ctypes.data - raw.ctypes.data
        outside = np.concatenate([raw[:start], raw[start + array.nbytes :]])
        assert np.all(outside == _GUARD), f"argument {number}: written outside its bounds"
    for number, array in enumerate(made):
        unwritten = array == _UNWRITTEN_INT if array.dtype == np.int64 else np.isnan(array.astype(np.float32))
        assert not unwritten.any(), f"output {number}: {unwritten.sum()} of {array.size} elements unwritten or NaN"
    return Result(made, arrays[: len(inputs)])


def _dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def _guarded(shape: Sequence[int], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """An aligned array of `shape` and the byte array, filled with the guard value, that it lies in."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.full(size + 2 * _GUARD_BYTES + _ALIGNMENT, _GUARD, np.uint8)
    start = _GUARD_BYTES + -(raw.ctypes.data + _GUARD_BYTES) % _ALIGNMENT
    return raw, raw[start : start + size].view(dtype).reshape(shape)


def _tensor(array: np.ndarray) -> tvm.runtime.Tensor:
    """`array` as a TVM tensor over the same memory."""
    if array.dtype == _dtype("bfloat16"):
        import torch  # NumPy has no DLPack code for bfloat16

        return tvm.runtime.from_dlpack(torch.from_numpy(array.view(np.int16)).view(torch.bfloat16))
    return tvm.runtime.from_dlpack(array)
