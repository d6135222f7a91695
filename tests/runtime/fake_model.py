"""A model small enough to predict in NumPy, compiled with TVM: it has a ring, a growing cache and two weights.

Its logits after token t are the sum of the table rows of the last `WINDOW` tokens (kept in the ring), plus the table
rows of all tokens in completed windows of `RATIO` tokens (kept in the growing cache), plus a bias in bfloat16. All are
small integers, so results are exact and every token read, skipped or misplaced shows.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TVM_NUM_THREADS", "2")

import ml_dtypes
import numpy as np
import tvm
from tvm import relax
from tvm.relax.backend.cpu_generic import pipeline as cpu_pipeline
from tvm.script import relax as R
from tvm.script import tirx as T

from v4c.runtime.cache_specs import CacheSpec, Rows
from v4c.runtime.manifest import DTypes, Manifest, Target, WeightSpec
from v4c.runtime.writer import ArtifactWriter

VOCAB = 24
WINDOW = 5
RATIO = 4
MAX_CONTEXT = 64
EOS = 3

WEIGHTS = [WeightSpec("bias", "bfloat16", (VOCAB,)), WeightSpec("table", "float32", (VOCAB, VOCAB))]


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Small random integers in the declared shapes and dtypes."""
    random = np.random.default_rng(seed)
    return {
        "bias": random.integers(-9, 10, VOCAB).astype(ml_dtypes.bfloat16),
        "table": random.integers(-9, 10, (VOCAB, VOCAB)).astype(np.float32),
    }


