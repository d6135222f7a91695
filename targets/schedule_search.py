"""The tuner of measured targets: for each kernel of a model a search over its schedule, against the one it has untuned.

Optuna proposes, a child process of the target (`Bench`) measures proposal and default in turns, and the database keeps
every trial. The best are measured once more, longer; the default stays unless it is clearly beaten and no row count is
slower.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from v4c.errors import UnsupportedError
from v4c.progress import Progress

from .scheduler import Tunable
from .tune_process import TrialFailed, Worker
from .tuning_database import Machine, Record, Trial, TuningDatabase

ROWS = (1, 128)
"""Row counts that count: a decode step, and a prompt."""

CLEARLY = 0.97
"""A schedule takes the default's place if it needs at most so much of its time: the geometric mean over row counts."""
SLOWER = 1.02
"""At no row count may it take more than so much of the default's time."""
SURE = 0.75
"""Share of the rounds that it must win where it is faster."""

CONFIRMED = 3
"""Best candidates that are measured once more."""
TRIAL_SECONDS, CONFIRM_SECONDS = 0.3, 3.0
"""Measuring time per row count, in a trial and for one that is confirmed."""

_REPEATS = 30
"""Proposals in a row that were tried before, or cannot be: then there is nothing left to try."""


@dataclass(frozen=True)
class Bench:
    """Where a target's kernels are measured.

    Attributes:
        command: the child process, which speaks as `tune_process` has it.
        level: of the code, as the keys of the database have it.
        machine: what it is.
    """

    command: tuple[str, ...]
    level: str
    machine: Machine


@dataclass(frozen=True)
class Search:
    """How to search.

    Attributes:
        trials: candidates per kernel.
        level: x86-64 level or GPU architecture of the code.
        machine: where it is measured.
    """

    trials: int
    level: str
    machine: Machine


def tune(
    kernels: Sequence[Tunable],
    database: TuningDatabase,
    worker: Worker,
    search: Search,
    save: Callable[[], None],
    progress: Progress | None = None,
) -> list[Record]:
    """Search the schedule of every kernel that `database` has no finished record of; go on where one was left.

    Args:
        kernels: what to tune.
        database: updated after every trial, and `save` called.
        worker: the child process.
        search: how.
        save: keeps the database.
        progress: called with (kernel, trials done, trials of all kernels).

    Returns:
        The records of `kernels`, in their order.

    Raises:
        UnsupportedError: Optuna is not installed.
    """
    total = search.trials * len(kernels)
    records = []
    for index, kernel in enumerate(kernels):
        known = database.get(kernel.key, search.machine) or Record(kernel.key, search.machine)
        for record in _search(kernel, known, worker, search) if not known.finished else ():
            known = record
            database.put(record)
            save()
            if progress:
                done = index * search.trials + min(len(record.trials), search.trials)
                progress(f"tune {kernel.key}", done, total)
        records.append(known)
    return records


def _search(kernel: Tunable, record: Record, worker: Worker, search: Search) -> Iterator[Record]:
    """The record after each trial, and at last with what was found."""
    request = {
        "op": kernel.key.op, "arguments": kernel.kernel.arguments, "level": search.level, "rows": ROWS,
        "default": kernel.default.parameters,
    }  # fmt: skip
    proposals = _Proposals(kernel, record.trials)
    while len(record.trials) < search.trials and (parameters := proposals.next()) is not None:
        try:
            times = worker.ask({**request, "candidate": parameters, "seconds": TRIAL_SECONDS})
            trial = Trial(parameters, value(times["ratio"]))
        except TrialFailed as failure:
            trial = Trial(parameters, None, str(failure))
        proposals.tell(trial)
        record = replace(record, trials=(*record.trials, trial))
        yield record
    ranked = sorted((t for t in record.trials if t.ratio is not None), key=lambda t: t.ratio or math.inf)
    default_us: Mapping[str, float] = {}
    for trial in ranked[:CONFIRMED]:  # the best in any case: how long the default takes is worth knowing
        if default_us and (trial.ratio or math.inf) >= 1:
            break
        try:
            times = worker.ask({**request, "candidate": dict(trial.parameters), "seconds": CONFIRM_SECONDS})
        except TrialFailed:
            continue
        default_us = times["default_us"]
        if clearly_beaten(times):
            yield replace(
                record, parameters=trial.parameters, default_us=default_us, tuned_us=times["candidate_us"],
                finished=True,
            )  # fmt: skip
            return
    yield replace(record, parameters=None, default_us=default_us, tuned_us=default_us, finished=True)


