"""What a run leaves for the eye: its figures as a table, and the loss curve as a picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from v4c.runtime.whole_file import replacing

COLUMNS = ("step", "loss", "text", "recall", "recalled", "mtp", "index", "imbalance")


def write_table(log: Sequence[dict[str, float]], path: Path) -> None:
    """The figures of every step as CSV; empty where a step has none. The file is replaced when complete."""
    with replacing(path) as building, building.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows({name: f"{value:.4g}" for name, value in figures.items()} for figures in log)


def draw(log: Sequence[dict[str, float]], path: Path, title: str) -> None:
    """Losses and recall of every step, and their running means, as a PNG.

    Args:
        log: a run's figures.
        path: of the PNG; replaced when complete.
        title: above the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = np.array([figures["step"] for figures in log])
    figure, (losses, recall) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(2, 1))
    for key, label, colour in (("text", "text", "C0"), ("mtp", "MTP", "C1"), ("recall", "asked values", "C2")):
        values = np.array([figures.get(key, np.nan) for figures in log])
        losses.plot(steps, values, colour, alpha=0.15, linewidth=0.5)
        losses.plot(steps, _running(values), colour, label=label)
    losses.set(ylabel="loss in nats", title=title)
    losses.legend()
    recall.plot(steps, _running(np.array([figures.get("recalled", np.nan) for figures in log])), "C2")
    recall.set(ylabel="recalled in training", xlabel="step", ylim=(0, 1))
    figure.tight_layout()
    with replacing(path) as building:
        figure.savefig(building, dpi=100, format="png", metadata={"Software": None})
    pyplot.close(figure)


def _running(values: np.ndarray, width: int = 25) -> np.ndarray:
    """Mean of each value and the `width` - 1 before it, of those that are there."""
    known = ~np.isnan(values)
    sums, counts = (np.cumsum([0.0, *column]) for column in (np.nan_to_num(values), known))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    with np.errstate(invalid="ignore"):
        return (sums[ends] - sums[starts]) / (counts[ends] - counts[starts])
