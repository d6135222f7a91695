"""Promise: a target of your own is one object: which kernels, how weights are packed, how the library is built.

`python examples/add_target.py [FOLDER]` adds ``portable``: code for any x86-64 processor that leaves its SwiGLU to a
kernel of its own and takes the rest from v4c, and checks it against the torch reference.
"""

import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import tvm
from tvm.script import tirx as T

import v4c
from v4c import extend
from v4c.frontend.initialise import RandomCheckpoint
from v4c.frontend.model.model import V4Model
from v4c.targets.cpu.lowering import CPUKernels
from v4c.targets.cpu.target import CPUTarget

# One sliding layer, which compiles in some seconds.
CONFIG = replace(v4c.preset("v4-nano"), num_hidden_layers=1, attention_types=("sliding",), mlp_types=("topk",))


def plain_swiglu(width: int, limit: float) -> tvm.tirx.PrimFunc:
    """``silu(min(gate, limit)) * clip(up, -limit, limit)``, one element after the other."""

    @T.prim_func(private=True, s_tir=True)
    def kernel(gate_: T.handle, up_: T.handle, y_: T.handle):
        b = T.int64()
        s = T.int64()
        gate = T.match_buffer(gate_, (b, s, T.int64(width)), "float32")
        up = T.match_buffer(up_, (b, s, T.int64(width)), "float32")
        y = T.match_buffer(y_, (b, s, T.int64(width)), "float32")
        top = T.float32(limit)
        for i in range(b):
            for j in range(s):
                for c in range(T.int64(width)):
                    x: T.float32 = T.min(gate[i, j, c], top)
                    y[i, j, c] = x / (T.float32(1) + T.exp(-x)) * T.max(T.min(up[i, j, c], top), -top)

    return kernel


class PortableKernels(CPUKernels):
    """Which kernel stands for which operator; a target for another device answers every method itself."""

    def custom(self, op, inputs, attributes):
        if op.name == "ClampedSwiGLU":
            return extend.Kernel(plain_swiglu, (int(inputs[0].shape[2]), attributes["limit"]))
        return super().custom(op, inputs, attributes)


@dataclass(frozen=True)
class Portable(CPUTarget):
    """The protocol of targets/base.py: name, features, kernels, notes, pack, build. Packing and build are the CPU's."""

    @property
    def name(self) -> str:
        return "cpu:portable"  # the runtime drives what begins with ``cpu``

    @cached_property
    def kernels(self) -> PortableKernels:
        return PortableKernels(self.level)


extend.add_target("portable", lambda variant: Portable("x86-64"))

folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
v4c.compile(CONFIG, folder / "portable.v4c", target="portable", disable_passes=["fuse-shared-expert"])
model = v4c.load(folder / "portable.v4c")

prompt = np.arange(1, 60)[None]
expected = V4Model.from_source(RandomCheckpoint(CONFIG)).logits(torch.from_numpy(prompt))[:, -1].numpy()
difference = np.abs(model.new_session().prefill(prompt) - expected).max()
print(f"{model.target.name}, features {list(model.target.cpu_features)}: largest difference {difference:.1e}")
assert "plain_swiglu" in model.manifest.build["kernels"]
assert difference < 1e-4
