"""Runs an exported file in ONNX Runtime, with caches as its own metadata describes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort


def metadata(path: Path, key: str) -> str:
    """A metadata value of an ONNX file, read without its weights."""
    model = onnx.load(path, load_external_data=False)
    return str(next(p.value for p in model.metadata_props if p.key == key))


def empty_caches(path: Path, batch: int, capacity: int) -> dict[str, np.ndarray]:
    """Zeroed ``past.*`` inputs for `batch` rows of `capacity` tokens."""
    caches = {}
    for spec in json.loads(metadata(path, "v4c.caches")):
        shape = [
            batch if d == "batch" else -(-capacity // int(d.removeprefix("rows"))) if isinstance(d, str) else d
            for d in spec["shape"]
        ]
        caches[f"past.{spec['name']}"] = np.zeros(shape, spec["dtype"])
    return caches


def open_session(path: Path, parallel: bool = False, optimise: bool = True) -> ort.InferenceSession:
    """A session in one of ONNX Runtime's execution modes."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 2
    options.execution_mode = ort.ExecutionMode.ORT_PARALLEL if parallel else ort.ExecutionMode.ORT_SEQUENTIAL
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    return ort.InferenceSession(path, options)


def decode_differences(path: Path, ids: np.ndarray, expected: np.ndarray, prompt: int) -> float:
    """Largest difference from ``expected [B, S, V]`` after a prompt in two chunks and at every token after it."""
    session, caches, largest = open_session(path), empty_caches(path, *ids.shape), 0.0
    half, total = prompt // 2, ids.shape[1]
    for start, length in [(0, half), (half, prompt - half)] + [(t, 1) for t in range(prompt, total)]:
        feed = {
            "input_ids": ids[:, start : start + length],
            "positions": np.full(len(ids), start),
            "lengths": np.full(len(ids), length),
        }
        logits, *present = session.run(None, feed | caches)
        caches = dict(zip(caches, present, strict=True))
        largest = max(largest, float(np.abs(logits - expected[:, start + length - 1]).max()))
    return largest
