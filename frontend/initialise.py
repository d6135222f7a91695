"""Random weights: the value of each tensor, a source of them that needs no files, and a checkpoint folder of them.

Every parameter is drawn so that it matters (no zero biases, no unit norms) while logits keep a spread near 1; a wrong
kernel shows. Each tensor has its own generator, seeded by its name, so values do not depend on order, dtype or
sharding.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from v4c.errors import CheckpointError

from .checkpoint import StoredFormat, cast
from .checkpoint_writer import SHARD_BYTES, Content, Entry, Progress, write_checkpoint
from .config import ModelConfig
from .names import TensorInfo, expert_parts, expert_piece, mtp_specs, tensor_specs

_BLOCK_ELEMENTS = 1 << 22
_TABLE_BLOCK_ROWS = 4096

StoredDtype = Literal["f32", "bf16"]


def _generator(name: str, seed: int) -> np.random.Generator:
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest[:16], "<u4").tolist()])


def _affine(name: str, info: TensorInfo) -> tuple[float, float]:
    """(offset, scale) of the normal distribution a float tensor is drawn from."""
    if "norm" in name:
        return 1.0, 0.2
    if name.endswith("e_score_correction_bias"):
        return 0.0, 0.2
    if name.endswith(("sinks", "position_bias", ".base", "hc_base")) or "embed" in name:
        return 0.0, 1.0
    # Without a nonlinearity behind them, these need no gain to keep the spread of their input.
    gain = 1.0 if name.endswith((".fn", "hc_fn", "lm_head.weight")) else 1.5
    return 0.0, gain / math.sqrt(info.shape[-1])


def random_blocks(config: ModelConfig, name: str, info: TensorInfo, seed: int) -> Iterator[np.ndarray]:
    """The flattened tensor in pieces of at most `_BLOCK_ELEMENTS` floats or `_TABLE_BLOCK_ROWS` rows of ids."""
    generator = _generator(name, seed)
    if info.kind == "int64":
        yield from _integer_blocks(config, name, info, generator)
        return
    offset, scale = _affine(name, info)
    for start in range(0, info.size, _BLOCK_ELEMENTS):
        count = min(_BLOCK_ELEMENTS, info.size - start)
        if name.endswith((".scale", "hc_scale")):
            yield 0.5 + generator.random(count, dtype=np.float32)
        else:
            yield generator.standard_normal(count, dtype=np.float32) * np.float32(scale) + np.float32(offset)


def _integer_blocks(
    config: ModelConfig, name: str, info: TensorInfo, generator: np.random.Generator
) -> Iterator[np.ndarray]:
    if name.endswith("tid2eid"):
        tokens, top_k = info.shape
        for start in range(0, tokens, _TABLE_BLOCK_ROWS):
            order = generator.random(
                (min(_TABLE_BLOCK_ROWS, tokens - start), config.n_routed_experts), dtype=np.float32
            )
            yield order.argsort(axis=1)[:, :top_k].reshape(-1)  # distinct experts per token
        return
    engram = config.engram
    assert engram is not None
    if name == "model.engram_lookup":
        # Normalised text maps several token ids to one: here every fourth id joins the one before it.
        ids = np.arange(config.vocab_size, dtype=np.int64)
        yield ids - ids // 4
        return
    layer = int(name.split(".")[2])
    if name.endswith(".multipliers"):
        yield engram.multipliers(layer, config.vocab_size)
    else:
        yield engram.primes(layer) if name.endswith(".primes") else engram.offsets(layer)


def random_tensor(config: ModelConfig, name: str, seed: int = 0) -> np.ndarray:
    """The value of one tensor of `names.tensor_specs` or `names.mtp_specs`, float32 or int64; the same for one seed."""
    return _random_tensor(config, name, (tensor_specs(config) | mtp_specs(config))[name], seed)


def _random_tensor(config: ModelConfig, name: str, info: TensorInfo, seed: int) -> np.ndarray:
    result = np.empty(info.size, np.int64 if info.kind == "int64" else np.float32)
    place = 0
    for block in random_blocks(config, name, info, seed):
        result[place : place + block.size] = block
        place += block.size
    return result.reshape(info.shape)


class RandomCheckpoint:
    """Random weights with the interface of `checkpoint.Checkpoint`, made when they are asked for; holds no data.

    The values are those that `initialise` writes in float32 for the same config and seed.
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        self.config, self.seed = config, seed
        self.specs, self.mtp_specs = tensor_specs(config), mtp_specs(config)
        self.tokenizer_path: Path | None = None

    def names(self) -> tuple[str, ...]:
        """Every tensor, by its Hugging Face name."""
        return tuple(self.specs)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors as float32 and int64."""
        return sum(_stored_bytes(info, "f32") for info in self.specs.values())

    def identity(self) -> list[Any]:
        """What the values follow from."""
        return [self.config.to_dict(), self.seed]

    def source_dtype(self, name: str) -> StoredFormat:
        """``"f32"`` or ``"int64"``."""
        return "int64" if self.specs[name].kind == "int64" else "f32"

    def check(self) -> None:
        """Nothing can be missing."""

    def load(self, name: str, dtype: str | None = None) -> np.ndarray:
        """As `Checkpoint.load`. Raises CheckpointError for a name that the model does not have."""
        info = self.specs.get(name) or self.mtp_specs.get(name)
        if info is None:
            raise CheckpointError(f"random weights: expected the name of a tensor of this model, found {name}")
        return cast(_random_tensor(self.config, name, info, self.seed), info, dtype)


@dataclass(frozen=True)
class _Entry(Entry):
    """One tensor as it will stand in a file; several consecutive ones share a `source` when a stack is split."""

    source: str


def _stored_bytes(info: TensorInfo, dtype: StoredDtype) -> int:
    return info.size * {"int64": 8, "fp32": 4, "weight": 4 if dtype == "f32" else 2}[info.kind]


def _entries(config: ModelConfig, dtype: StoredDtype, limit: int) -> Iterator[_Entry]:
    """Tensors to write, in the order their values are drawn.

    A stack of experts larger than a shard is split as ``save_pretrained`` splits it: one matrix per expert and
    projection.
    """
    weight = "F32" if dtype == "f32" else "BF16"
    for name, info in (tensor_specs(config) | mtp_specs(config)).items():
        stored = {"int64": "I64", "fp32": "F32", "weight": weight}[info.kind]
        nbytes = _stored_bytes(info, dtype)
        parts, _ = expert_parts(name)
        if not parts or nbytes <= limit:
            yield _Entry(name, info.shape, stored, nbytes, name)
            continue
        experts, rows, columns = info.shape
        pieces = experts * len(parts)
        for expert in range(experts):
            for part in parts:
                piece = expert_piece(name, expert, part)
                yield _Entry(piece, (rows // len(parts), columns), stored, nbytes // pieces, name)


class _ValueStream:
    """Values of consecutive entries as bytes; where a stack is split, the draw runs on from piece to piece."""

    def __init__(self, config: ModelConfig, seed: int, dtype: StoredDtype) -> None:
        self.config, self.seed, self.dtype = config, seed, dtype
        self.specs = tensor_specs(config) | mtp_specs(config)
        self.source = ""
        self.blocks: Iterator[np.ndarray] = iter(())
        self.rest = b""

    def take(self, entry: _Entry) -> Iterator[bytes]:
        """The bytes of `entry`, in pieces of some megabytes."""
        if entry.source != self.source:
            self.source, self.rest = entry.source, b""
            self.blocks = random_blocks(self.config, entry.source, self.specs[entry.source], self.seed)
        wanted = entry.nbytes
        while wanted:
            if not self.rest:
                self.rest = cast(next(self.blocks), self.specs[entry.source], self.dtype).tobytes()
            piece, self.rest = self.rest[:wanted], self.rest[wanted:]
            wanted -= len(piece)
            yield piece


def initialise(
    config: ModelConfig,
    folder: str | Path,
    seed: int = 0,
    dtype: StoredDtype = "f32",
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a random checkpoint in Hugging Face's layout, MTP layers included (transformers ignores them).

    Data is streamed, so memory stays at some megabytes; the folder appears only when it is complete.

    Args:
        config: what to write; ``config.json`` gets its `dtype` from the argument `dtype`.
        folder: must not exist, or be empty. Its parent must exist.
        seed: equal seeds give equal weights, whatever `shard_bytes`.
        dtype: of the weight matrices; hyper-connections, norms, sinks and biases are float32 always.
        progress: called while writing.
        shard_bytes: largest data of one file. A single tensor above it has a file of its own.

    Raises:
        OutputError: the folder is not empty, or cannot be written; nothing is left behind.
    """
    stored = replace(config, dtype="float32" if dtype == "f32" else "bfloat16")
    stream = _ValueStream(config, seed, dtype)
    content = Content(_entries(config, dtype, shard_bytes), stream.take, stored.to_dict())
    write_checkpoint(content, folder, progress, shard_bytes)
