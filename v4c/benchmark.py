"""How fast a compiled model is, and how near to what the machine can do: steps, kernels, and the machine's limits.

Everything is measured in one run with the same threads. Only the runtime is needed: what kernels compute is in the
manifest, and the functions that measure the limits are in the library (`targets/cpu/kernels/limits.py`).
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from v4c.benchmark_limits import Limits, limits_of, machine
from v4c.benchmark_profile import Kernels, Launch, against, launches, rows, typical, write_trace
from v4c.errors import ArtifactError, OutputError, UnsupportedError
from v4c.passes.cost import Cost
from v4c.progress import Progress
from v4c.runtime.inputs import checked_count
from v4c.runtime.model import Model, load
from v4c.runtime.profile import Call, Recorder
from v4c.runtime.session import Session
from v4c.runtime.weight_memory import WeightTraffic

CHUNK = 512
"""Tokens of a prompt that are read at once."""
GPU_CHUNK = 2048
"""The same on a GPU, where a weight tile meets more rows."""
LONGEST_FILL = 16384
"""Tokens that are read to fill caches; what lies beyond repeats them."""
CYCLE = 16
"""A step is measured at that many positions in turn: compressors have more to do at some of them."""
PROMPT_SHARE, FEWEST_PROMPTS = 5, 3
"""Prompts are read once where that many steps are measured, and at least that often."""
WARMUP = 3


def bench(
    path: str | os.PathLike[str],
    *,
    contexts: Sequence[int] = (1024,),
    prompt_tokens: int = 512,
    threads: int | None = None,
    rounds: int = 25,
    profile: bool = False,
    trace: str | os.PathLike[str] | None = None,
    weights_memory: int | str | None = None,
    huge_pages: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure prefill and decode of an artifact; random tokens, one row.

    Args:
        path: the artifact.
        contexts: for each, a decode step whose token is the last of that many.
        prompt_tokens: tokens of the prompt.
        threads: see `v4c.load`.
        rounds: steps measured at each context, and a fifth as many prompts.
        profile: also measure every kernel.
        trace: file for a Chrome trace of a profiled step of each kind.
        weights_memory: bytes that weights may occupy, as `load` takes them; the report then has ``experts``.
        huge_pages: copy the weights into huge pages, as `load` does.
        progress: called with (what, done, total).

    Returns:
        What ``v4c bench --json`` prints; docs/commands.md has the keys.

    Raises:
        ArtifactError: it cannot be run, or was compiled before there was a `bench`.
        UnsupportedError: it is the simulation of another device, or a profile is asked for on a GPU.
        InputError: an argument is out of range.
        OutputError: the trace cannot be written.
    """
    if trace is not None and (Path(trace).is_dir() or not Path(trace).parent.is_dir()):
        raise OutputError(f"{trace}: expected a file name in an existing folder")
    rounds = checked_count(rounds, "rounds", 1)
    model = load(path, threads=threads, weights_memory=weights_memory, huge_pages=huge_pages)
    if model.manifest.plan is not None:
        raise UnsupportedError(f"{path}: expected a model compiled to run, found a simulation: its speed says nothing")
    kernels = model.manifest.build.get("kernels")
    if kernels is None:
        raise ArtifactError(f"{path}: expected a table of kernels in the manifest, found none: compile it again")
    contexts = [checked_count(n, "context", 1, model.max_context) for n in contexts]
    prompt_tokens = checked_count(prompt_tokens, "prompt_tokens", 1, model.max_context)
    if model.on_gpu and (profile or trace is not None):
        raise UnsupportedError(f"{path}: expected no profile for a GPU, whose kernels nsys shows")
    limits = limits_of(model, path)
    work = [*(partial(decoding, model, n, rounds) for n in contexts), partial(prefilling, model, prompt_tokens, rounds)]
    measured: list[Measured] = []
    for make in work:
        if progress:
            progress("measure", len(measured), len(work))
        limits.measure()
        measured.append(measure(make(), kernels, profile or trace is not None, model))
    limits.measure()
    *decode, prefill = measured
    document: dict[str, Any] = {
        "machine": machine(model),
        "threads": model.threads,
        "huge_pages": huge_pages,
        "stream_bandwidth_gbs": limits.bandwidth / 1e9,
        "matrix_peak_gflops": limits.peak / 1e9,
        "decode": [{"context": n} | m.figures(1, limits) for n, m in zip(contexts, decode, strict=True)],
        "prefill": [{"tokens": prompt_tokens} | prefill.figures(prompt_tokens, limits)],
    }
    if profile:
        document["profile"] = {
            "decode": [{"context": n} | m.profile(limits) for n, m in zip(contexts, decode, strict=True)],
            "prefill": [{"tokens": prompt_tokens} | prefill.profile(limits)],
        }
    if trace is not None:
        write_trace(Path(trace), {m.what: (typical(m.profiled, m.launches), m.launches) for m in measured})
    return document


