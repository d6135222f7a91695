"""Time and peak memory of exporting a preset's graph without weights, in a process of its own.

Run ``python -m benchmarks.export [PRESET]...``.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from benchmarks.timing import machine


@click.command(help=__doc__)
@click.argument("presets", nargs=-1)
def main(presets: tuple[str, ...]) -> None:
    click.echo(machine())
    for name in presets or ("v4-flash", "v4-pro"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "graph.onnx"
            start = time.perf_counter()
            command = [sys.executable, "-m", "v4c", "export", "--preset", name, "--no-weights", "-o", str(path)]
            subprocess.run(command, check=True)
            seconds = time.perf_counter() - start
            size = path.stat().st_size
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        click.echo(f"{name}: {seconds:.1f} s, peak {peak:.2f} GiB, file {size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
