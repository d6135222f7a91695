"""The parts of a model - embedding, one layer of each kind, head - as linalg functions.

As for ONNX (`v4c.frontend.trace`), weights and caches are arguments, and layers of one kind share one function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from v4c.frontend.config import ModelConfig
from v4c.frontend.model.caches import layer_caches
from v4c.frontend.model.model import DecoderLayer, Embedding, Head
from v4c.frontend.onnx_export import cache_shape
from v4c.frontend.trace import LayerCall

from .lowering import Inputs, Library, Lowered

DtypeOf = Callable[[str], torch.dtype]
"""Storage of a weight, by its name in `V4Model`."""

# Tables of which few rows are read: cast from their storage after the gather, not before.
_GATHERED = ("experts.gate_up_proj", "experts.down_proj", "embedding.weight")


@dataclass(frozen=True)
class Part:
    """One lowered part.

    Attributes:
        function: what it became.
        inputs: activations and caches, by name, in the order of the arguments.
        weights: names of the weights, relative to the module, following the inputs.
        outputs: activations and updated caches, by name, in the order of the results.
    """

    function: Lowered
    inputs: tuple[str, ...]
    weights: tuple[str, ...]
    outputs: tuple[str, ...]


class _Embed(nn.Module):
    """The embedding, cast from its storage after the lookup."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = Embedding(config)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.embedding(input_ids).to(torch.float32)


class _Traced(nn.Module):
    """A module whose parameters and buffers are arguments that follow its own, cast to float32 where it expects it."""

    def __init__(self, module: nn.Module, names: list[str], inputs: int) -> None:
        super().__init__()
        # Kept out of torch's registry: a registered child would be traced with its own parameters.
        self.__dict__["call"] = (module, names, inputs)

    def forward(self, *tensors: Tensor) -> Any:
        module, names, inputs = self.__dict__["call"]
        weights = {
            name: tensor if name.endswith(_GATHERED) or not tensor.is_floating_point() else tensor.to(torch.float32)
            for name, tensor in zip(names, tensors[inputs:], strict=True)
        }
        return functional_call(module, weights, tensors[:inputs])


def lower_embedding(library: Library, config: ModelConfig, dtype: DtypeOf) -> Part:
    """``input_ids -> streams``. `dtype` gives the storage of each weight by its name in `V4Model`."""
    inputs = Inputs()
    inputs.add("input_ids", ["batch", "chunk"], torch.int64)
    return _lower(library, "Embed", inputs, lambda: _Embed(config), "embed_tokens.", dtype, ["streams"])


def lower_head(library: Library, config: ModelConfig, all_logits: bool, dtype: DtypeOf) -> Part:
    """``streams, lengths -> logits``, of each row's last live token or of every token."""
    inputs = Inputs()
    inputs.add("streams", _streams(config))
    inputs.add("lengths", ["batch"], torch.int64)
    return _lower(
        library,
        "HeadAll" if all_logits else "Head",
        inputs,
        lambda: Head(config, all_logits),
        "head.",
        dtype,
        ["logits"],
    )


def lower_layer(library: Library, config: ModelConfig, layer: int, name: str, dtype: DtypeOf) -> Part:
    """``streams, input_ids, positions, lengths, inv_freq(, engram_lookup), caches... -> streams, caches...``."""
    inputs = Inputs()
    inputs.add("streams", _streams(config))
    inputs.add("input_ids", ["batch", "chunk"], torch.int64)
    inputs.add("positions", ["batch"], torch.int64)
    inputs.add("lengths", ["batch"], torch.int64)
    inputs.add("inv_freq", [config.qk_rope_head_dim // 2])
    if config.has_engram(layer):
        inputs.add("engram_lookup", [config.vocab_size], torch.int64)
    specs = layer_caches(config, layer)
    for spec in specs:
        inputs.add(spec.name, cache_shape(spec), getattr(torch, spec.dtype))
    outputs = ["streams", *(spec.name for spec in specs)]

    def build() -> nn.Module:
        return LayerCall(DecoderLayer(config, layer), [s.name for s in specs], config.has_engram(layer))

    return _lower(library, name, inputs, build, f"layers.{layer}.", dtype, outputs)


def _streams(config: ModelConfig) -> list[str | int]:
    return ["batch", "chunk", config.hc_mult, config.hidden_size]


def _lower(
    library: Library,
    name: str,
    inputs: Inputs,
    build: Callable[[], nn.Module],
    prefix: str,
    dtype: DtypeOf,
    outputs: list[str],
) -> Part:
    with torch.device("meta"):
        module = build().eval().requires_grad_(False)
    state, given = module.state_dict(), tuple(inputs.tensors)
    weights = tuple(w.removeprefix("layer.").removeprefix("embedding.") for w in state)
    for weight, tensor in zip(weights, state.values(), strict=True):
        inputs.add(f"weight {weight}", list(tensor.shape), dtype(prefix + weight))
    function = library.lower(name, _Traced(module, list(state), len(given)), inputs)
    return Part(function, given, weights, tuple(outputs))
