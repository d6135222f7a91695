"""Compile one CUDA kernel and call it with NumPy arrays: on the simulated GPU, or with ``pytest -m gpu`` on a real one.

Outputs and a kernel's own memory start as NaN; on the simulated device every argument also ends where memory does, so
that a read or write behind it is fatal.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch

from v4c.runtime.dtypes import DTYPES
from v4c.runtime.host_memory import HostTable
from v4c.runtime.tensors import aligned_zeros, tensor_over


def real() -> bool:
    """Whether kernels are to run on a real GPU, as conftest.py says once tests are collected."""
    return os.environ.get("V4C_TEST_GPU") == "1"


class Result(NamedTuple):
    """What a call leaves behind: the outputs in order, and the inputs, of which state was updated in place."""

    outputs: list[np.ndarray]
    inputs: list[np.ndarray]


@functools.cache
def prepare() -> str:
    """The device's libraries; the architecture that code is made for."""
    import pytest

    from v4c.errors import UnsupportedError
    from v4c.runtime import cuda_library
    from v4c.targets.cuda import device_module
    from v4c.targets.cuda.simulator.build import load_driver
    from v4c.targets.cuda.target import CUDATarget

    if real():
        try:
            cuda_library.find_device()
        except UnsupportedError as error:
            pytest.skip(str(error))
    else:
        load_driver()
    device_module.load_runtime()
    return CUDATarget.parse("").architecture.name


@functools.cache
def compiled(factory: Callable[..., Any], *arguments: Any) -> Any:
    """Compile ``factory(*arguments)`` once; later calls with equal arguments return the same kernel."""
    import tvm

    from v4c.targets.cuda import architectures, device_module, toolchain
    from v4c.targets.cuda.simulator.build import compile_simulated
    from v4c.targets.cuda.target import CUDATarget

    architecture = architectures.find(prepare())
    compiler = functools.partial(toolchain.compile_source, architecture=architecture) if real() else compile_simulated
    function = factory(*arguments).with_attr("global_symbol", "main")
    with device_module.machine_code(compiler):
        return tvm.compile(tvm.IRModule({"main": function}), target=CUDATarget(architecture).tvm_target())


def run(
    factory: Callable[..., Any],
    arguments: Sequence[Any],
    inputs: Sequence[Any],
    outputs: Sequence[tuple[tuple[int, ...], str]],
    on_host: Collection[int] = (),
) -> Result:
    """Build the kernel, and call it with copies of `inputs`, fresh `outputs` and the memory it needs.

    `on_host` are the places of inputs that stay in host memory.

    Raises:
        AssertionError: part of an output was left unwritten.
    """
    import tvm

    from v4c.targets.cuda.launch import SCRATCH

    kernel = compiled(factory, *arguments)
    arrays = [_array(a) for a in inputs]
    function = factory(*arguments)
    sizes = _sizes(function, arrays)
    own = [
        (tuple(_evaluate(d, sizes) for d in p.ty.shape), str(p.ty.dtype))
        for p in list(function.params)[len(function.params) - int(function.attrs[SCRATCH]) :]
    ]
    made = [_poisoned(shape, dtype) for shape, dtype in (*outputs, *own)]
    device = tvm.cuda(0)
    tensors = [
        _in_host_memory(a) if place in on_host else _on_device(a, device) for place, a in enumerate((*arrays, *made))
    ]
    kernel["main"](*tensors)
    device.sync()
    found = [_from_device(t) for t in tensors]
    results = found[len(arrays) : len(arrays) + len(outputs)]
    for number, array in enumerate(results):
        unwritten = array == _INT if array.dtype == np.int64 else np.isnan(array)
        assert not unwritten.any(), f"output {number}: {unwritten.sum()} of {array.size} elements unwritten or NaN"
    return Result(results, found[: len(arrays)])


_INT = -(2**40) - 7


def _array(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        if value.dtype == torch.bfloat16:
            return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return value.numpy()
    return np.asarray(value)


def _poisoned(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    if dtype in ("int32", "int64"):
        return np.full(shape, _INT if dtype == "int64" else -7, dtype)
    return np.full(shape, np.nan, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def _on_device(array: np.ndarray, device: Any) -> Any:
    import tvm

    tensor = tvm.runtime.empty(array.shape, str(array.dtype), device)
    host = aligned_zeros(array.shape, DTYPES[str(array.dtype)].storage if str(array.dtype) in DTYPES else array.dtype)
    host[...] = array.view(host.dtype)
    if array.dtype == ml_dtypes.bfloat16:
        tensor_over(host, "bfloat16").copyto(tensor)
    else:
        tensor.copyfrom(host)
    return tensor


def _in_host_memory(array: np.ndarray) -> Any:
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"before" + array.tobytes())
        file.flush()
        return HostTable("table", Path(file.name), len("before")).load(array.shape, str(array.dtype))


def _from_device(tensor: Any) -> np.ndarray:
    if str(tensor.dtype) == "bfloat16":
        return np.zeros(0, np.float32)
    return np.array(tensor.numpy())


def _sizes(function: Any, arrays: Sequence[np.ndarray]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for param, array in zip(function.params, arrays, strict=False):
        for dim, found in zip(param.ty.shape, array.shape, strict=True):
            if not str(dim).isdecimal():
                sizes.setdefault(str(dim), found)
    return sizes


def _evaluate(dim: Any, sizes: dict[str, int]) -> int:
    from tvm import sym, tirx

    analyzer = sym.Analyzer()
    for variable in _variables(dim):
        analyzer.bind(variable, tirx.IntImm("int64", sizes[variable.name]))
    return int(analyzer.simplify(dim))


def _variables(dim: Any) -> list[Any]:
    from tvm import tirx

    if isinstance(dim, tirx.Var):
        return [dim]
    parts = [getattr(dim, side) for side in ("a", "b") if hasattr(dim, side)]
    return [v for part in parts for v in _variables(part)]
