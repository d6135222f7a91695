"""What each optional pass buys: v4-mini compiled with all passes, and with each one switched off, in one run.

Run ``python -m benchmarks.passes``. Launches are counted from the module as it is lowered: kernel calls of one decode
step through a layer of each kind.
"""

from __future__ import annotations

import re
import statistics
import tempfile
from pathlib import Path

import click
import numpy as np

import v4c
from benchmarks.timing import interleaved, machine
from v4c.frontend.initialise import initialise
from v4c.frontend.presets import preset
from v4c.passes.pipeline import ONNX_PASSES, PHASES

THREADS = 2


@click.command(help=__doc__)
@click.option("--preset", "name", default="v4-mini", show_default=True)
@click.option("--rounds", default=15, show_default=True)
def main(name: str, rounds: int) -> None:
    passes = [p.pass_name for p in ONNX_PASSES] + [p.name for p in PHASES if p.optional]
    variants = {"all passes": [], **{f"without {p}": [p] for p in passes}, "none": passes}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        initialise(preset(name), place / "checkpoint")
        models, launches = {}, {}
        for number, (label, disabled) in enumerate(variants.items()):
            dump = place / f"ir{number}"
            artifact = place / f"{number}.v4c"
            v4c.compile(place / "checkpoint", artifact, disable_passes=disabled, dump_ir=dump)
            launches[label] = decode_launches(dump)
            models[label] = v4c.load(artifact, threads=THREADS)
        click.echo(f"{name}, float32, batch 1, {THREADS} threads; {machine()}")
        ids = np.random.default_rng(0).integers(0, preset(name).vocab_size, (1, 512))
        sessions = {label: model.new_session(max_context=2048) for label, model in models.items()}

        def prefill(session: v4c.runtime.session.Session) -> None:
            session.reset()
            session.prefill(ids)

        prompts = interleaved({k: lambda s=s: prefill(s) for k, s in sessions.items()}, rounds)
        steps = interleaved({k: lambda s=s: s.decode(ids[:, 0]) for k, s in sessions.items()}, 4 * rounds)
    for label in variants:
        counts = ", ".join(f"{k} {v}" for k, v in launches[label].items())
        prompt, step = statistics.median(prompts[label]), statistics.median(steps[label])
        click.echo(f"{label:28s} prefill 512 {prompt:7.1f} ms   decode {step:6.2f} ms   launches: {counts}")


def decode_launches(dump: Path) -> dict[str, int]:
    """Kernel calls in each decode function, from the module before memory is planned."""
    text = sorted(dump.glob("relax-*-plan-memory.py"))[0].read_text()
    found = {}
    for body in re.split(r"\n    @R\.function", text):
        name = re.search(r"def decode_(\w+)\(", body)
        if name:
            kernels = re.findall(r"^\s+(?:_\S* = |\w+: .* = )?cls\.(\w+)\(", body, re.MULTILINE)
            found[name[1]] = len(kernels)
    return found


if __name__ == "__main__":
    main()
