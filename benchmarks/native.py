"""A published-format checkpoint at V4-Flash's layer sizes: packing, loading, decoding and the memory each takes.

Run ``python -m benchmarks.native --folder DIR``. It writes a random checkpoint of the preset in FP8 and FP4 (some 9 GB,
and as much again for the artifact; both are deleted), packs it with ``--quant native`` in a process of its own, loads
it, compares logits with the dequantised reference, which is read layer by layer, and runs ``v4c bench``.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import v4c
from benchmarks.timing import machine
from v4c.frontend.checkpoint import Checkpoint
from v4c.frontend.initialise_native import initialise_native
from v4c.frontend.model.caches import layer_caches
from v4c.frontend.model.model import DecoderLayer, Embedding, Head, checkpoint_name, rope_kind
from v4c.frontend.presets import preset
from v4c.frontend.rope import inv_freq
from v4c.verification import NATIVE_TOLERANCE
from v4c.verification_quantised import QuantisedProducts

GIB = 1 << 30
PACKING_BOUND = 3 * GIB
"""What packing may take beside the largest tensor."""
LOADING_BOUND = 2.0
"""Seconds in which an artifact is mapped, the library's hash checked."""

_PACK = """
import resource, sys, v4c
v4c.compile(sys.argv[1], sys.argv[2], quant="native")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)
"""
_LOAD = """
import sys, time, v4c
from v4c.runtime.library import start_runtime
start_runtime()
start = time.perf_counter()
model = v4c.load(sys.argv[1], verify="code")
print(time.perf_counter() - start, model.resident_weight_bytes)
"""
# In a process of its own: what is resident is asked of the files, which the others mapped too.
_BOUNDED = """
import json, sys, v4c
print(json.dumps(v4c.bench(sys.argv[1], contexts=[1024], prompt_tokens=16, rounds=15, weights_memory=sys.argv[2])))
"""


@click.command(help=__doc__)
@click.option("--folder", type=click.Path(path_type=Path), required=True, help="Where there is room; must not exist.")
@click.option("--preset", "name", default="flash-slice", show_default=True)
@click.option("--experts", type=int, default=112, show_default=True, help="Routed experts per layer; 0: the preset's.")
@click.option("--tokens", default=24, show_default=True, help="Tokens whose logits are compared.")
@click.option("--weights-memory", default="", help="Also bench with this bound, such as 6GiB.")
@click.option("--json", "as_json", is_flag=True)
def main(folder: Path, name: str, experts: int, tokens: int, weights_memory: str, as_json: bool) -> None:
    config = preset(name)
    config = replace(config, n_routed_experts=experts) if experts else config
    folder.mkdir(parents=True)
    try:
        report = _report(config, folder, tokens, weights_memory)
    finally:
        shutil.rmtree(folder)
    report = {"machine": machine(), "preset": name, "experts": config.n_routed_experts, **report}
    if as_json:
        click.echo(json.dumps(report))
        return
    for key, value in report.items():
        click.echo(f"{key:28} {value if not isinstance(value, float) else format(value, '.4g')}")


def _report(config: Any, folder: Path, tokens: int, weights_memory: str) -> dict[str, Any]:
    checkpoint, artifact = folder / "checkpoint", folder / "model.v4c"
    initialise_native(config, checkpoint)
    source = Checkpoint.open(checkpoint)
    largest = max(source.tensor(n).nbytes for n in source.names() if source.source_dtype(n) != "int64")
    start = time.perf_counter()
    packed = _child(_PACK, checkpoint, artifact)
    report: dict[str, Any] = {
        "checkpoint_gib": source.total_bytes / GIB,
        "artifact_gib": sum(f.stat().st_size for f in artifact.iterdir()) / GIB,
        "packing_s": time.perf_counter() - start,
        "packing_gib": int(packed) / GIB,
        "packing_bound_gib": (PACKING_BOUND + largest) / GIB,
    }
    seconds, resident = _child(_LOAD, artifact).split()
    report |= {"load_s": float(seconds), "load_bound_s": LOADING_BOUND, "resident_after_load_mib": int(resident) >> 20}
    report |= _logits(source, artifact, tokens)
    document = v4c.bench(artifact, contexts=[1024], prompt_tokens=64, rounds=15, profile=True)
    report |= _speed(document)
    if weights_memory:
        bounded = json.loads(_child(_BOUNDED, artifact, weights_memory))
        report |= {"bounded_decode_ms": bounded["decode"][0]["ms"], "bounded_experts": bounded["decode"][0]["experts"]}
    report["peak_rss_gib"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) / GIB
    return report


