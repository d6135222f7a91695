"""What a batch costs: prediction, the MTP layer's prediction, and the indexers' distance from attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.train_nano.batches import QUESTION_WEIGHT
from examples.train_nano.forward import Output

MTP_WEIGHT = 0.3


@dataclass(frozen=True)
class Loss:
    """The loss to minimise, and its parts in nats as plain numbers: ``figures``, without those of no tokens.

    ``loss`` is what the model itself predicts, weighted; ``text`` that of running text; ``recall`` and ``recalled``
    loss and accuracy at values asked for from beyond the window; ``imbalance`` the busiest expert's load over the mean.
    """

    total: Tensor
    figures: dict[str, float]


def measure(out: Output, ids: Tensor, weights: Tensor) -> Loss:
    """The loss of a pass over ``ids[:, :S]``, with ids and weights ``[B, S + 2]`` as `batches.Batch` gives them."""
    length = out.logits.shape[1]
    targets, counts = ids[:, 1 : length + 1], weights[:, 1 : length + 1]
    costs = F.cross_entropy(out.logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    main = _mean(costs, counts)
    total, figures = main, {"loss": main}
    if out.mtp_logits is not None:
        after, after_counts = ids[:, 2:], weights[:, 2:]
        ahead = F.cross_entropy(out.mtp_logits.flatten(0, 1), after.flatten(), reduction="none").view(after.shape)
        figures["mtp"] = _mean(ahead, after_counts)
        total = total + MTP_WEIGHT * figures["mtp"]
    if out.index_losses:
        figures["index"] = torch.stack(out.index_losses).mean()
        total = total + figures["index"]
    asked = counts == QUESTION_WEIGHT
    right = out.logits.argmax(-1) == targets
    if (counts == 1).any():
        figures["text"] = _mean(costs, counts == 1)
    if asked.any():
        figures |= {"recall": _mean(costs, asked), "recalled": _mean(right, asked)}
    if out.loads:
        busiest = [counts.max() / counts.float().mean() for counts in out.loads.values()]
        figures["imbalance"] = torch.stack(busiest).mean()
    return Loss(total, {name: float(value.detach()) for name, value in figures.items()})


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    return (values * counts).sum() / counts.sum().clamp_min(1e-6)
