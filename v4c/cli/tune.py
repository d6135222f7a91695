"""``v4c tune``: a search over the kernels' schedules on this machine, kept in a database that v4c compile reads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from .console import Progress, message, new_table, print_json, print_table
from .options import activations_option, debug_option, json_option, model_source, output_option, threads_option


@click.command()
@click.option(
    "-m", "--model", metavar="CHECKPOINT|FILE.onnx", type=click.Path(path_type=Path), help="The model to read."
)
@click.option("--preset", metavar="NAME", help="A known size; see v4c presets.")
@click.option(
    "--target",
    default="cpu",
    show_default=True,
    metavar="T",
    help="cpu, cpu:LEVEL, cuda, cuda:ARCH, ascend or ascend:DEVICE.",
)
@click.option(
    "--dtype", type=click.Choice(["f32", "bf16"]), default="f32", show_default=True,
    help="Storage of the weight matrices.",
)  # fmt: skip
@click.option(
    "--quant", type=click.Choice(["none", "int8", "int4"]), default="none", show_default=True,
    help="Quantisation of the weight matrices.",
)  # fmt: skip
@activations_option
@click.option(
    "--trials", type=click.IntRange(min=1), default=40, show_default=True, metavar="N", help="Candidates per kernel."
)
@click.option(
    "--time-limit", type=click.FloatRange(min=0, min_open=True), default=60.0, show_default=True, metavar="S",
    help="Seconds for one candidate, its compilation included.",
)  # fmt: skip
@click.option("--op", "ops", multiple=True, metavar="NAME", help="Tune this kernel only; may be repeated.")
@threads_option
@output_option("DB", "Database to write; what it holds for this machine is kept, and unfinished searches go on.")
@json_option
@debug_option
def tune(
    model: Path | None,
    preset: str | None,
    target: str,
    dtype: str,
    quant: str,
    activations: str,
    trials: int,
    time_limit: float,
    ops: tuple[str, ...],
    threads: int | None,
    output: Path,
    as_json: bool,
) -> None:
    """Search the fastest schedules of a model's kernels, on this machine or for a device.

    Ctrl-C keeps what was found: the database is written after every candidate. The default of a kernel stays unless it
    is clearly beaten. Use the database with v4c compile --tuning DB. Kernels are timed on this machine's
    processor or GPU; tiles for an Ascend device are chosen by estimate out of those that its compiler takes.
    """
    source = model_source(model, preset)
    import v4c

    kind = target.partition(":")[0]
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if kind == "cpu" and load > cores / 2:
        message(f"v4c: warning: load {load:.1f} on {cores} cores: what is found on a busy machine may not be the best")
    with Progress() as progress:
        document = v4c.tune(
            source, output, target=target, dtype=dtype, quant=quant, activations=activations, trials=trials,
            time_limit=time_limit, threads=threads, ops=ops, progress=progress,
        )  # fmt: skip
    if as_json:
        print_json(document)
        return
    if kind == "ascend":
        click.echo("{device}, estimated, accepted by bishengir {compiler}".format(**document["machine"]))
        _tiles(document["kernels"])
    else:
        parts = "{cpu}, {cores} cores, {threads} threads" if kind == "cpu" else "{cpu}, {cores} processors"
        click.echo(parts.format(**document["machine"]))
        _kernels(document["kernels"])
    message(f"wrote {output}")


def _kernels(rows: list[dict[str, Any]]) -> None:
    numbers = ("default 1 / 128 rows", "tuned", "gain", "trials", "failed")
    table = new_table("kernel", "shape", "dtype", *numbers, "schedule", numbers=numbers)
    for row in rows:
        found = row["parameters"]
        table.add_row(
            row["op"], " ".join(f"{k}={_size(v)}" for k, v in row["shape"].items()), row["dtype"],
            _times(row["default_us"]), _times(row["tuned_us"]), f"{row['gain']:.2f}x", f"{row['trials']}",
            f"{row['failed']}", "default" if found is None else " ".join(f"{k}={v}" for k, v in found.items()),
        )  # fmt: skip
    print_table(table)


def _tiles(rows: list[dict[str, Any]]) -> None:
    numbers = ("default", "tuned", "gain", "refused")
    table = new_table("kernel", "shape", "dtype", "rows", *numbers, "tiles", numbers=numbers)
    for row in rows:
        table.add_row(
            row["op"], " ".join(f"{k}={_size(v)}" for k, v in row["shape"].items()), row["dtype"], row["rows"],
            f"{row['default_us']:.3g} us", f"{row['tuned_us']:.3g} us", f"{row['gain']:.2f}x", f"{row['refused']}",
            " ".join(f"{k}={v}" for k, v in row["parameters"].items()),
        )  # fmt: skip
    print_table(table)


def _size(size: int | list[int]) -> str:
    return "+".join(map(str, size)) if isinstance(size, list) else str(size)


def _times(times: dict[str, float]) -> str:
    return " / ".join(f"{t:.3g}" for t in times.values()) + " us" if times else "-"


def main(target: str) -> None:
    """``v4c tune`` as a program of its own, for `target` unless the arguments name one."""
    import sys

    from .root import main as root

    root(args=["tune", "--target", target, *sys.argv[1:]])
