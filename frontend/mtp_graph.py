"""The ONNX model of an MTP layer: entry, block and head, with the model's embedding and output projection by name.

It is a graph beside the model's, not a part of it: the model stays what it is without the layer, and a target packs
each shared weight once, since both graphs call it by the same name.
"""

from __future__ import annotations

import onnx_ir as ir

from .config import ModelConfig
from .model.mtp import mtp_caches, mtp_name
from .onnx_export import Assembler, add_streams, cache_shape, constant
from .rope import inv_freq
from .trace import trace_head, trace_layer, trace_mtp_entry

STREAMS = "streams"
"""Name of the input that holds the model's streams."""


def build_mtp(config: ModelConfig, *, dtype: str = "f32") -> ir.Model:
    """The ONNX model of layer ``mtp.0``, weights as graph inputs without data.

    Inputs: ``input_ids [batch, chunk]``, the tokens after those that the streams belong to; ``positions`` and
    ``lengths`` ``[batch]`` of the streams; ``streams [batch, chunk, M, D]``, the model's before its head; the layer's
    caches. Outputs: ``logits [batch, vocab]`` of the token after each row's last live one of ``input_ids``; the caches.

    Args:
        config: the whole model's.
        dtype: storage of the weight matrices, as for `onnx_export.build`.
    """
    layer = config.mtp_layer()
    entry, block, head = trace_mtp_entry(config), trace_layer(layer, 0), trace_head(config, all_logits=False)
    graph = Assembler(config, dtype)
    values = {
        "input_ids": graph.input("input_ids", ir.DataType.INT64, ["batch", "chunk"]),
        "positions": graph.input("positions", ir.DataType.INT64, ["batch"]),
        "lengths": graph.input("lengths", ir.DataType.INT64, ["batch"]),
        "streams": graph.input(
            STREAMS, ir.DataType.FLOAT, ["batch", "chunk", config.hc_mult, config.hidden_size]
        ),
        "inv_freq": constant("rope.main.inv_freq", inv_freq(config, "main")),
    }  # fmt: skip
    specs = mtp_caches(config)
    values |= {s.name: graph.input(f"past.{s.path}", ir.DataType.FLOAT, cache_shape(s)) for s in specs}

    def typed(streams: ir.Value) -> ir.Value:
        streams.type, streams.shape = values["streams"].type, values["streams"].shape
        return streams

    (joined,) = graph.call(entry, "", values, ["mtp.entry"], mtp_name)
    outputs = ["mtp.layer", *(f"present.{s.path}" for s in specs)]
    streams, *present = graph.call(block, "", values | {"streams": typed(joined)}, outputs, mtp_name)
    for spec, value in zip(specs, present, strict=True):
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(cache_shape(spec))
    (logits,) = graph.call(head, "", values | {"streams": typed(streams)}, ["logits"], mtp_name)
    logits.type, logits.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", config.vocab_size])
    return graph.finish((entry, block, head), [logits, *present], [values["inv_freq"]], specs)


def name_streams(model: ir.Model) -> None:
    """Give the model's graph the second output `STREAMS`, which the layer's takes."""
    add_streams(model)
    model.graph.outputs[1].name = STREAMS
