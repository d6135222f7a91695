"""Promise: a pass of your own runs where you say, shows in ``--dump-ir``, and can be switched off by name.

`python examples/add_pass.py [FOLDER]` removes the clamps of every SwiGLU from v4-nano, as an ablation study would, and
checks the compiled model against the torch reference of a config without clamps.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

import v4c
from v4c import extend
from v4c.frontend.initialise import RandomCheckpoint
from v4c.frontend.model.model import V4Model
from v4c.passes.onnx.rewriting import PassReport

NO_LIMIT = 1e9
CLAMPED = ("GroupedExperts", "ClampedSwiGLU")


class RemoveClamps:
    """Set the attribute `limit` of every operator that clamps, in each layer function, to a bound nothing reaches."""

    pass_name = "remove-clamps"

    def run(self, model: ir.Model) -> PassReport:
        nodes = [node for function in model.functions.values() for node in function if node.op_type in CLAMPED]
        for node in nodes:
            node.attributes["limit"] = ir.AttrFloat32("limit", NO_LIMIT)
        return PassReport(self.pass_name, len(nodes))


# Where experts and the shared expert's SwiGLU have become operators, and no later pass has joined the two yet.
extend.add_onnx_pass(RemoveClamps, before="fuse-shared-expert")

# One sliding layer, which compiles in some seconds, and a tight limit, so that the clamps matter with random weights.
layer = {"num_hidden_layers": 1, "attention_types": ("sliding",), "mlp_types": ("topk",)}
config = replace(v4c.preset("v4-nano"), **layer, swiglu_limit=0.05)
folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
v4c.compile(config, folder / "free.v4c")  # with disable_passes=["remove-clamps"] it would be as the config says

prompt = np.arange(1, 60)[None]
free = v4c.load(folder / "free.v4c").new_session().prefill(prompt)
unclamped, clamped = (
    V4Model.from_source(RandomCheckpoint(c)).logits(torch.from_numpy(prompt))[:, -1].numpy()
    for c in (replace(config, swiglu_limit=NO_LIMIT), config)
)
print(f"against torch without clamps: {np.abs(free - unclamped).max():.1e}")
print(f"what the clamps change: {np.abs(clamped - unclamped).max():.3f}")
assert np.abs(free - unclamped).max() < 1e-4 < np.abs(clamped - unclamped).max()
