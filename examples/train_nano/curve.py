"""The loss curve as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np


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
    recall.plot(steps, _running(np.array([figures["recalled"] for figures in log])), "C2")
    recall.set(ylabel="recalled in training", xlabel="step", ylim=(0, 1))
    figure.tight_layout()
    building = path.with_name(f".{path.name}.part")
    figure.savefig(building, dpi=100, format="png", metadata={"Software": None})
    pyplot.close(figure)
    os.replace(building, path)


def _running(values: np.ndarray, width: int = 25) -> np.ndarray:
    """Mean of each value and the `width` - 1 before it."""
    sums = np.cumsum(np.concatenate([[0.0], np.nan_to_num(values)]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)
