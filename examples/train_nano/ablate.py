"""Trains and measures the model and its ablations on one small equal budget: ``python -m examples.train_nano.ablate``.

The budget is far too small for a good model; it shows what each mechanism does early, not what it is worth in the end.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from examples.train_nano.config import VARIANTS
from examples.train_nano.forward import Forward
from examples.train_nano.run import Plan, Run, keep_memory
from v4c.evaluation import evaluate
from v4c.runtime.text import Tokenizer

DISTANCES = (24, 64, 128)


class TrainedReader:
    """A run's model as `v4c.evaluate` takes it: also one with a plain residual, which is no V4 checkpoint."""

    kind, target, weights = "checkpoint", "torch", "float32"

    def __init__(self, run: Run, tokenizer: Path) -> None:
        self.name, self.vocab_size = run.plan.variant, run.variant.config.vocab_size
        self.tokenizer: Tokenizer | Path | None = tokenizer
        self._forward = Forward(run.variant.config, run.weights, run.variant.plain_residual)

    @torch.no_grad()
    def all_logits(self, ids: np.ndarray) -> np.ndarray:
        return self._forward(torch.from_numpy(ids)).logits.numpy()

    def last_logits(self, ids: np.ndarray) -> np.ndarray:
        return self.all_logits(ids)[:, -1]


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder of ablations.json.")
@click.option("--steps", default=120, type=click.IntRange(1), help="Optimiser steps of each.")
@click.option("--variant", "variants", multiple=True, type=click.Choice(list(VARIANTS)), help="Default: all.")
@click.option("--threads", default=1, type=click.IntRange(1))
def main(out: Path, steps: int, variants: Sequence[str], threads: int) -> None:
    torch.set_num_threads(threads)
    keep_memory()
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for variant in variants or VARIANTS:
        rows.append(measure(Plan(variant, steps, recall_first=0.7), out))
        (out / "ablations.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        click.echo(json.dumps(rows[-1]), err=True)
    click.echo(f"| | parameters | seconds | bits per byte | {' | '.join(f'recall at {d}' for d in DISTANCES)} |")
    click.echo("|---" * (4 + len(DISTANCES)) + "|")
    for row in rows:
        recall = " | ".join(f"{row['recall'][str(d)]:.0%}" for d in DISTANCES)
        size = f"{row['parameters'] / 1e6:.2f} M"
        click.echo(f"| {row['variant']} | {size} | {row['seconds']:.0f} | {row['bits_per_byte']:.3f} | {recall} |")


def measure(plan: Plan, out: Path) -> dict[str, Any]:
    """Train a variant to the end of its plan; its figures."""
    run = Run(plan)
    while run.step < plan.steps:
        run.advance()
    words = out / "tokenizer.json"
    run.tokenizer.save(str(words))
    found = evaluate(TrainedReader(run, words), distances=DISTANCES, questions=64)
    return {
        "variant": plan.variant,
        "steps": plan.steps,
        "parameters": sum(tensor.numel() for tensor in run.optimiser.parameters.values()),
        "seconds": sum(figures["seconds"] for figures in run.log),
        "bits_per_byte": found["text"]["bits_per_byte"],
        "recall": {str(row["distance"]): row["accuracy"] for row in found["recall"]},
    }


if __name__ == "__main__":
    main()
