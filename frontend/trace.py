"""Traces the parts of the model - embedding, one layer of each kind, head - into ONNX functions.

Weights are inputs of a part, never constants, and tensors live on torch's meta device, so a trace costs no memory
whatever the model's size; layers of one kind share one function. Custom ops stay single nodes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, cast

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.func import functional_call

from v4c.custom_ops import OPS
from v4c.custom_ops.base import ONNX_OPSET
from v4c.frontend.config import ModelConfig

from .model.caches import layer_caches
from .model.model import DecoderLayer, Embedding, Head
from .model.mtp import MTPEntry

P = ParamSpec("P")

PART_DOMAIN = "v4c.parts"
"""ONNX domain of the model-local functions the parts become."""

_TRACED_DIMS = {"batch": 2, "chunk": 7, "capacity": 4096}  # stand-ins while tracing; the graph keeps none of them


@dataclass(frozen=True)
class Part:
    """One traced part.

    Attributes:
        function: the ONNX function, its inputs and outputs in the order of the two lists below.
        inputs: activations and caches, by name.
        weights: names of the weights, relative to the module, following the inputs.
        outputs: activations and updated caches, by name.
    """

    function: ir.Function
    inputs: tuple[str, ...]
    weights: tuple[str, ...]
    outputs: tuple[str, ...]


_MOST_HELD = 64


def _traced_once(trace: Callable[P, Part]) -> Callable[P, Part]:
    """`trace`, whose results are kept: tracing a layer takes seconds. Every call gets a copy, for passes change it."""
    held = cast("Callable[P, Part]", functools.lru_cache(_MOST_HELD)(trace))

    @functools.wraps(trace)
    def copied(*args: P.args, **kwargs: P.kwargs) -> Part:
        part = held(*args, **kwargs)
        return replace(part, function=part.function.clone())

    return copied


def layer_kind(config: ModelConfig, layer: int) -> str:
    """Name of a layer's kind, e.g. ``CSATopKLayer``: layers of one kind share a traced function."""
    attention = {"sliding": "Sliding", "csa": "CSA", "hca": "HCA"}[config.attention_types[layer]]
    router = {"hash": "Hash", "topk": "TopK"}[config.mlp_types[layer]]
    engram = "Engram" if config.has_engram(layer) else ""
    return f"{attention}{router}{engram}Layer"


@_traced_once
def trace_embedding(config: ModelConfig) -> Part:
    """``input_ids -> streams``."""
    batch, chunk = _dims("batch", "chunk")
    return _trace(
        "Embed", lambda: Embedding(config), {"input_ids": _ids(2, 7)}, {"input_ids": (batch, chunk)}, ["streams"]
    )


@_traced_once
def trace_head(config: ModelConfig, all_logits: bool) -> Part:
    """``streams, lengths -> logits``, of each row's last live token or of every token."""
    batch, chunk = _dims("batch", "chunk")
    inputs = {"streams": _streams(config), "lengths": _ids(2)}
    dims = {"streams": (batch, chunk), "lengths": (batch,)}
    return _trace("HeadAll" if all_logits else "Head", lambda: Head(config, all_logits), inputs, dims, ["logits"])


@_traced_once
def trace_mtp_entry(config: ModelConfig) -> Part:
    """``streams, input_ids -> streams``: what an MTP layer makes of the model's streams and the next tokens' ids."""
    batch, chunk = _dims("batch", "chunk")
    inputs = {"streams": _streams(config), "input_ids": _ids(2, 7)}
    dims = {"streams": (batch, chunk), "input_ids": (batch, chunk)}
    return _trace("MTPEntry", lambda: MTPEntry(config), inputs, dims, ["streams"])


