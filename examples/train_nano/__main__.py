"""Command line of the training example."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from examples.train_nano.config import VARIANTS
from examples.train_nano.curve import draw, write_table
from examples.train_nano.run import Figures, Plan, Run, keep_memory, recent
from v4c.errors import Error

_REPORT = 50  # steps between two lines where there is no terminal


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder of the run.")
@click.option("--steps", default=Plan.steps, type=click.IntRange(1), help="Optimiser steps.")
@click.option("--stop-at", type=click.IntRange(1), help="Stop (and save) after this step of the plan.")
@click.option("--variant", default="full", type=click.Choice(list(VARIANTS)), help="The model, or an ablation of it.")
@click.option("--seed", default=0, help="Of weights and batches.")
@click.option("--tokens", default=Plan.tokens, type=click.IntRange(128), help="Tokens of a step.")
@click.option("--save-every", default=100, type=click.IntRange(1), help="Steps between two saved states.")
@click.option("--threads", default=1, type=click.IntRange(1), help="CPU threads.")
@click.option("--resume", is_flag=True, help="Go on where the run in the folder was saved; its plan is kept.")
def main(
    out: Path, steps: int, stop_at: int | None, variant: str, seed: int, tokens: int, save_every: int, threads: int,
    resume: bool,
) -> None:  # fmt: skip
    """Train a small DeepSeek-V4 model on this machine's CPU.

    Leaves OUT/state (to resume from), OUT/checkpoint (Hugging Face layout, for v4c compile), OUT/log.csv and
    OUT/loss.png.
    """
    torch.set_num_threads(threads)
    keep_memory()
    try:
        out.mkdir(parents=True, exist_ok=True)
        if (out / "checkpoint").exists():
            raise click.UsageError(f"{out / 'checkpoint'}: expected no finished run, found one")
        run = Run.resume(out / "state") if resume else Run(Plan(variant, steps, tokens, seed))
        last = min(stop_at or run.plan.steps, run.plan.steps)
        with _bar() as bar:
            task = bar.add_task(variant, total=run.plan.steps, completed=run.step, figures="")

            def tell(figures: Figures) -> None:
                line = f"text {recent(run.log, 'text'):.3f}  recalled {recent(run.log, 'recalled'):.0%}"
                bar.update(task, completed=run.step, figures=line)
                if not sys.stderr.isatty() and run.step % _REPORT == 0:
                    seconds = recent(run.log, "seconds")
                    click.echo(f"step {run.step}/{run.plan.steps}  {line}  {seconds:.2f} s", err=True)

            while run.step < last:
                tell(run.advance())
                if run.step % save_every == 0 or run.step == last:
                    run.save(out / "state")
        draw(run.log, out / "loss.png", f"{run.plan.variant}, {run.step} steps of {run.plan.tokens} tokens")
        write_table(run.log, out / "log.csv")
        if run.step == run.plan.steps:
            run.export(out / "checkpoint")
            click.echo(f"wrote {out / 'checkpoint'}", err=True)
    except (Error, OSError) as failure:
        raise click.ClickException(str(failure)) from failure


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
