"""What ``v4c export`` would write, from the config alone: the ``--dry-run`` report."""

from __future__ import annotations

from typing import Any

from v4c import inspection
from v4c.frontend.config import ModelConfig
from v4c.frontend.model.caches import model_caches
from v4c.frontend.names import tensor_specs
from v4c.frontend.onnx_export import WEIGHT_DTYPES, cache_shape, stored_dtype
from v4c.packing_memory import peak_bytes_for


def plan(config: ModelConfig, *, format: str, dtype: str, weights: bool) -> dict[str, Any]:
    """The report on one export.

    Args:
        config: the model.
        format: ``onnx`` or ``mlir``.
        dtype: storage of the weight matrices.
        weights: whether they are written.

    Returns:
        JSON-able: ``format``, ``tensors``, ``weight_bytes``, ``largest_tensor_bytes``, ``artifact_bytes`` (of the
        weights' file; the graph's comes on top), ``peak_memory_bytes`` (about; weights are written one tensor at a
        time), ``flops_per_token``, ``cache_bytes``, ``caches``.
    """
    specs = tensor_specs(config)
    stored = {name: stored_dtype(name, info, WEIGHT_DTYPES[dtype]) for name, info in specs.items()}
    sizes = {name: int(info.size * stored[name].itemsize) for name, info in specs.items()}
    largest = max(sizes, key=lambda name: specs[name].size)
    costs = inspection.costs(config)
    return {
        "format": format,
        "tensors": len(specs),
        "weight_bytes": sum(sizes.values()),
        "largest_tensor_bytes": max(sizes.values()),
        "artifact_bytes": sum(sizes.values()) if weights else 0,
        "peak_memory_bytes": peak_bytes_for(0) + (4 * specs[largest].size + 2 * sizes[largest] if weights else 0),
        "flops_per_token": costs["flops_per_token"],
        "cache_bytes": costs["cache_bytes"],
        "caches": [{"name": c.path, "dtype": c.dtype, "shape": cache_shape(c)} for c in model_caches(config)],
    }
