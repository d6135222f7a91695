"""Promise: an operator of your own is one declaration and one kernel; a pass of your own puts it into the graph.

`python examples/add_custom_op.py [FOLDER]` caps the logits of v4-nano softly, ``cap * tanh(logits / cap)``, as Gemma 2
does, inside the compiled model, and checks the result against the torch reference.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
import tvm
from onnxscript import opset23 as op
from onnxscript import script
from onnxscript.onnx_types import FLOAT
from onnxscript.values import Opset
from tvm.script import tirx as T

import v4c
from v4c import extend
from v4c.frontend.initialise import RandomCheckpoint
from v4c.frontend.model.model import V4Model
from v4c.passes.onnx.rewriting import PassReport

CAP = 0.5
# One sliding layer, which compiles in some seconds.
CONFIG = replace(v4c.preset("v4-nano"), num_hidden_layers=1, attention_types=("sliding",), mlp_types=("topk",))


def soft_cap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """``cap * tanh(x / cap)``: the torch reference, from which shapes and ``torch.ops.v4c.soft_cap`` follow."""
    return cap * torch.tanh(x / cap)


@script(Opset("v4c", 1), default_opset=op)
def SoftCap(x: FLOAT[...], cap: float) -> FLOAT[...]:  # the body by which any ONNX runtime runs it
    scale = op.Constant(value_float=cap)
    return op.Mul(op.Tanh(op.Div(x, scale)), scale)


extend.define(
    "SoftCap", soft_cap, inputs=("x",), outputs=("y",), attributes={"cap": float},
    shape_rule=lambda inputs, attributes: (inputs[0],), functions=(SoftCap,),
)  # fmt: skip


def soft_cap_kernel(width: int, cap: float) -> tvm.tirx.PrimFunc:
    """The CPU kernel: static sizes from the factory's arguments, the others read from the tensors."""

    @T.prim_func(private=True, s_tir=True)
    def kernel(x_: T.handle, y_: T.handle):
        b = T.int64()
        s = T.int64()
        x = T.match_buffer(x_, (b, s, T.int64(width)), "float32")
        y = T.match_buffer(y_, (b, s, T.int64(width)), "float32")
        for row in T.parallel(b * s):
            for i in range(T.int64(width)):
                y[row // s, row % s, i] = T.float32(cap) * T.tanh(x[row // s, row % s, i] / T.float32(cap))

    return kernel


extend.add_kernel("SoftCap", lambda i, a: extend.Kernel(soft_cap_kernel, (int(i["x"].shape[2]), a["cap"])))


class CapLogits:
    """The pass: a `SoftCap` behind the output projection, in the head for one token and in that for all."""

    pass_name = "cap-logits"

    def run(self, model: ir.Model) -> PassReport:
        heads = [f for f in model.functions.values() if f.name in ("Head", "HeadAll")]
        for head in heads:
            product = [node for node in head if node.op_type == "MatMul"][-1]
            logits = product.outputs[0]
            cap = ir.node("SoftCap", [logits], {"cap": CAP}, domain="v4c")
            cap.outputs[0].shape, cap.outputs[0].type = logits.shape, logits.type
            logits.replace_all_uses_with(cap.outputs[0], replace_graph_outputs=True)
            cap.replace_input_with(0, logits)
            head.insert_after(product, cap)
        return PassReport(self.pass_name, len(heads))


extend.add_onnx_pass(CapLogits, before="fuse-rms-norm")

folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
v4c.compile(CONFIG, folder / "capped.v4c")

prompt = np.arange(1, 40)[None]
capped = v4c.load(folder / "capped.v4c").new_session().prefill(prompt)
plain = V4Model.from_source(RandomCheckpoint(CONFIG)).logits(torch.from_numpy(prompt))[:, -1].numpy()
difference = np.abs(capped - CAP * np.tanh(plain / CAP)).max()
print(f"largest logit {plain.max():.3f}, capped {capped.max():.3f}; largest difference from torch: {difference:.1e}")
assert capped.max() < CAP < plain.max()
assert difference < 1e-4