def value(ratios: Mapping[str, float]) -> float:
    """What a search minimises: the geometric mean of time over the default's, or the worst where that is slower."""
    worst = max(ratios.values())
    return worst if worst > SLOWER else geometric_mean(ratios)


def clearly_beaten(times: Mapping[str, Mapping[str, float]]) -> bool:
    """Whether the candidate of an answer of the worker is to take the default's place."""
    ratios, wins = times["ratio"], times["wins"]
    sure = all(wins[rows] >= SURE for rows, ratio in ratios.items() if ratio < CLEARLY)
    return value(ratios) <= CLEARLY and sure


def geometric_mean(ratios: Mapping[str, float]) -> float:
    """Of the values."""
    return math.exp(sum(math.log(r) for r in ratios.values()) / len(ratios))


class _Proposals:
    """Candidates for a kernel, each once: the default's neighbours, then what Optuna's Parzen estimator proposes.

    Args:
        kernel: what for.
        trials: what is known from earlier runs.
    """

    def __init__(self, kernel: Tunable, trials: Sequence[Trial]) -> None:
        self._optuna = _optuna()
        self._kernel = kernel
        categorical = self._optuna.distributions.CategoricalDistribution
        self._distributions = {name: categorical(choices) for name, choices in kernel.choices.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            sampler = self._optuna.samplers.TPESampler(seed=len(trials), multivariate=True, n_startup_trials=8)
        self._study = self._optuna.create_study(direction="minimize", sampler=sampler)
        self._asked: Any = None
        self._known: dict[frozenset[tuple[str, int]], float | None] = {}
        for trial in (Trial(kernel.default.parameters, 1.0), *trials):
            self._known[frozenset(trial.parameters.items())] = trial.ratio
            if all(trial.parameters.get(name) in choices for name, choices in kernel.choices.items()):
                state = self._states.COMPLETE if trial.ratio is not None else self._states.FAIL
                self._study.add_trial(
                    self._optuna.trial.create_trial(
                        params=dict(trial.parameters), distributions=self._distributions, value=trial.ratio, state=state
                    )
                )

        for parameters in _neighbours(kernel):
            self._study.enqueue_trial(parameters, skip_if_exists=True)

    @property
    def _states(self) -> Any:
        return self._optuna.trial.TrialState

    def next(self) -> dict[str, int] | None:
        """A candidate that was not tried, or None where there seems to be none left."""
        for _ in range(_REPEATS):
            self._asked = self._study.ask(self._distributions)
            parameters = dict(self._asked.params)
            identity = frozenset(parameters.items())
            if identity not in self._known and _possible(self._kernel, parameters):
                return parameters
            self._close(self._known.get(identity))
        return None

    def tell(self, trial: Trial) -> None:
        """What became of the last candidate."""
        self._known[frozenset(trial.parameters.items())] = trial.ratio
        self._close(trial.ratio)

    def _close(self, ratio: float | None) -> None:
        if ratio is None:
            self._study.tell(self._asked, state=self._states.FAIL)
        else:
            self._study.tell(self._asked, ratio)


def _neighbours(kernel: Tunable) -> Iterator[dict[str, int]]:
    """The default with one number changed to the next smaller or larger choice."""
    own = kernel.default.parameters
    for name, choices in kernel.choices.items():
        at = choices.index(own[name])
        for value in choices[max(0, at - 1) : at] + choices[at + 1 : at + 2]:
            yield {**own, name: value}


def _possible(kernel: Tunable, parameters: Mapping[str, int]) -> bool:
    try:
        kernel.schedule(parameters)
    except UnsupportedError:
        return False
    return True


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UnsupportedError("tuning: expected optuna to be installed, found none: pip install 'v4c[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
