"""Puts the lowered parts together: one MLIR module with the parts as private functions and ``@main``, which calls them.

Text is the format: it names every argument, and any MLIR of about the same age reads it; bytecode promises less.
Without weights the module is in upstream dialects alone. With weights they are IREE parameters: globals whose data is
in a safetensors file beside, by name, mapped when the module is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from v4c.errors import UnsupportedError
from v4c.frontend.config import ModelConfig
from v4c.frontend.model.caches import model_caches
from v4c.frontend.model.model import checkpoint_name, rope_kind
from v4c.frontend.names import tensor_specs
from v4c.frontend.onnx_export import WEIGHT_DTYPES, cache_shape, stored_dtype
from v4c.frontend.rope import inv_freq
from v4c.frontend.trace import layer_kind
from v4c.progress import Progress

from .lowering import Library
from .parts import Part, lower_embedding, lower_head, lower_layer

SCOPE = "model"
"""IREE's scope of the parameters: ``--parameters=model=FILE.safetensors``."""

_TORCH_DTYPES = {
    "FLOAT": torch.float32, "BFLOAT16": torch.bfloat16, "FLOAT16": torch.float16, "INT64": torch.int64,
}  # fmt: skip
_PREFIX = "// v4c."  # of the lines that describe the model; MLIR's own printers drop comments


@dataclass
class Module:
    """The whole model in linalg.

    Attributes:
        config: the model.
        weights: MLIR type by checkpoint name, in the order of ``@main``'s arguments when they are left out.
    """

    config: ModelConfig
    all_logits: bool
    functions: str = ""
    inputs: list[tuple[str, str]] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    results: list[tuple[str, str]] = field(default_factory=list)
    weights: dict[str, str] = field(default_factory=dict)

    def text(self, weights_file: str | None) -> str:
        """The module as text; weights are parameters of `weights_file`, or arguments of ``@main`` where it is None."""
        lines = self._header(weights_file)
        opening, inside = self.functions.rstrip().split("\nmodule {\n")
        lines += [opening, "module {"]
        arguments, loads = list(self.inputs), []
        if weights_file is None:
            arguments += self.weights.items()
        else:
            for name, kind in self.weights.items():
                lines.append(f'  util.global private @"{name}" = #flow.parameter.named<"{SCOPE}"::"{name}"> : {kind}')
                loads.append(f'    %{name} = util.global.load @"{name}" : {kind}')
        given = ",\n      ".join(f"%{name}: {kind}" for name, kind in arguments)
        kinds = ", ".join(kind for _, kind in self.results)
        lines += [f"  func.func @main(\n      {given}\n  ) -> ({kinds}) {{", *loads, *self.body]
        lines += [f"    return {', '.join(name for name, _ in self.results)} : {kinds}", "  }", inside, ""]
        return "\n".join(lines)

    def _header(self, weights_file: str | None) -> list[str]:
        caches = [{"name": s.path, "dtype": s.dtype, "shape": cache_shape(s)} for s in model_caches(self.config)]
        known: dict[str, Any] = {
            "mlir": {"version": 1, "weights_file": weights_file},
            "inputs": [
                {"name": "input_ids", "dtype": "int64", "shape": ["batch", "chunk"]},
                {"name": "positions", "dtype": "int64", "shape": ["batch"]},
                {"name": "lengths", "dtype": "int64", "shape": ["batch"]},
                *(cache | {"name": f"past.{cache['name']}"} for cache in caches),
            ],
            "outputs": [
                {
                    "name": "logits",
                    "dtype": "float32",
                    "shape": ["batch", *(["chunk"] if self.all_logits else []), self.config.vocab_size],
                },
                *(cache | {"name": f"present.{cache['name']}"} for cache in caches),
            ],
            "caches": caches,
            "weights": list(self.weights),
            "config": self.config.to_dict(),
        }
        return [f"{_PREFIX}{key} = {json.dumps(value)}" for key, value in known.items()]


def build(
    config: ModelConfig, *, all_logits: bool = False, dtype: str = "f32", progress: Progress | None = None
) -> Module:
    """Trace and lower `config`.

    Args:
        config: the model.
        all_logits: logits ``[batch, chunk, vocab]`` of every token rather than ``[batch, vocab]`` of the last live one.
        dtype: storage of the weight matrices: ``f32``, ``bf16`` or ``f16``; arithmetic is float32.
        progress: told of each part.

    Raises:
        UnsupportedError: torch-mlir cannot lower a part, or the whole is not a valid module.
    """
    specs, matrix = tensor_specs(config), WEIGHT_DTYPES[dtype]

    def stored(name: str) -> torch.dtype:
        name = checkpoint_name(name)
        return _TORCH_DTYPES[stored_dtype(name, specs[name], matrix).name]

    kinds = {_function_name(config, i): i for i in reversed(range(config.num_hidden_layers))}
    library = Library()
    work: dict[str, Callable[[], Part]] = {
        kind: lambda kind=kind, layer=layer: lower_layer(library, config, layer, kind, stored)  # type: ignore[misc]
        for kind, layer in kinds.items()
    }
    work["Embed"] = lambda: lower_embedding(library, config, stored)
    work["Head"] = lambda: lower_head(library, config, all_logits, stored)
    parts: dict[str, Part] = {}
    for step, (name, lower) in enumerate(work.items()):
        if progress:
            progress(f"lower {name}", step, len(work))
        parts[name] = lower()
    if progress:
        progress("lower", len(work), len(work))
    module = Module(config, all_logits, _functions(library))
    _Calls(module, parts).write()
    _verify(module.text(None))
    return module


