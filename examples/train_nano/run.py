"""A training run: its plan, its steps, and the files it leaves."""

from __future__ import annotations

import ctypes
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from examples.train_nano import corpus, vocabulary
from examples.train_nano.batches import Batches
from examples.train_nano.config import VARIANTS
from examples.train_nano.forward import Forward
from examples.train_nano.loss import measure
from examples.train_nano.optimiser import Optimiser, balance, learning_rate
from examples.train_nano.state import load_state, save_state
from examples.train_nano.weights import initial, join_experts
from v4c.errors import CheckpointError
from v4c.frontend.save import Layout, save_checkpoint
from v4c.recall import Facts

Figures = dict[str, float]
# Part of the run, and the length of its sequences: short ones first, for they are what copying is learnt on.
_STAGES = ((0.35, 128), (0.65, 256), (0.85, 512), (1.0, 1024))


@dataclass(frozen=True)
class Plan:
    """What a run does.

    Attributes:
        variant: a key of `config.VARIANTS`.
        steps: optimiser steps.
        tokens: read in one step.
        seed: of weights and batches.
        muon_rate, adamw_rate: peak rates.
        recall_first: part of the run that is about recall alone, in sequences of hardly anything but facts: copying
            from compressed rows is learnt there in some hundred steps, amid text it was not begun after 400.
        recall_share: part of the sequences that are about recall afterwards.
        sparse_from: part of the run after which CSA layers read the indexer's choice instead of all rows; until then
            the indexer learns from attention that sees everything (V3.2's dense warm-up).
    """

    variant: str = "full"
    steps: int = 1200
    tokens: int = 2048
    seed: int = 0
    muon_rate: float = 1e-2
    adamw_rate: float = 5e-3
    recall_first: float = 0.15
    recall_share: float = 0.4
    sparse_from: float = 0.5

    def length(self, step: int) -> int:
        """Tokens of each sequence at `step`."""
        part = step / max(1, self.steps)
        return min(self.tokens, next(length for end, length in _STAGES if part < end or end == 1.0))


class Run:
    """One run, from the start or where it was saved.

    Args:
        plan: what to do.
        tokenizer: of an earlier run; None trains one.
    """

    def __init__(self, plan: Plan, tokenizer: Tokenizer | None = None) -> None:
        self.plan, self.variant, self.step = plan, VARIANTS[plan.variant], 0
        texts, _ = corpus.split(corpus.documents())
        self.tokenizer = tokenizer if tokenizer is not None else vocabulary.train_tokenizer(texts)
        facts = Facts.of(lambda text: self.tokenizer.encode(text, add_special_tokens=False).ids)
        text = vocabulary.encode_all(self.tokenizer, texts)
        self.batches = Batches(text, facts, plan.seed, self.variant.config.sliding_window)
        self.log: list[Figures] = []
        self._take(initial(self.variant, vocabulary.compressed_ids(self.tokenizer), plan.seed))

    def _take(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights
        self.optimiser = Optimiser(weights, self.plan.muon_rate, self.plan.adamw_rate)

    @classmethod
    def resume(cls, folder: Path) -> Run:
        """The run whose state `save` wrote. Raises CheckpointError where a file is missing or damaged."""
        weights, moments, run = load_state(folder)
        try:
            resumed = cls(Plan(**run["plan"]), Tokenizer.from_str(run["tokenizer"]))
            resumed.step, resumed.log = run["step"], run["log"]
            # In the order they began in: the norm of all gradients is a sum over them, and files are sorted by name.
            weights = {name: weights[name] for name in resumed.weights}
        except (KeyError, TypeError) as failure:
            raise CheckpointError(f"{folder}: expected the saved state of a run, found {failure}") from failure
        resumed._take(weights)
        resumed.optimiser.load(moments)
        return resumed

    def save(self, folder: Path) -> None:
        """Write what `resume` reads."""
        run = {"plan": asdict(self.plan), "step": self.step, "log": self.log, "tokenizer": self.tokenizer.to_str()}
        save_state(folder, self.weights, self.optimiser.state(), run)

    def advance(self) -> Figures:
        """One step; returns its figures, which are also kept in `log`."""
        plan, began = self.plan, time.perf_counter()
        length = plan.length(self.step)
        share = 1.0 if self.step < plan.recall_first * plan.steps else plan.recall_share
        batch = self.batches.draw(self.step, plan.tokens // length, length, share)
        ids, counts = torch.from_numpy(batch.ids), torch.from_numpy(batch.weights)
        forward = Forward(
            self.variant.config, self.weights, self.variant.plain_residual,
            sparse=self.step >= plan.sparse_from * plan.steps, half=True,
        )  # fmt: skip
        out = forward(ids[:, :length], ids[:, 1 : length + 1])
        loss = measure(out, ids, counts)
        loss.total.backward()
        norm = self.optimiser.step(learning_rate(self.step, plan.steps))
        with torch.no_grad():
            balance(self.weights, out.loads)
        self.step += 1
        figures = {"step": self.step, **loss.figures, "gradient": norm, "seconds": time.perf_counter() - began}
        self.log.append({name: round(value, 5) for name, value in figures.items()})
        return figures

    def export(self, folder: Path, layout: Layout = "hf") -> None:
        """Write the model as a checkpoint with its tokenizer. Raises as `v4c.frontend.save.save_checkpoint`."""
        files = {"tokenizer.json": self.tokenizer.to_str(pretty=False).encode()}
        save_checkpoint(self.variant.config, join_experts(self.weights), folder, layout, files=files)


def recent(log: list[Figures], key: str, count: int = 50) -> float:
    """Mean of a figure over the last `count` steps that have it."""
    values = [figures[key] for figures in log[-count:] if key in figures]
    return float(np.mean(values)) if values else float("nan")


def keep_memory() -> None:
    """Keep freed memory in the process: a step allocates the same large arrays again, and fresh pages cost as much as
    the arithmetic on them. glibc only; elsewhere nothing happens."""
    if sys.platform == "linux":
        libc: Any = ctypes.CDLL(None)
        for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            if hasattr(libc, "mallopt"):
                libc.mallopt(option, 1 << 30)
