"""How close the discrete choices of a model come to a tie: choices within rounding have no right answer to compare.

The lightning indexer and the routers pick the best few of many scores; two correct implementations that differ in the
last bits may pick differently when the k-th and the next score almost agree, and then differ a lot.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DeepseekV4Config

from tests.parity.reference import StateDictSource, random_hf_model
from v4c.custom_ops.torch_common import ready_rows
from v4c.frontend.model.model import V4Model, WeightSource

SAFE_MARGIN = 2e-5  # a few times the difference that orders of summation make after the layers of a small model


class _Margins(TorchDispatchMode):
    """Watches the choosing ops and keeps the smallest relative gap between the last chosen score and the next."""

    def __init__(self) -> None:
        super().__init__()
        self.smallest = np.inf

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.v4c.lightning_index.default:
            q, weights, rows, positions, lengths, ratio, top_k = args
            scores = torch.einsum("bshd,bnd->bshn", q, rows).relu().mul(weights[..., None]).sum(2)
            ready = ready_rows(positions, lengths, q.shape[1], ratio)
            scores = scores.masked_fill(torch.arange(rows.shape[1]) >= ready[..., None], -torch.inf)
            self._record(scores[ready > top_k], top_k)
        elif func is torch.ops.v4c.topk_route.default:
            logits, bias, top_k, _ = args
            self._record((torch.nn.functional.softplus(logits).sqrt() + bias).flatten(0, 1), top_k)
        return func(*args, **(kwargs or {}))

    def _record(self, scores: torch.Tensor, top_k: int) -> None:
        """`scores` ``[tokens, choices]``: more choices than `top_k` in every row."""
        if scores.numel() == 0 or top_k >= scores.shape[-1]:
            return
        best = scores.sort(-1, descending=True).values
        finite = best.masked_fill(best.isinf(), 0)
        gap = (best[:, top_k - 1] - best[:, top_k]) / finite.abs().amax(-1)
        self.smallest = min(self.smallest, float(gap.min()))


def clear_model(
    config: DeepseekV4Config, seed: int, batch: int, length: int
) -> tuple[Any, StateDictSource, np.ndarray, np.random.Generator]:
    """Random weights and ids ``[batch, length]`` on which no choice is within rounding; mostly the first draw.

    Returns:
        The `transformers` model, its weights as a source, the ids, and the generator they came from.
    """
    for attempt in range(seed, seed + 20):
        reference, rng = random_hf_model(config, attempt), np.random.default_rng(attempt)
        source, ids = StateDictSource.of(reference), rng.integers(0, config.vocab_size, (batch, length))
        if choices_are_clear(source, ids):
            return reference, source, ids, rng
    raise AssertionError(f"20 draws of weights from seed {seed}, each with a choice within rounding")


def choices_are_clear(source: WeightSource, ids: np.ndarray) -> bool:
    """Whether no choice that the model makes on `ids` ``[B, S]`` is within rounding."""
    return smallest_margin(source, ids) > SAFE_MARGIN


def smallest_margin(source: WeightSource, ids: np.ndarray) -> float:
    """Of all choices that the model makes on `ids` ``[B, S]``: last chosen less next score, by the largest score."""
    model = V4Model.from_source(source)
    with _Margins() as margins, torch.no_grad():
        model.logits(torch.from_numpy(ids))
    return margins.smallest
