"""Runs a custom op by its CUDA kernel, and by its torch reference in float64."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch

from tests.targets.cuda.harness import run
from v4c.custom_ops import OPS, TensorSpec
from v4c.passes.relax.layouts import Storage
from v4c.targets.cuda.lowering import CUDAKernels
from v4c.targets.cuda.scheduling import scheduler

KERNELS = CUDAKernels(scheduler("sm_90a"))
ROUNDED_STORAGE = Storage("bfloat16", "bfloat16")
ROUNDED = KERNELS.storing(ROUNDED_STORAGE)
"""Those of a bfloat16 model."""


def results(
    name: str,
    inputs: Mapping[str, Any],
    schedule: Any = None,
    kernels: CUDAKernels = KERNELS,
    on_host: Collection[str] = (),
    **attributes: int | float,
) -> tuple[dict[str, np.ndarray], dict[str, torch.Tensor]]:
    """Outputs by name, of the kernel and of the reference.

    Args:
        name: the op's ONNX name.
        inputs: arrays or tensors by the op's names of them; floats may be NaN where they must not be read.
        schedule: in place of the default one.
        kernels: which to call.
        on_host: names of inputs that stay in host memory.
        attributes: of the op.
    """
    op = OPS[name]
    tensors = [torch.as_tensor(inputs[n]) for n in op.inputs]
    specs = [TensorSpec(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in tensors]
    kernel = kernels.custom(op, specs, attributes)
    arguments = kernel.arguments if schedule is None else (*kernel.arguments[:-1], schedule)
    shapes = list(zip(op.outputs, op.shape_rule(specs, attributes), strict=True))
    fresh = [(tuple(s.shape), s.dtype) for n, s in shapes if n not in op.writes]
    places = [op.inputs.index(n) for n in on_host]
    called = run(kernel.factory, arguments, [t.clone() for t in tensors], fresh, places)
    made, found = iter(called.outputs), {}
    for output in op.outputs:
        written = op.writes.get(output)
        found[output] = next(made) if written is None else called.inputs[op.inputs.index(written)]
    exact = [t.double() if t.is_floating_point() else t.clone() for t in tensors]
    expected = op.reference(*exact, *attributes.values())
    expected = expected if isinstance(expected, tuple) else (expected,)
    return found, dict(zip(op.outputs, expected, strict=True))


def check(
    name: str,
    inputs: Mapping[str, Any],
    bound: float,
    schedule: Any = None,
    live: Any = None,
    kernels: CUDAKernels = KERNELS,
    on_host: Collection[str] = (),
    **attributes: int | float,
) -> None:
    """Assert that both agree to `bound`, indices exactly; `live` is a mask of the tokens [B, S] that count."""
    found, expected = results(name, inputs, schedule, kernels, on_host, **attributes)
    op = OPS[name]
    for output, value in found.items():
        reference = expected[output].numpy()
        if live is not None and output not in op.writes:
            value, reference = value[live], reference[live]
        if value.dtype == np.int64:
            np.testing.assert_array_equal(value, reference, err_msg=f"{name} {output}")
        else:
            same = np.where(np.isnan(reference), 0, np.abs(value - reference))
            assert same.max(initial=0) <= bound, f"{name} {output}: off by {same.max()}"
            assert not np.isnan(value[~np.isnan(reference)]).any(), f"{name} {output}: NaN"
