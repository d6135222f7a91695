"""Runs the programs of an op one after another, as a launch plan would, and takes each through the gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch

from v4c.targets.ascend.devices import DEVICES
from v4c.targets.ascend.gates import Example, check
from v4c.targets.ascend.program import DeviceLimits, TileProgram
from v4c.targets.ascend.tile_simulator import simulate

Buffers = dict[str, np.ndarray]

EACH_DEVICE = ("Ascend910B1", pytest.param("Ascend950PR_9599", marks=pytest.mark.slow))
"""Where gates of a whole op are run: on one device in every run of the tests, on the other with the slow ones."""


def limits(device: str = "Ascend910B1") -> DeviceLimits:
    return DEVICES[device].limits


def run(programs: Sequence[TileProgram], scalars: Mapping[str, int], buffers: Mapping[str, np.ndarray]) -> Buffers:
    """`buffers` and what the programs wrote; buffers of one name are one buffer."""
    after = dict(buffers)
    for program in programs:
        after |= simulate(program, after, scalars)
    return after


def gate(
    programs: Sequence[TileProgram], device: str, scalars: Mapping[str, int], buffers: Mapping[str, np.ndarray],
    tolerance: float = 5e-3,
) -> None:  # fmt: skip
    """Every program passes every gate on `device`, its scheduled code on the data it meets in the op."""
    after = dict(buffers)
    for program in programs:
        inputs = {a.name: after[a.name] for a in program.arguments if a.name in after}
        report = check(program, device, Example(inputs, scalars, scheduled_tolerance=tolerance))
        assert report.ok, "; ".join(map(str, report.failures))
        assert not report.omitted
        after |= simulate(program, after, scalars)


def accept(programs: Sequence[TileProgram], device: str) -> None:
    """Every program is compiled, linked and sane for `device`; nothing is run."""
    for program in programs:
        report = check(program, device)
        assert report.ok, "; ".join(map(str, report.failures))


def error(found: np.ndarray, expected: np.ndarray | torch.Tensor) -> float:
    """Largest difference, relative to the largest magnitude expected; infinite where anything found is no number."""
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    if not a.size:
        return 0.0
    return float(np.nan_to_num(np.abs(a - b).max(), nan=np.inf) / max(float(np.abs(b).max()), 1e-9))


def reference(array: np.ndarray) -> torch.Tensor:
    """As the ops' torch references take it: float32, or int64."""
    whole = array.dtype.kind in "iu"
    return torch.from_numpy(array.astype(np.int64 if whole else np.float32))


class Draw:
    """Random arrays."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = np.random.default_rng(seed)

    def __call__(self, *shape: int, dtype: str = "float32", scale: float = 1.0) -> np.ndarray:
        return (self.generator.standard_normal(shape) * scale).astype(np.dtype(dtype))

    def whole(self, low: int, high: int, *shape: int, dtype: str = "int32") -> np.ndarray:
        return self.generator.integers(low, high, shape).astype(dtype)
