"""Default against tuned schedules: the kernels of a model that tuning changes, both measured in turns in one run.

Run ``python -m benchmarks.tuning`` (extra ``tune``). Kernels that the database has no record of are tuned first, which
takes some seconds per trial; then default and tuned are measured anew. The default is what v4c compiles by without a
database: what it ships for the shape (marked), or the default of the x86-64 level.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

import v4c
from benchmarks.timing import machine
from v4c.cli.console import Progress, new_table, print_table
from v4c.frontend.presets import preset
from v4c.targets.cpu.target import CPUTarget
from v4c.targets.cpu.tune import bench
from v4c.targets.schedule_search import ROWS, SLOWER, geometric_mean
from v4c.targets.scheduler import Tunable
from v4c.targets.tune_process import Worker
from v4c.tuning import model_kernels, read_database


@click.command(help=__doc__)
@click.option("--preset", "name", default="v4-mini", show_default=True)
@click.option("--target", default="cpu", show_default=True)
@click.option("--op", "ops", multiple=True, help="These kernels only.")
@click.option("--trials", default=20, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--seconds", default=2.0, show_default=True, help="Measuring time per kernel and row count.")
@click.option("--database", type=click.Path(path_type=Path), default=Path("tuning.json"), show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(
    name: str, target: str, ops: tuple[str, ...], trials: int, threads: int, seconds: float, database: Path,
    as_json: bool,
) -> None:  # fmt: skip
    with Progress() as progress:
        v4c.tune(preset(name), database, target=target, ops=ops, trials=trials, threads=threads, progress=progress)
    found, place = read_database(database), bench(CPUTarget.parse(target.partition(":")[2]), threads)
    kernels = model_kernels(preset(name), target)
    rows, kept = [], 0
    with Worker(threads, 600.0, place.command) as worker:
        for kernel in kernels:
            record = found.get(kernel.key, place.machine)
            if record is None or (ops and kernel.key.op not in ops):
                continue
            if record.parameters is None:
                kept += 1
                continue
            times = worker.ask(
                {
                    "op": kernel.key.op, "arguments": kernel.kernel.arguments, "level": place.level, "rows": ROWS,
                    "default": kernel.default.parameters, "candidate": dict(record.parameters), "seconds": seconds,
                }
            )  # fmt: skip
            rows.append(_row(kernel, record.parameters, times))
    summary = _summary(rows, kept)
    if as_json:
        click.echo(json.dumps({"machine": vars(place.machine), "preset": name, "kernels": rows, **summary}, indent=1))
        return
    click.echo(f"{name}, cpu:{place.level}, {threads} threads; {machine()}")
    _table(rows)
    click.echo(f"the default is kept for {kept} more kernels")
    click.echo(f"slowest against the default: {summary['slowest']:.3f} of its time (allowed: {SLOWER})")
    click.echo(f"largest gain on a shape that ships without a default: {summary['largest_gain_unshipped']:.2f}x")


def _row(kernel: Tunable, parameters: Any, times: dict[str, Any]) -> dict[str, Any]:
    known, default = dict(parameters), kernel.default.parameters
    return {
        "kernel": str(kernel.key),
        "shipped": kernel.shipped is not None,
        "default_us": times["default_us"],
        "tuned_us": times["candidate_us"],
        "ratio": times["ratio"],
        "gain": 1 / geometric_mean(times["ratio"]),
        "changed": {name: [default[name], value] for name, value in known.items() if value != default[name]},
    }


def _summary(rows: list[dict[str, Any]], kept: int) -> dict[str, Any]:
    return {
        "kept": kept,
        "slowest": max((max(r["ratio"].values()) for r in rows), default=1.0),
        "largest_gain_unshipped": max((r["gain"] for r in rows if not r["shipped"]), default=1.0),
    }


def _table(rows: list[dict[str, Any]]) -> None:
    numbers = [f"{kind} {n} rows" for n in ROWS for kind in ("default", "tuned")]
    table = new_table("kernel", "shipped", *numbers, "gain", "changed", numbers=(*numbers, "gain"))
    for row in rows:
        times = [f"{row[kind][str(n)]:.4g} us" for n in ROWS for kind in ("default_us", "tuned_us")]
        changed = " ".join(f"{name}={old}>{new}" for name, (old, new) in row["changed"].items())
        table.add_row(row["kernel"], "yes" if row["shipped"] else "", *times, f"{row['gain']:.2f}x", changed)
    print_table(table)


if __name__ == "__main__":
    main()
