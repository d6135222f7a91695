"""Decode time against the number of routed experts: twice the experts at the same top-k should cost nothing.

Run ``python -m benchmarks.experts``. v4-mini with its experts and with twice as many, interleaved in one run; the
weights a token reads are the same but for the router's.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

import v4c
from benchmarks.timing import interleaved, machine
from v4c.frontend.initialise import initialise
from v4c.frontend.presets import preset

THREADS = 2


@click.command(help=__doc__)
@click.option("--preset", "name", default="v4-mini", show_default=True)
@click.option("--rounds", default=100, show_default=True)
def main(name: str, rounds: int) -> None:
    config = preset(name)
    counts = [config.n_routed_experts, 2 * config.n_routed_experts]
    with tempfile.TemporaryDirectory() as folder:
        place, sessions = Path(folder), {}
        for experts in counts:
            initialise(replace(config, n_routed_experts=experts), place / f"{experts}")
            v4c.compile(place / f"{experts}", place / f"{experts}.v4c")
            model = v4c.load(place / f"{experts}.v4c", threads=THREADS)
            sessions[experts] = model.new_session(max_context=2048)
        ids = np.random.default_rng(0).integers(0, config.vocab_size, (rounds + 300, 1))
        for session in sessions.values():
            session.prefill(ids[:256].reshape(1, -1))
        steps = {k: iter(ids[256:]) for k in sessions}
        times = interleaved({k: lambda k=k, s=s: s.decode(next(steps[k])) for k, s in sessions.items()}, rounds)
    medians = {k: statistics.median(times[k]) for k in counts}
    click.echo(f"{name}, float32, batch 1, top-{config.num_experts_per_tok}, {THREADS} threads; {machine()}")
    for experts in counts:
        click.echo(f"{experts:4d} experts: decode {medians[experts]:.3f} ms")
    click.echo(f"ratio {medians[counts[1]] / medians[counts[0]]:.3f}")


if __name__ == "__main__":
    main()
