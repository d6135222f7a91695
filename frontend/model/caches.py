"""What state each layer keeps between calls: names, dtypes and shapes, in terms of batch and capacity.

This is the one list from which the torch model, the ONNX graph, the artifact's manifest and the session allocate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from v4c.frontend.config import ModelConfig
from v4c.frontend.estimate import CacheDtype, row_bytes

_STORED = {"f32": "float32", "bf16": "bfloat16", "fp8": "uint8"}


@dataclass(frozen=True)
class CacheSpec:
    """One cache tensor ``[batch, rows, width]`` (``[batch, rows]`` where `width` is None).

    `ratio` is 0 for a ring of fixed `rows`; otherwise the tensor has one row per `ratio` tokens of capacity. Of rows in
    FP8 or FP4 `width` counts bytes.
    """

    layer: int
    name: str
    rows: int
    width: int | None
    ratio: int = 0
    dtype: str = "float32"

    @property
    def path(self) -> str:
        """Name across the model: ``<layer>.<name>``."""
        return f"{self.layer}.{self.name}"

    def shape(self, batch: int, capacity: int) -> tuple[int, ...]:
        """Concrete shape for `batch` rows and `capacity` tokens."""
        rows = -(-capacity // self.ratio) if self.ratio else self.rows
        return (batch, rows) if self.width is None else (batch, rows, self.width)


def layer_caches(config: ModelConfig, layer: int, kv: CacheDtype = "f32") -> list[CacheSpec]:
    """The caches of one layer, in the order the graph passes them.

    `kv` is the format of what attention and indexer read: the window, the compressed rows and the index rows. The
    compressors' rings are always float32: what is pooled from them would otherwise be rounded twice.
    """
    head, index = config.head_dim, config.index_head_dim
    kind, ratio = config.attention_types[layer], config.ratio(layer)
    each = {"f32": 4, "bf16": 2, "fp8": 1}[kv]
    row, index_row = (nbytes // each for nbytes in row_bytes(config, kv))
    stored = _STORED[kv]
    specs = [CacheSpec(layer, "window", config.sliding_window, row, dtype=stored)]
    if kind == "hca":
        specs += [
            CacheSpec(layer, "comp_kv", ratio, head),
            CacheSpec(layer, "comp_gate", ratio, head),
            CacheSpec(layer, "rows", 0, row, ratio, stored),
        ]
    elif kind == "csa":
        specs += [
            CacheSpec(layer, "comp_kv", 2 * ratio, 2 * head),
            CacheSpec(layer, "comp_gate", 2 * ratio, 2 * head),
            CacheSpec(layer, "rows", 0, row, ratio, stored),
            CacheSpec(layer, "index_kv", 2 * ratio, 2 * index),
            CacheSpec(layer, "index_gate", 2 * ratio, 2 * index),
            CacheSpec(layer, "index_rows", 0, index_row, ratio, stored),
        ]
    if config.engram is not None and config.has_engram(layer):
        engram = config.engram
        specs += [
            CacheSpec(layer, "engram_ids", engram.max_ngram - 1, None, dtype="int64"),
            CacheSpec(
                layer, "engram_conv", (engram.kernel_size - 1) * engram.dilation, config.hc_mult * config.hidden_size
            ),
        ]
    return specs


def model_caches(config: ModelConfig, kv: CacheDtype = "f32") -> list[CacheSpec]:
    """Every layer's caches, in order."""
    return [spec for layer in range(config.num_hidden_layers) for spec in layer_caches(config, layer, kv)]


def allocate(config: ModelConfig, batch: int, capacity: int) -> list[dict[str, torch.Tensor]]:
    """Zeroed caches for the torch model: one dict per layer."""
    return [
        {s.name: torch.zeros(s.shape(batch, capacity), dtype=getattr(torch, s.dtype)) for s in layer_caches(config, i)}
        for i in range(config.num_hidden_layers)
    ]
