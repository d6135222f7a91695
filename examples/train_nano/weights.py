"""The model's tensors while it is trained: how they begin, and how they go to and from a checkpoint's names.

Everything goes by checkpoint name, but each expert's matrix is a tensor of its own (``<stack>.<expert>``): Muon
orthogonalises matrices, and a stack of them is none.
"""

from __future__ import annotations

import math
import re

import numpy as np
import torch
from torch import Tensor

from examples.train_nano.config import Variant
from v4c.frontend.config import ModelConfig
from v4c.frontend.names import TensorInfo, expert_parts, mtp_specs, tensor_specs

# Written back into the streams: smaller at the start, so that depth does not blow the streams up.
_OUTPUTS = ("o_b_proj.weight", "down_proj.weight", "experts.down_proj", "engram.value_proj.weight")
_EXPERT = re.compile(r"(.+experts\.(?:gate_up|down)_proj)\.(\d+)")


def all_specs(config: ModelConfig) -> dict[str, TensorInfo]:
    """Every tensor of the model and of its MTP layer."""
    return tensor_specs(config) | mtp_specs(config)


def split_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Checkpoint tensors as the training forward takes them."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if expert_parts(name)[0]:
            out |= {f"{name}.{expert}": part.clone() for expert, part in enumerate(tensor)}
        else:
            out[name] = tensor
    return out


def join_experts(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """The inverse of `split_experts`, as arrays."""
    out: dict[str, np.ndarray] = {}
    stacks: dict[str, list[np.ndarray]] = {}
    for name, tensor in tensors.items():
        array, match = tensor.detach().numpy(), _EXPERT.fullmatch(name)
        if match is None:
            out[name] = array
        else:
            stacks.setdefault(match[1], []).append(array)
    return out | {name: np.stack(parts) for name, parts in stacks.items()}


def initial(variant: Variant, lookup: np.ndarray, seed: int) -> dict[str, Tensor]:
    """Untrained tensors; `lookup` is Engram's ``[V]`` table of compressed ids.

    Hyper-connections begin near the plain residual (mHC paper, section 4): every sublayer reads mostly one stream, in
    turn, writes to all, and mixes little. Weights of the norms are 1, biases and sinks 0.
    """
    generator = torch.Generator().manual_seed(seed)
    config, tensors = variant.config, {}
    for name, info in all_specs(config).items():
        if info.kind == "int64":
            tensors[name] = torch.from_numpy(_integers(config, name, info, lookup, seed))
        else:
            tensors[name] = _floats(config, name, info, generator)
    return split_experts(tensors)


def _integers(config: ModelConfig, name: str, info: TensorInfo, lookup: np.ndarray, seed: int) -> np.ndarray:
    if name.endswith("tid2eid"):
        order = np.random.default_rng(seed).random((info.shape[0], config.n_routed_experts))
        return order.argsort(axis=1)[:, : info.shape[1]].copy()
    engram = config.engram
    assert engram is not None
    if name == "model.engram_lookup":
        return lookup
    layer = int(name.split(".")[2])
    if name.endswith(".multipliers"):
        return engram.multipliers(layer, config.vocab_size)
    return engram.primes(layer) if name.endswith(".primes") else engram.offsets(layer)


def _floats(config: ModelConfig, name: str, info: TensorInfo, generator: torch.Generator) -> Tensor:
    shape, streams = info.shape, config.hc_mult
    if "norm" in name:
        return torch.ones(shape)
    if name.endswith(("_hc.base", "hc_base")):
        return _mixing_base(name, shape, streams)
    if name.endswith(("_hc.scale", "hc_scale")):
        return torch.full(shape, 0.1)
    if name.endswith(("sinks", "position_bias", "e_score_correction_bias")):
        return torch.zeros(shape)
    noise = torch.randn(shape, generator=generator)
    if "embed" in name:
        return noise * 0.5
    if name.endswith("lm_head.weight"):
        return noise * 0.02
    gain = 0.5 / math.sqrt(2 * config.num_hidden_layers) if name.endswith(_OUTPUTS) else 0.7
    return noise * (gain / math.sqrt(shape[-1]))


def _mixing_base(name: str, shape: tuple[int, ...], streams: int) -> Tensor:
    """Logits of the mixing weights; the stream that is read most goes round with the sublayers."""
    if name.endswith("hc_base"):
        return torch.full(shape, -math.log(max(1, streams - 1)))  # a mean over the streams
    number = 0 if name.startswith("mtp") else int(name.split(".")[2])
    reads = (2 * number + ("ffn_hc" in name)) % streams
    pre = torch.full((streams,), math.log(0.1 / 0.9))
    pre[reads] = math.log(0.7 / 0.3)
    return torch.cat([pre, torch.zeros(streams), (3.0 * torch.eye(streams)).flatten()])
