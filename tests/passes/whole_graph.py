"""A whole traced model before and after passes, run in ONNX Runtime: what the differential tests of passes share."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from tests.parity.onnx_session import empty_caches, open_session
from tests.parity.reference import StateDictSource, random_chunks, random_hf_config, random_hf_model
from v4c.frontend.initialise import RandomCheckpoint
from v4c.frontend.onnx_export import add_heads, attach_weights, build, op_functions, save
from v4c.passes.onnx.rewriting import PassReport
from v4c.passes.pipeline import PassOptions, run_onnx_passes

Source = StateDictSource | RandomCheckpoint


@dataclass
class Traced:
    """A model traced once; passes run on copies."""

    source: Source
    proto: bytes

    @classmethod
    def of(cls, source: Source) -> Traced:
        model = build(source.config)
        add_heads(model, source.config)
        return cls(source, ir.to_proto(model).SerializeToString())

    @classmethod
    def random(cls, seed: int) -> Traced:
        """A random configuration with random weights of scales at which each one shows."""
        return cls.of(StateDictSource.of(random_hf_model(random_hf_config(seed), seed)))

    def model(self) -> ir.Model:
        """A fresh copy of the graph, without weights."""
        return ir.from_proto(onnx.load_model_from_string(self.proto))

    def passed(self, disabled: Collection[str]) -> tuple[ir.Model, list[PassReport]]:
        """A copy with every pass but `disabled` done."""
        model = self.model()
        return model, run_onnx_passes(model, PassOptions.checked(disabled))

    def logits(self, model: ir.Model, folder: Path, seed: int) -> list[np.ndarray]:
        """Logits of a random prompt in random chunks and of single tokens after it, two rows apart in position."""
        graphs = [model.graph, *model.functions.values()]
        for function in op_functions(graphs):
            function.opset_imports.update(model.opset_imports)
            model.functions[function.identifier()] = function
        attach_weights(model, self.source)
        path = folder / "model.onnx"
        save(model, path)
        session, caches, rng = open_session(path), empty_caches(path, 2, 96), np.random.default_rng(seed)
        positions, found = np.array([0, 0]), []
        for chunk in [*random_chunks(rng, 60), 1, 1, 1, 1, 1]:
            lengths = np.array([chunk, int(rng.integers(0, chunk + 1))])
            feed = {
                "input_ids": rng.integers(0, self.source.config.vocab_size, (2, chunk)), "positions": positions,
                "lengths": lengths,
            }  # fmt: skip
            logits, *present = session.run(None, feed | caches)
            caches = {f"past.{n}": p for n, p in zip(_cache_names(model), present, strict=True)}
            positions = positions + lengths
            found.append(logits[lengths > 0])
        return found


def _cache_names(model: ir.Model) -> list[str]:
    return [c["name"] for c in json.loads(model.metadata_props["v4c.caches"])]
