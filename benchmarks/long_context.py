"""Decoding from 4k to 1M tokens at V4-Flash's layer sizes, a million tokens of prompt on a small model, and the memory.

Run ``python -m benchmarks.long_context --folder DIR`` (flash-slice, int8: some 7 GB there, deleted at the end). Filling
the caches by reading a million tokens would take hours at these sizes, so they are filled with random rows, and the
session is told where it stands; what a step reads and computes is the same. The prompt of a million tokens is really
read, on v4-nano. What bytes and FLOPs predict is printed beside what was measured; charts are written as PNG.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

import v4c
from benchmarks.timing import machine
from v4c.benchmark import Measured, Work, measure
from v4c.benchmark_limits import limits_of
from v4c.frontend import estimate
from v4c.frontend.presets import preset
from v4c.runtime.dtypes import DTYPES
from v4c.runtime.model import Model
from v4c.runtime.session import Session

LONGEST = 1 << 20
CONTEXTS = (4096, 16384, 65536, 262144, LONGEST - 64)
PASSES = 3
FORMATS: tuple[estimate.CacheDtype, ...] = ("f32", "bf16", "fp8")


@click.command(help=__doc__)
@click.option("--folder", type=click.Path(path_type=Path), required=True, help="Where there is room; must not exist.")
@click.option("--charts", type=click.Path(path_type=Path), default=Path(), help="Folder for the PNG files.")
@click.option("--preset", "name", default="flash-slice", show_default=True)
@click.option("--experts", type=int, default=0, help="Routed experts per layer (default: the preset's).")
@click.option("--quant", default="int8", show_default=True)
@click.option("--kv", "formats", multiple=True, type=click.Choice(FORMATS), default=("f32", "fp8"), show_default=True)
@click.option("--prompt-preset", default="v4-nano", show_default=True)
@click.option("--prompt-tokens", default=LONGEST, show_default=True)
@click.option("--chunk", default=2048, show_default=True, help="Tokens of the prompt read at once.")
@click.option("--rounds", default=15, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(
    folder: Path, charts: Path, name: str, experts: int, quant: str, formats: tuple[estimate.CacheDtype, ...],
    prompt_preset: str, prompt_tokens: int, chunk: int, rounds: int, as_json: bool,
) -> None:  # fmt: skip
    folder.mkdir(parents=True)
    try:
        report: dict[str, Any] = {"machine": machine(), "preset": name, "quant": quant, "decode": {}}
        config = replace(preset(name), max_position_embeddings=LONGEST)
        config = replace(config, n_routed_experts=experts) if experts else config
        for kv in formats:
            artifact = folder / f"{kv}.v4c"
            v4c.compile(config, artifact, dtype="bf16", quant=quant, kv=kv)
            report["decode"][kv] = decoding(artifact, config, kv, rounds)
            shutil.rmtree(artifact)
        small = replace(preset(prompt_preset), max_position_embeddings=LONGEST)
        v4c.compile(small, folder / "prompt.v4c")
        report["prefill"] = prefill(v4c.load(folder / "prompt.v4c"), prompt_tokens, chunk) | {"preset": prompt_preset}
    finally:
        shutil.rmtree(folder)
    charts.mkdir(parents=True, exist_ok=True)
    draw(report, charts)
    if as_json:
        click.echo(json.dumps(report))
    else:
        _tell(report)


def fill(session: Session, rng: np.random.Generator) -> None:
    """Random rows in every cache; bytes of narrow ones are codes and scales of small numbers."""
    for spec, array in zip(session._manifest.caches, session._caches.arrays, strict=True):
        if spec.dtype == "int64":
            continue
        for row in array:
            for start in range(0, len(row), 4096):
                piece = row[start : start + 4096]
                if spec.dtype == "float32":
                    piece[...] = rng.standard_normal(piece.shape, np.float32)
                elif spec.dtype == "bfloat16":  # 0.25 to 2 and their negatives
                    sign = rng.integers(0, 2, piece.shape, np.uint16) << 15
                    piece[...] = rng.integers(0x3E80, 0x4000, piece.shape, np.uint16) | sign
                else:  # as E4M3 1.5 to 1.875, as bfloat16 some hundredths, as a scale 2**-67 to 2**-64
                    piece[...] = rng.integers(0x3C, 0x40, piece.shape, np.uint8)


def decoding(artifact: Path, config: Any, kv: estimate.CacheDtype, rounds: int) -> dict[str, Any]:
    """Steps at every context of one session with room for a million tokens, and the memory of that session."""
    model = v4c.load(artifact, verify="code")
    before = _resident()
    session = model.new_session(max_context=LONGEST)
    fill(session, np.random.default_rng(0))
    held = _resident() - before
    expected = estimate.cache_bytes(config, LONGEST, kv)
    limits, kernels = limits_of(model, artifact), model.manifest.build["kernels"]
    measured: dict[int, list[Measured]] = {context: [] for context in CONTEXTS}
    for _ in range(PASSES):  # in turns, so that a slow spell of a shared machine hits every context
        for context in CONTEXTS:
            limits.measure()
            measured[context].append(measure(_work(session, context, max(1, rounds // PASSES)), kernels, False))
    steps = []
    for context, turns in measured.items():
        costs = [launch.cost for launch in turns[0].launches]
        steps.append({
            "context": context, "ms": statistics.median(ms for turn in turns for ms in turn.times),
            "bytes_read": sum(cost.bytes for cost in costs), "flops": sum(cost.flops for cost in costs),
            "predicted_ms": 1e3 * sum(max(c.bytes / limits.bandwidth, c.flops / limits.peak) for c in costs),
            "cache_bytes": estimate.cache_bytes(config, context, kv),
        })  # fmt: skip
    for step in steps:
        step["ratio"] = step["ms"] / steps[0]["ms"]
        step["predicted_ratio"] = step["predicted_ms"] / steps[0]["predicted_ms"]
    session.close()
    allocated = sum(int(np.prod(c.sizes(1, LONGEST))) * DTYPES[c.dtype].storage.itemsize for c in model.manifest.caches)
    return {
        "stream_bandwidth_gbs": limits.bandwidth / 1e9,
        "steps": steps,
        "session_bytes": held,
        "allocated_bytes": allocated,
        "estimated_bytes": expected,
        "session_against_estimate": held / expected,
    }


def _work(session: Session, context: int, rounds: int) -> Work:
    tokens = np.random.default_rng(context).integers(0, session._manifest.vocab_size, 64)

    def prepare(session: Session) -> None:
        session.reset()
        session.pretend(context)

    def step(session: Session) -> None:
        session.decode(tokens[:1])

    session.reset()
    session.pretend(context)
    return Work(f"decode at {context}", rounds, session, prepare, step)


def prefill(model: Model, tokens: int, chunk: int) -> dict[str, Any]:
    """A long prompt read in chunks, and the time of each: it grows with what came before."""
    rng = np.random.default_rng(1)
    times, ends = [], []
    with model.new_session(max_context=tokens) as session:
        for start in range(0, tokens, chunk):
            ids = rng.integers(0, model.vocab_size, (1, min(chunk, tokens - start)))
            begin = time.perf_counter()
            logits = session.prefill(ids, chunk=chunk)
            times.append(time.perf_counter() - begin)
            ends.append(start + ids.shape[1])
        assert np.isfinite(logits).all()
    tenth = max(1, len(times) // 10)
    return {
        "tokens": tokens, "chunk": chunk, "seconds": sum(times), "ends": ends, "chunk_ms": [t * 1e3 for t in times],
        "first_tenth_ms": statistics.median(times[:tenth]) * 1e3,
        "last_tenth_ms": statistics.median(times[-tenth:]) * 1e3,
    }  # fmt: skip


def draw(report: dict[str, Any], folder: Path) -> None:
    """``long-context-decode.png``, ``long-context-memory.png`` and ``long-context-prefill.png``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def chart(name: str, x: str, y: str, lines: Callable[[Any], None], log: bool) -> None:
        figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
        lines(axes)
        if log:
            axes.set_xscale("log", base=2)
        axes.set(xlabel=x, ylabel=y, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        figure.savefig(folder / name, dpi=150)
        plt.close(figure)

    def decode(axes: Any) -> None:
        for number, (kv, part) in enumerate(report["decode"].items()):
            steps = part["steps"]
            x = [s["context"] for s in steps]
            first = steps[0]["ms"]
            axes.plot(x, [s["ms"] for s in steps], "o-", color=f"C{number}", label=f"{kv} caches, measured")
            predicted = [first * s["predicted_ratio"] for s in steps]
            axes.plot(x, predicted, ":", color=f"C{number}", label=f"{kv} caches, by bytes and FLOPs")

    def memory(axes: Any) -> None:
        for kv, part in report["decode"].items():
            steps = part["steps"]
            axes.plot([s["context"] for s in steps], [s["cache_bytes"] / 2**20 for s in steps], "o-", label=kv)

    def prompt(axes: Any) -> None:
        part = report["prefill"]
        axes.plot([e / 1000 for e in part["ends"]], part["chunk_ms"], lw=1, label=f"chunks of {part['chunk']} tokens")

    title = f"{report['preset']}, {report['quant']}"
    chart("long-context-decode.png", f"tokens of context ({title})", "ms per token", decode, True)
    chart("long-context-memory.png", f"tokens of context ({title})", "caches, MiB", memory, True)
    chart("long-context-prefill.png", f"thousand tokens read ({report['prefill']['preset']})", "ms", prompt, False)


def _resident() -> int:
    """Bytes of this process's own memory that are resident."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/self/status: expected RssAnon")


def _tell(report: dict[str, Any]) -> None:
    click.echo(f"{report['preset']}, {report['quant']} weights; {report['machine']}")
    for kv, part in report["decode"].items():
        click.echo(f"\n{kv} caches; {part['stream_bandwidth_gbs']:.1f} GB/s")
        click.echo("| context | ms | bytes read | ratio | predicted |")
        click.echo("|---|---|---|---|---|")
        for s in part["steps"]:
            click.echo(
                f"| {s['context']} | {s['ms']:.2f} | {s['bytes_read'] / 1e9:.3f} GB | {s['ratio']:.2f} "
                f"| {s['predicted_ratio']:.2f} |"
            )
        click.echo(
            f"session of {LONGEST} tokens: {part['session_bytes'] / 2**20:.1f} MiB, estimate "
            f"{part['estimated_bytes'] / 2**20:.1f} MiB ({part['session_against_estimate']:.3f})"
        )
    p = report["prefill"]
    click.echo(
        f"\nprompt of {p['tokens']} tokens on {p['preset']}: {p['seconds']:.0f} s, {p['tokens'] / p['seconds']:.0f} "
        f"tokens/s; a chunk of {p['chunk']} takes {p['first_tenth_ms']:.1f} ms at first, "
        f"{p['last_tenth_ms']:.1f} ms at last"
    )


if __name__ == "__main__":
    main()
