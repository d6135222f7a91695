"""The CUDA tuner: the CPU's search, measured on this machine's GPU, into a database of the same format.

python -m v4c.targets.cuda.tune --preset flash-slice --dtype bf16 -o db.json
v4c compile --preset flash-slice --target cuda --dtype bf16 --tuning db.json -o slice.v4c
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from v4c.errors import Error
from v4c.progress import Progress
from v4c.runtime import cuda_library

from ..cpu.tune import Search
from ..cpu.tune import tune as search
from ..cpu.tune_process import Worker
from ..cpu.tuning_database import Machine, Record, TuningDatabase
from .scheduling import Tunable
from .target import CUDATarget

COMMAND = (sys.executable, "-m", "v4c.targets.cuda.tune_worker")


def model_kernels(preset: str, device: CUDATarget, dtype: str) -> list[Tunable]:
    """The kernels with a schedule that compiling a known size would build."""
    from v4c.compiler import graph, lower, storage_of
    from v4c.frontend.presets import preset as config_of
    from v4c.passes.pipeline import PassOptions

    options, storage = PassOptions.checked(()), storage_of(dtype, "none")
    model, _ = graph(config_of(preset), options, storage, None)
    lower(model, device, storage, options)
    return list(device.kernels.scheduler.tunable.values())


def tune(
    kernels: list[Tunable], path: Path, device: CUDATarget, trials: int, time_limit: float,
    progress: Progress | None = None,
) -> list[Record]:  # fmt: skip
    """Search every kernel that the database at `path` has no finished record of; it is written after every trial.

    Raises:
        UnsupportedError: there is no GPU, or Optuna is missing.
        TuningError: the database is damaged.
    """
    from v4c.tuning import check_destination, read_database, write_database

    gpu = cuda_library.find_device()
    check_destination(path)
    database = read_database(path) if path.exists() else TuningDatabase()
    how = Search(trials, device.architecture.name, Machine(gpu.name, gpu.processors, 1))
    with Worker(1, time_limit, COMMAND) as worker:
        records = search(kernels, database, worker, how, lambda: write_database(database, path), progress)  # type: ignore[arg-type]
    write_database(database, path)
    return records


@click.command()
@click.option("--preset", required=True, metavar="NAME", help="A known size; see v4c presets.")
@click.option("--arch", default="", help="As for v4c compile --target cuda:ARCH; default: this machine's GPU.")
@click.option("--dtype", type=click.Choice(["f32", "bf16"]), default="bf16", show_default=True)
@click.option("--trials", type=click.IntRange(min=1), default=30, show_default=True, help="Candidates per kernel.")
@click.option("--time-limit", type=click.FloatRange(min=1), default=120.0, show_default=True, help="Seconds for one.")
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The database.")
def main(preset: str, arch: str, dtype: str, trials: int, time_limit: float, output: Path) -> None:
    """Search the fastest schedules of a model's kernels on this machine's GPU."""
    try:
        cuda_library.find_device()
        device = CUDATarget.parse(arch)
        records = tune(model_kernels(preset, device, dtype), output, device, trials, time_limit)
    except Error as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None
    for record in records:
        found = record.parameters or {}
        chosen = " ".join(f"{k}={v}" for k, v in found.items()) or "default"
        click.echo(f"{record.key}: {record.gain:.2f}x, {chosen}")


if __name__ == "__main__":
    main()
