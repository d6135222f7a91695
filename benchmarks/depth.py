"""What compiling costs as a model grows: time, memory and library of v4-flash without weights, and of its first layers.

Run ``python -m benchmarks.depth``. Each compilation is a process of its own, so that peak memory is its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import click

from benchmarks.timing import machine
from v4c.frontend.presets import preset

_CHILD = """
import json, resource, sys, time
import v4c
from v4c.frontend.config import ModelConfig
config = ModelConfig.from_dict(json.loads(sys.argv[1]))
start = time.perf_counter()
v4c.compile(config, sys.argv[2], weights=False, dtype="bf16")
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


@click.command(help=__doc__)
@click.option("--preset", "name", default="v4-flash", show_default=True)
@click.option("--layers", default=6, show_default=True, help="Depth of the smaller model.")
def main(name: str, layers: int) -> None:
    config = preset(name)
    shallow = replace(
        config, num_hidden_layers=layers, attention_types=config.attention_types[:layers],
        mlp_types=config.mlp_types[:layers],
    )  # fmt: skip
    click.echo(f"{name} --no-weights, bf16, cpu; {machine()}")
    sizes = []
    with tempfile.TemporaryDirectory() as folder:
        for model in (shallow, config):
            artifact = Path(folder) / f"{model.num_hidden_layers}.v4c"
            child = [sys.executable, "-c", _CHILD, json.dumps(model.to_dict()), str(artifact)]
            found = json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout)
            sizes.append(next(artifact.glob("*.so")).stat().st_size)
            click.echo(
                f"{model.num_hidden_layers:3d} layers: {found['seconds']:6.1f} s, "
                f"peak {found['peak'] / 2**30:.2f} GiB, library {sizes[-1] / 2**20:.2f} MiB"
            )
    click.echo(f"library of {config.num_hidden_layers} layers / of {layers}: {sizes[1] / sizes[0]:.3f}")


if __name__ == "__main__":
    main()