def _child(code: str, *arguments: Path | str) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _logits(source: Checkpoint, artifact: Path, tokens: int) -> dict[str, Any]:
    """How far logits of a prompt and of single tokens are from the dequantised reference's."""
    ids = np.random.default_rng(0).integers(0, source.config.vocab_size, tokens)
    expected = streamed_logits(source, ids)
    model = v4c.load(artifact, verify="code")
    with model.new_session(max_context=tokens) as session:
        whole = session.prefill(ids[None], all_logits=True)[0]
        session.reset()
        steps = np.stack([session.decode(t)[0] for t in ids[:, None]])
    deviation = max(1.0, float(expected.std()))
    typical = [float(np.median(np.abs(found - expected).max(-1))) / deviation for found in (whole, steps)]
    return {
        "prefill_typical_difference": typical[0],
        "decode_typical_difference": typical[1],
        "typical_difference_bound": NATIVE_TOLERANCE,
    }


@torch.no_grad()
def streamed_logits(source: Checkpoint, ids: np.ndarray) -> np.ndarray:
    """Reference logits ``[S, V]`` of ``ids [S]``, one layer in memory at a time; rows for FP4 weights are rounded."""
    config = source.config
    tokens = torch.from_numpy(ids)[None]
    positions, lengths = torch.zeros(1, dtype=torch.int64), torch.tensor([len(ids)])
    streams = _loaded(Embedding(config), source, "embed_tokens.")(tokens)
    for index in range(config.num_hidden_layers):
        layer = _loaded(DecoderLayer(config, index), source, f"layers.{index}.")
        rounded = [
            w
            for n, w in layer.named_parameters()
            if source.source_dtype(checkpoint_name(f"layers.{index}.{n}")) == "fp4"
        ]
        caches = {
            c.name: torch.zeros(c.shape(1, len(ids)), dtype=getattr(torch, c.dtype))
            for c in layer_caches(config, index)
        }
        angles = torch.from_numpy(inv_freq(config, rope_kind(config, index)))
        with QuantisedProducts(rounded):
            streams, _ = layer(streams, tokens, positions, lengths, angles, None, caches)
        del layer, rounded
    return _loaded(Head(config, all_logits=True), source, "head.")(streams, lengths)[0].numpy()


def _loaded(module: torch.nn.Module, source: Checkpoint, prefix: str) -> Any:
    """`module`, whose names in the model begin with `prefix`, on its weights."""
    state = {
        name: torch.from_numpy(
            np.array(source.load(checkpoint_name(prefix + name), "f32" if tensor.is_floating_point() else None))
        )
        for name, tensor in module.state_dict().items()
    }
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False).eval()


def _speed(document: dict[str, Any]) -> dict[str, Any]:
    decode = document["decode"][0]
    experts = [r for r in document["profile"]["decode"][0]["rows"] if r["op"] in ("MixtureOfExperts", "GroupedExperts")]
    return {
        "stream_bandwidth_gbs": document["stream_bandwidth_gbs"],
        "decode_ms": decode["ms"],
        "decode_bandwidth_share": decode["bandwidth_share"],
        "experts_bandwidth_share": sum(r["bandwidth_share"] * r["ms"] for r in experts) / sum(r["ms"] for r in experts),
        "prefill_tokens_per_second": document["prefill"][0]["tokens_per_second"],
    }


if __name__ == "__main__":
    main()