@_traced_once
def trace_layer(config: ModelConfig, layer: int) -> Part:
    """``streams, input_ids, positions, lengths, inv_freq(, engram_lookup), caches... -> streams, caches...``."""
    batch, chunk = _dims("batch", "chunk")
    inputs: dict[str, Tensor] = {
        "streams": _streams(config),
        "input_ids": _ids(2, 7),
        "positions": _ids(2),
        "lengths": _ids(2),
        "inv_freq": torch.empty(config.qk_rope_head_dim // 2, device="meta"),
    }
    dims: dict[str, tuple[Any, ...]] = {
        "streams": (batch, chunk),
        "input_ids": (batch, chunk),
        "positions": (batch,),
        "lengths": (batch,),
        "inv_freq": (),
    }
    engram = config.has_engram(layer)
    if engram:
        inputs["engram_lookup"] = _ids(config.vocab_size)
        dims["engram_lookup"] = ()
    specs = layer_caches(config, layer)
    rows = {spec.ratio: torch.export.Dim(f"rows{spec.ratio}") for spec in specs if spec.ratio}
    for spec in specs:
        shape = spec.shape(_TRACED_DIMS["batch"], _TRACED_DIMS["capacity"])
        inputs[spec.name] = torch.empty(shape, dtype=getattr(torch, spec.dtype), device="meta")
        dims[spec.name] = (batch, rows[spec.ratio]) if spec.ratio else (batch,)
    outputs = ["streams", *(s.name for s in specs)]
    names = [s.name for s in specs]
    return _trace(
        layer_kind(config, layer), lambda: LayerCall(DecoderLayer(config, layer), names, engram), inputs, dims, outputs
    )


class LayerCall(nn.Module):
    """A decoder layer with flat inputs and outputs, as a graph wants them."""

    def __init__(self, layer: DecoderLayer, names: list[str], engram: bool) -> None:
        super().__init__()
        self.layer, self.names, self.engram = layer, names, engram

    def forward(
        self, streams: Tensor, input_ids: Tensor, positions: Tensor, lengths: Tensor, inv_freq: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        lookup, caches = (rest[0], rest[1:]) if self.engram else (None, rest)
        named = dict(zip(self.names, caches, strict=True))
        streams, new = self.layer(streams, input_ids, positions, lengths, inv_freq, lookup, named)
        return (streams, *(new[n] for n in self.names))


class _Functional(nn.Module):
    """A module whose parameters and buffers are inputs."""

    def __init__(self, module: nn.Module, names: list[str], arguments: int) -> None:
        super().__init__()
        # Kept out of torch's registry: a registered child would be traced with its own (meta) parameters.
        self.__dict__["call"] = (module, names, arguments)

    def forward(self, tensors: list[Tensor]) -> Any:
        module, names, arguments = self.__dict__["call"]
        weights = dict(zip(names, tensors[arguments:], strict=True))
        return functional_call(module, weights, tuple(tensors[:arguments]))


def _trace(
    name: str, build: Any, inputs: dict[str, Tensor], dims: dict[str, tuple[Any, ...]], outputs: list[str]
) -> Part:
    with torch.device("meta"):
        module = build().eval().requires_grad_(False)
    state = module.state_dict()
    weights = [n.removeprefix("layer.") for n in state]
    tensors = [*inputs.values(), *state.values()]
    dynamic = [dict(enumerate(dims[n])) for n in inputs] + [{} for _ in state]
    functional = _Functional(module, list(state), len(inputs))
    with _quiet_exporter():
        program = torch.onnx.export(
            functional.eval(),
            (tensors,),
            dynamo=True,
            verbose=False,
            opset_version=ONNX_OPSET,
            optimize=True,
            custom_translation_table={op.torch_op: op.onnx_translation() for op in OPS.values()},
            dynamic_shapes={"tensors": dynamic},
            input_names=[*inputs, *weights],
            output_names=[f"new.{n}" for n in outputs],
        )
    assert program is not None
    function = _as_function(program.model, name)
    return Part(function, tuple(inputs), tuple(weights), tuple(outputs))


def _as_function(model: ir.Model, name: str) -> ir.Function:
    """Turn a traced graph into a function: constants become nodes, nodes get the names of what they compute."""
    graph = model.graph
    first = graph[0] if len(graph) else None
    for value in list(graph.initializers.values()):
        constant = ir.node("Constant", [], {"value": value.const_value}, outputs=None)
        constant.outputs[0].name = value.name
        value.replace_all_uses_with(constant.outputs[0])
        if first is not None:
            graph.insert_before(first, constant)
    graph.initializers.clear()
    taken = {value.name for value in graph.inputs}
    for node in graph:
        node.metadata_props.clear()  # stack traces of the tracer: they hold this machine's paths
        node.meta.clear()  # and its graph
        node.name = (node.name or node.op_type).removeprefix("node_")
        for output in node.outputs:
            output.metadata_props.clear()
            output.meta.clear()
            if output.name in taken:  # the tracer names values after ops, and an input may be called like one
                output.name = f"{output.name}_out"
    return ir.Function(PART_DOMAIN, name, graph=graph, attributes=[])


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporter's notes about optional packages and shared dimension names; errors still raise."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _dims(*names: str) -> tuple[Any, ...]:
    return tuple(torch.export.Dim(n) for n in names)


def _ids(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


def _streams(config: ModelConfig) -> Tensor:
    shape = (_TRACED_DIMS["batch"], _TRACED_DIMS["chunk"], config.hc_mult, config.hidden_size)
    return torch.empty(shape, device="meta")
