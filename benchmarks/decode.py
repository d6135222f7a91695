"""Decode of v4-mini in float32: v4c against transformers eager, and against itself at another cache capacity.

Run ``python -m benchmarks.decode`` (extra ``bench``); all candidates take turns in one process, with the same weights.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import click
import numpy as np
import torch

import v4c
from benchmarks.timing import interleaved, machine, summary
from v4c.frontend.initialise import initialise
from v4c.frontend.presets import preset

THREADS = 2


@click.command(help=__doc__)
@click.option("--preset", "name", default="v4-mini", show_default=True)
@click.option("--context", "contexts", multiple=True, type=int, default=(256, 2048), show_default=True)
@click.option("--rounds", default=25, show_default=True, help="timed steps of each candidate")
@click.option(
    "--folder", type=click.Path(path_type=Path), help="keep the checkpoint and artifact here for the next run"
)
def main(name: str, contexts: tuple[int, ...], rounds: int, folder: Path | None) -> None:
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as scratch:
        place = folder or Path(scratch)
        place.mkdir(parents=True, exist_ok=True)
        checkpoint, artifact = place / name, place / f"{name}.v4c"
        if not checkpoint.exists():
            initialise(preset(name), checkpoint)
        if not artifact.exists():
            v4c.compile(checkpoint, artifact)
        click.echo(f"{name}, float32, batch 1, {THREADS} threads; {machine()}")
        model = v4c.load(artifact, threads=THREADS)
        for context in contexts:
            against_transformers(model, checkpoint, context, rounds)
        against_capacity(model, rounds)


def against_transformers(model: v4c.runtime.model.Model, checkpoint: Path, context: int, rounds: int) -> None:
    """One decode step after `context` tokens, in both."""
    from transformers import DeepseekV4ForCausalLM

    reference = DeepseekV4ForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = np.random.default_rng(0).integers(0, model.vocab_size, (1, context))
    session = model.new_session(max_context=context + rounds + 8)
    session.prefill(ids)
    token = torch.zeros(1, 1, dtype=torch.int64)
    with torch.inference_mode():
        cache = reference(torch.from_numpy(ids), use_cache=True, logits_to_keep=1).past_key_values
        times = interleaved(
            {
                "v4c": lambda: session.decode(np.zeros(1, np.int64)),
                "transformers eager": lambda: reference(token, past_key_values=cache, use_cache=True),
            },
            rounds,
        )
    medians = {k: statistics.median(v) for k, v in times.items()}
    ratio = medians["transformers eager"] / medians["v4c"]
    click.echo(f"context {context:6d}: " + ", ".join(f"{k} {summary(v)}" for k, v in times.items()) + f"; {ratio:.1f}x")


def against_capacity(model: v4c.runtime.model.Model, rounds: int) -> None:
    """The same step in sessions whose caches hold 4k and 1M tokens: a copy of a cache would show here."""
    ids = np.random.default_rng(0).integers(0, model.vocab_size, (1, 1024))
    sessions = {f"capacity {n}": model.new_session(max_context=n) for n in (4096, 1 << 20)}
    for session in sessions.values():
        session.prefill(ids)
    steps = {k: lambda s=s: s.decode(np.zeros(1, np.int64)) for k, s in sessions.items()}
    times = interleaved(steps, rounds)
    small, large = (statistics.median(v) for v in times.values())
    click.echo(
        "context   1024: " + ", ".join(f"{k} {summary(v)}" for k, v in times.items()) + f"; {large / small:.3f}x"
    )


if __name__ == "__main__":
    main()