def expected_logits(tokens: np.ndarray, seed: int = 0) -> np.ndarray:
    """Logits after each token of one sequence [S]: float32 [S, VOCAB]."""
    drawn = weights(seed)
    vectors = drawn["table"][tokens]
    result = np.empty((len(tokens), VOCAB), dtype=np.float32)
    for t in range(len(tokens)):
        recent = vectors[max(0, t + 1 - WINDOW) : t + 1].sum(axis=0)
        completed = vectors[: (t + 1) // RATIO * RATIO].sum(axis=0)
        result[t] = recent + completed + drawn["bias"].astype(np.float32)
    return result


def manifest(**changes: Any) -> Manifest:
    """What a compile driver would say about the model."""
    fields: dict[str, Any] = {
        "v4c_version": "0.1.0",
        "tvm_version": "0.27.0.post1",
        "target": Target("cpu", "x86_64", ("fpu",)),
        "dtypes": DTypes("float32", "float32", "float32"),
        "config": {"model_type": "deepseek_v4", "vocab_size": VOCAB},
        "vocab_size": VOCAB,
        "max_context": MAX_CONTEXT,
        "eos_token_ids": (EOS,),
        "caches": (
            CacheSpec("layers.0.window", "float32", ("batch", WINDOW, VOCAB)),
            CacheSpec("layers.0.rows", "bfloat16", ("batch", Rows(RATIO), VOCAB)),
        ),
        "entry_points": {"prefill": "prefill", "prefill_all": "prefill_all", "decode": "decode"},
    }
    return Manifest(**{**fields, **changes})


def write(destination: Path, library: Path, seed: int = 0, shard_bytes: int = 1 << 30, **changes: Any) -> Path:
    """Write an artifact of the model with the weights of ``seed``; ``changes`` go to the manifest."""
    drawn = weights(seed)
    with ArtifactWriter(destination, shard_bytes) as writer:
        writer.write_library(library)
        writer.declare_weights(WEIGHTS)
        for spec in WEIGHTS:
            writer.write_weight(spec.name, drawn[spec.name])
        writer.finish(manifest(**changes))
    return destination


def _module(offset: int) -> Any:
    vocab, window, ratio = T.int64(VOCAB), T.int64(WINDOW), T.int64(RATIO)

    @T.prim_func(private=True, s_tir=True)
    def step(
        a: T.handle, p: T.handle, n: T.handle, w: T.handle, r: T.handle, bias_: T.handle, table_: T.handle, o: T.handle
    ) -> None:
        b = T.int64()
        s = T.int64()
        rows = T.int64()
        ids = T.match_buffer(a, (b, s), "int64")
        positions = T.match_buffer(p, (b,), "int64")
        lengths = T.match_buffer(n, (b,), "int64")
        ring = T.match_buffer(w, (b, window, vocab), "float32")
        sums = T.match_buffer(r, (b, rows, vocab), "bfloat16")
        bias = T.match_buffer(bias_, (vocab,), "bfloat16")
        table = T.match_buffer(table_, (vocab, vocab), "float32")
        out = T.match_buffer(o, (b, s, vocab), "float32")
        for i in T.parallel(b):
            for j in range(s):
                for v in range(vocab):
                    out[i, j, v] = T.float32(0)
            for j in range(lengths[i]):
                for v in range(vocab):
                    t: T.let[T.int64] = positions[i] + j
                    done: T.let[T.int64] = (t + T.int64(1)) // ratio
                    ring[i, t % window, v] = table[ids[i, j], v]
                    out[i, j, v] = T.cast(bias[v], "float32") + T.float32(offset)
                    for k in range(T.min(window, t + T.int64(1))):
                        out[i, j, v] = out[i, j, v] + ring[i, (t - k) % window, v]
                    if (t + T.int64(1)) % ratio == T.int64(0):
                        sums[i, done - T.int64(1), v] = T.cast(
                            ring[i, t % window, v]
                            + ring[i, (t - T.int64(1)) % window, v]
                            + ring[i, (t - T.int64(2)) % window, v]
                            + ring[i, (t - T.int64(3)) % window, v],
                            "bfloat16",
                        )
                    for k in range(done):
                        out[i, j, v] = out[i, j, v] + T.cast(sums[i, k, v], "float32")

    @T.prim_func(private=True, s_tir=True)
    def last(x: T.handle, n: T.handle, o: T.handle) -> None:
        b = T.int64()
        s = T.int64()
        logits = T.match_buffer(x, (b, s, vocab), "float32")
        lengths = T.match_buffer(n, (b,), "int64")
        out = T.match_buffer(o, (b, vocab), "float32")
        for i in range(b):
            for v in range(vocab):
                out[i, v] = logits[i, T.max(lengths[i] - T.int64(1), T.int64(0)), v]

    builder = relax.BlockBuilder()
    step_var = builder.add_func(step, "step")
    last_var = builder.add_func(last, "last")
    for name in ("prefill", "prefill_all", "decode"):
        _entry_point(builder, name, step_var, last_var)
    return builder.get()


def _entry_point(builder: Any, name: str, step: Any, last: Any) -> None:
    batch, chunk, rows = (tvm.tirx.Var(symbol, "int64") for symbol in ("batch", "chunk", "rows"))
    width = tvm.tirx.IntImm("int64", 1) if name == "decode" else chunk
    ids = relax.Var("input_ids", R.Tensor((batch, width), "int64"))
    positions = relax.Var("positions", R.Tensor((batch,), "int64"))
    lengths = relax.Var("lengths", R.Tensor((batch,), "int64"))
    window = relax.Var("window", R.Tensor((batch, WINDOW, VOCAB), "float32"))
    sums = relax.Var("rows", R.Tensor((batch, rows, VOCAB), "bfloat16"))
    bias = relax.Var("bias", R.Tensor((VOCAB,), "bfloat16"))
    table = relax.Var("table", R.Tensor((VOCAB, VOCAB), "float32"))
    parameters = [ids, positions, lengths, window, sums, bias, table]
    with builder.function(name, parameters):
        with builder.dataflow():
            outputs = [window.ty, sums.ty, R.Tensor((batch, width, VOCAB), "float32")]
            results = builder.emit(relax.op.call_tir_inplace(step, parameters, [3, 4, -1], outputs))
            logits = builder.emit(relax.TupleGetItem(results, 2))
            if name != "prefill_all":
                logits = builder.emit(relax.call_tir(last, [logits, lengths], R.Tensor((batch, VOCAB), "float32")))
            caches = [builder.emit(relax.TupleGetItem(results, i)) for i in (0, 1)]
            output = builder.emit_output(relax.Tuple([logits, *caches]))
        builder.emit_func_output(output)


def compile_library(path: Path, offset: int = 0) -> Path:
    """Compile the model for any CPU of this architecture; ``offset`` is added to every logit."""
    target = tvm.target.Target({"kind": "llvm"})
    # The default pipeline without its fusion, which accepts schedulable functions only.
    passes = [*cpu_pipeline.dataflow_lower_passes(target), *cpu_pipeline.finalize_passes(target)]
    executable = tvm.compile(_module(offset), target=target, relax_pipeline=tvm.transform.Sequential(passes))
    executable.export_library(str(path))
    return path