class _Calls:
    """Writes the body of ``@main``: constants, then embedding, layers and head, each one call."""

    def __init__(self, module: Module, parts: dict[str, Part]) -> None:
        self.module, self.parts = module, parts
        self.types: dict[str, str] = {}

    def write(self) -> None:
        config, module = self.module.config, self.module
        for name, kind in (
            ("input_ids", "tensor<?x?xi64>"), ("positions", "tensor<?xi64>"), ("lengths", "tensor<?xi64>"),
        ):  # fmt: skip
            self._input(name, kind)
        for spec in model_caches(config):
            sizes = "x".join("?" if isinstance(d, str) else str(d) for d in cache_shape(spec))
            self._input(f"past.{spec.path}", f"tensor<{sizes}x{'i64' if spec.dtype == 'int64' else 'f32'}>")
        self._constant("inv_freq.main", inv_freq(config, "main"))
        self._constant("inv_freq.compress", inv_freq(config, "compress"))

        common = {name: name for name in ("input_ids", "positions", "lengths")}
        self._call("Embed", "embed_tokens.", common, {"streams": "embedded"})
        streams = "embedded"
        for layer in range(config.num_hidden_layers):
            kind, paths = _function_name(config, layer), [s for s in model_caches(config) if s.layer == layer]
            given = common | {"streams": streams, "inv_freq": f"inv_freq.{rope_kind(config, layer)}"}
            given |= {s.name: f"past.{s.path}" for s in paths}
            streams = f"layers.{layer}"
            self._call(
                kind, f"layers.{layer}.", given, {"streams": streams, **{s.name: f"present.{s.path}" for s in paths}}
            )
        self._call("Head", "head.", common | {"streams": streams}, {"logits": "logits"})
        outputs = ["logits", *(f"present.{s.path}" for s in model_caches(config))]
        module.results = [(f"%{name}", self.types[name]) for name in outputs]

    def _input(self, name: str, kind: str) -> None:
        self.types[name] = kind
        self.module.inputs.append((name, kind))

    def _constant(self, name: str, values: np.ndarray) -> None:
        kind = self.types[name] = f"tensor<{len(values)}xf32>"
        data = values.astype("<f4").tobytes().hex().upper()
        self.module.body.append(f'    %{name} = arith.constant dense<"0x{data}"> : {kind}')

    def _weight(self, name: str, kind: str) -> str:
        self.types[name] = self.module.weights[name] = kind
        return name

    def _call(self, function: str, prefix: str, given: dict[str, str], outputs: dict[str, str]) -> None:
        """One call: inputs by the part's names from `given`, results under the names of `outputs`."""
        part = self.parts[function]
        kinds = dict(zip((*part.inputs, *part.weights), part.function.arguments, strict=True))
        arguments = [
            self._weight("model.engram_lookup", kinds[name]) if name == "engram_lookup" else given[name]
            for name in part.inputs
        ]
        arguments += [self._weight(checkpoint_name(prefix + name), kinds[name]) for name in part.weights]
        names = [outputs[name] for name in part.outputs]
        self.types |= dict(zip(names, part.function.results, strict=True))
        for name, kind in zip(arguments, part.function.arguments, strict=True):
            assert self.types[name] == kind, f"{function}: {name}: {self.types[name]} for {kind}"
        self.module.body.append(
            f"    {_values(names)} = func.call @{part.function.name}({_values(arguments)})"
            f" : ({', '.join(part.function.arguments)}) -> ({', '.join(part.function.results)})"
        )


def _values(names: list[str]) -> str:
    return ", ".join(f"%{name}" for name in names)


def _function_name(config: ModelConfig, layer: int) -> str:
    """The layer's kind; an Engram layer has a table of its own size and so a function of its own."""
    return layer_kind(config, layer) + (f"{layer}" if config.has_engram(layer) else "")


def _functions(library: Library) -> str:
    """One module of all lowered functions, private, printed by MLIR."""
    ir = _ir()
    with ir.Context() as context, ir.Location.unknown():
        _register(context)
        whole = ir.Module.create()
        for lowered in library.functions:
            module = ir.Module.parse(lowered.text)
            (function,) = (f for f in module.body.operations if f.attributes["sym_name"].value == lowered.name)
            function.attributes["sym_visibility"] = ir.StringAttr.get("private")
            whole.body.append(function)
        return str(whole)


def _verify(text: str) -> None:
    ir = _ir()
    with ir.Context() as context, ir.Location.unknown():
        _register(context)
        try:
            ir.Module.parse(text).operation.verify()
        except ir.MLIRError as error:
            reason = str(error).splitlines()
            raise UnsupportedError(f"MLIR module: expected it to be valid, found: {' '.join(reason[:2])}") from error


def _ir() -> Any:
    from torch_mlir import ir

    return ir


def _register(context: Any) -> None:
    from torch_mlir.dialects import torch as torch_dialect

    torch_dialect.register_dialect(context)