@dataclass(frozen=True)
class Work:
    """Something to measure again and again.

    Attributes:
        what: what it is, for people.
        rounds: how often.
        session: where it happens.
        prepare: brings a session to where a step can begin; not measured.
        step: what is measured.
    """

    what: str
    rounds: int
    session: Session
    prepare: Callable[[Session], None]
    step: Callable[[Session], object]


def decoding(model: Model, context: int, rounds: int) -> Work:
    """A step of one token, the last of `context` tokens or one shortly before it."""
    first = context - min(context, CYCLE)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, context)
    session = model.new_session(max_context=context)
    read = tokens[: min(first, LONGEST_FILL)]
    if read.size:
        session.prefill(read[None], chunk=CHUNK)

    def prepare(session: Session) -> None:
        if not first <= session.position[0] < context:
            session.pretend(first)

    def step(session: Session) -> None:
        session.decode(tokens[session.position])

    return Work(f"decode at {context}", rounds, session, prepare, step)


def prefilling(model: Model, tokens: int, rounds: int) -> Work:
    """Reading a prompt into an empty session."""
    ids = np.random.default_rng(0).integers(0, model.vocab_size, (1, tokens))
    session = model.new_session(max_context=tokens)

    def step(session: Session) -> None:
        session.prefill(ids, chunk=GPU_CHUNK if model.on_gpu else CHUNK)

    return Work(f"prefill of {tokens}", max(FEWEST_PROMPTS, rounds // PROMPT_SHARE), session, Session.reset, step)


def measure(work: Work, kernels: Kernels, profile: bool, model: Model | None = None) -> Measured:
    """Time `work`; with `profile` in turn with the same under the profiler, so that a slow spell hits both."""
    watched = work.session.fork()
    recorder = Recorder(watched)
    for session in (work.session, watched):
        for _ in range(WARMUP):
            _step(work, session)
    recorder.take()
    _step(work, watched)
    calls = recorder.take()
    recorder.record_arguments()
    _step(work, watched)
    made = launches(calls, recorder.take_arguments(), kernels, work.session.max_context)
    recorder.record_times()
    times, profiled_times, profiled = [], [], []
    memory = None if model is None else model.weight_memory
    before = None if memory is None else replace(memory.traffic)
    steps = work.rounds * (2 if profile else 1)
    for _ in range(work.rounds):
        times.append(_step(work, work.session))
        if profile:
            profiled_times.append(_step(work, watched))
            profiled.append(recorder.take())
    experts = None
    if before is not None and memory is not None and model is not None:
        experts = _experts(before, memory.traffic, steps, model.resident_weight_bytes)
    return Measured(work.what, times, made, profiled_times, profiled, experts)


def _experts(before: WeightTraffic, after: WeightTraffic, steps: int, resident: int) -> dict[str, Any]:
    """What the bound on the weights' memory cost, over `steps` steps."""
    uses, hits = after.uses - before.uses, after.hits - before.hits
    return {
        "uses": uses, "hit_rate": hits / uses if uses else 1.0,
        "bytes_read": round((after.bytes_read - before.bytes_read) / steps), "resident_bytes": resident,
    }  # fmt: skip


def _step(work: Work, session: Session) -> float:
    """Milliseconds of a step."""
    work.prepare(session)
    start = time.perf_counter()
    work.step(session)
    return (time.perf_counter() - start) * 1e3


@dataclass(frozen=True)
class Measured:
    """Times of `Work` in milliseconds, without and with the profiler, the launches of a step, and profiled calls."""

    what: str
    times: list[float]
    launches: list[Launch]
    profiled_times: list[float]
    profiled: list[list[Call]]
    experts: dict[str, Any] | None = None

    def figures(self, tokens: int, limits: Limits) -> dict[str, Any]:
        """Median and spread, tokens per second, and how much of the machine's limits that is."""
        ms = statistics.median(self.times)
        low, high = np.percentile(self.times, [10, 90])
        cost = sum((launch.cost for launch in self.launches), Cost())
        shares = against(ms, cost.bytes, cost.flops, limits)
        return {
            "ms": ms, "p10_ms": float(low), "p90_ms": float(high), "tokens_per_second": tokens / ms * 1e3,
            "bytes_read": round(cost.bytes), "bandwidth_share": shares["bandwidth_share"],
            "flops": round(cost.flops), "peak_share": shares["peak_share"],
            **({} if self.experts is None else {"experts": self.experts}),
        }  # fmt: skip

    def profile(self, limits: Limits) -> dict[str, Any]:
        """The median step without and with the profiler, and a row per kernel."""
        step = statistics.median(self.times)
        return {
            "step_ms": step, "profiled_ms": statistics.median(self.profiled_times),
            "rows": rows(self.launches, self.profiled, step, limits),
        }  # fmt: skip
