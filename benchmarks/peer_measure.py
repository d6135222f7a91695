"""The schedule of a run: who is asked for what, in which order, and what comes of it as one document.

Where memory holds all peers, their processes stay alive and take turns: a slow spell of the machine hits all of them.
Where it does not, each peer's whole round follows the other's, processes ending to make room. Other tenants of a shared
machine take bandwidth for seconds at a time, so what it reads and multiplies is measured beside every turn.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peer_child import LONGEST_FILL
from benchmarks.peer_costs import prompt_flops, step_bytes
from benchmarks.peer_engine import CHUNK
from benchmarks.peer_list import REFERENCE, Peer
from benchmarks.peer_pool import Pool
from v4c.benchmark_limits import machine
from v4c.errors import Error
from v4c.frontend.config import ModelConfig
from v4c.frontend.estimate import active_parameters, parameters

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Work:
    """Something that is timed: what it is, what comes before it untimed, how, and of whom."""

    what: str
    before: Callable[[Peer], None]
    do: Callable[[Peer, Limit], None]
    is_for: Callable[[Peer], bool] = lambda peer: True


@dataclass(frozen=True)
class Limit:
    """What the machine reached at a time.

    Attributes:
        bandwidth: bytes per second.
        peak: FLOP per second in float32.
        by: the peer that measured it.
        at: when, in seconds of `time.monotonic`.
    """

    bandwidth: float
    peak: float
    by: str
    at: float


@dataclass(frozen=True)
class Turn:
    """Milliseconds of what was timed in one turn, and the limits beside it, so many seconds old."""

    times: list[float]
    limit: Limit
    age: float

    def share(self, amount: float, limit: float) -> float:
        """`amount`, of bytes or FLOPs, per median time, of `limit` per second."""
        return amount / limit / (float(np.median(self.times)) / 1e3)

    def document(self) -> dict[str, Any]:
        """As ``--json`` writes it."""
        return {
            "samples_ms": [round(t, 3) for t in self.times], "bandwidth": self.limit.bandwidth, "peak": self.limit.peak,
            "measured_by": self.limit.by, "seconds_before": round(self.age, 3),
        }  # fmt: skip


@dataclass
class Samples:
    """What was measured of one peer, turn by turn; contexts are keys."""

    prefill: list[Turn] = field(default_factory=list)
    decode: dict[int, list[Turn]] = field(default_factory=lambda: defaultdict(list))
    last_chunk: dict[int, list[Turn]] = field(default_factory=lambda: defaultdict(list))


class Run:
    """One run over `peers`.

    Attributes:
        samples: per peer.
        limits: what the machine reached, each time it was measured.
        left_out: peers, or their contexts, with the reason.
    """

    def __init__(
        self, pool: Pool, peers: Sequence[Peer], contexts: Sequence[int], steps: int, logits: Path, tell: Tell
    ) -> None:
        self._pool, self._peers, self._contexts, self._steps = pool, list(peers), sorted(contexts), steps
        self._logits, self._tell = logits, tell
        self.samples = {peer.name: Samples() for peer in peers}
        self.limits: list[Limit] = []
        self.costs: dict[str, Any] | None = None
        self.left_out: list[dict[str, str]] = []

    def round(self, label: str) -> None:
        """Everything once."""
        works = [Work("prefill", self._pool.start, self._prefill)]
        works += [
            Work(f"decode at {n}", partial(self._fill, n), partial(self._decode, n), partial(_reaches, n))
            for n in self._contexts
        ]
        turns = [(peer, work) for work in works for peer in self._peers]
        if not self._pool.in_turns:
            turns = [(peer, work) for peer in self._peers for work in works]
        for peer, work in turns:
            if work.is_for(peer):
                self._turn(peer, work, label)

    def _turn(self, peer: Peer, work: Work, label: str) -> None:
        """What is not timed, then the limits, then what is."""
        if peer in self._peers:
            self._tell(f"{label}: {peer.name}: {work.what}")
            self._guarded(peer, work.before)
        if peer in self._peers:
            self._measure_limits(peer)
        if peer in self._peers:  # it may have failed, too, where it measures them itself
            limit = self.limits[-1]
            self._guarded(peer, lambda asked: work.do(asked, limit))

    def _guarded(self, peer: Peer, work: Callable[[Peer], None]) -> None:
        """A peer that fails is left out from here on, with the reason; without the reference there is no run."""
        try:
            work(peer)
        except Error as error:
            if peer is REFERENCE:
                raise
            self._peers.remove(peer)
            self.samples.pop(peer.name)
            self.left_out.append({"name": peer.name, "reason": str(error).removeprefix(f"{peer.name}: ")})
            self._tell(f"left out {peer.name}: {self.left_out[-1]['reason']}")

    def _measure_limits(self, peer: Peer) -> None:
        """In the peer's own process where it is v4c, else in that of a v4c that is loaded, the reference if it is.

        Where none is, what was measured last must do.
        """
        ours = [p for p in (REFERENCE, *self._peers) if p.engine == "v4c" and self._pool.is_alive(p)]
        measuring = peer if peer.engine == "v4c" else next(iter(ours), None)
        if measuring is not None:
            self._guarded(measuring, self._limits_of)

    def _limits_of(self, peer: Peer) -> None:
        if peer is REFERENCE and self.costs is None:
            self.costs = self._pool.ask(peer, "costs", context=self._contexts[0], tokens=CHUNK)
        self.limits.append(Limit(**self._pool.ask(peer, "limits"), by=peer.name, at=time.monotonic()))

    def _prefill(self, peer: Peer, limit: Limit) -> None:
        age = time.monotonic() - limit.at
        self.samples[peer.name].prefill.append(Turn([self._pool.ask(peer, "prefill")], limit, age))

    def _fill(self, context: int, peer: Peer) -> None:
        self._pool.ask(peer, "fill", context=context)

    def _decode(self, context: int, peer: Peer, limit: Limit) -> None:
        samples = self.samples[peer.name]
        file = self._logits / f"{peer.name}-{context}.npy"
        first = not samples.decode[context] and context <= LONGEST_FILL
        age = time.monotonic() - limit.at
        answer = self._pool.ask(
            peer, "decode", context=context, steps=self._steps, save=str(file) if first else None
        )  # fmt: skip
        samples.decode[context].append(Turn(answer["ms"], limit, age))
        if answer["last_chunk_ms"] is not None:
            samples.last_chunk[context].append(Turn([answer["last_chunk_ms"]], limit, age))

    def agreements(self, peer: Peer) -> list[dict[str, Any]]:
        """How far the logits of `peer` are from the reference's, at every context that both have read."""
        found = []
        for context in self._contexts:
            ours, theirs = (self._logits / f"{p.name}-{context}.npy" for p in (REFERENCE, peer))
            if ours.exists() and theirs.exists() and self.samples[peer.name].decode[context]:
                found.append({"context": context} | agreement(np.load(ours), np.load(theirs), peer.agreement))
        return found

    def document(self, config: ModelConfig, model: str, threads: int, rounds: int) -> dict[str, Any]:
        """The results as ``--json`` writes them."""
        bandwidths = [limit.bandwidth / 1e9 for limit in self.limits]
        peaks = [limit.peak / 1e9 for limit in self.limits]
        return {
            "model": model, "parameters": parameters(config), "active_parameters": active_parameters(config),
            "machine": machine(), "threads": threads, "rounds": rounds, "steps": self._steps,
            "in_turns": self._pool.in_turns, "huge_pages": self._pool.huge_pages, "chunk": CHUNK,
            "longest_fill": LONGEST_FILL,
            "stream_bandwidth_gbs": max(bandwidths), "lowest_stream_bandwidth_gbs": min(bandwidths),
            "matrix_peak_gflops": max(peaks), "lowest_matrix_peak_gflops": min(peaks),
            "limits": [{"bandwidth": x.bandwidth, "peak": x.peak, "measured_by": x.by} for x in self.limits],
            "kernel_costs": self.costs, "peers": [self._entry(peer, config) for peer in self._peers],
            "left_out": self.left_out,
        }  # fmt: skip

    def _entry(self, peer: Peer, config: ModelConfig) -> dict[str, Any]:
        samples = self.samples[peer.name]
        decode = []
        for context, turns in sorted(samples.decode.items()):
            read = step_bytes(config, peer.matrix_bytes, peer.cache_bytes, context)
            share = float(np.median([turn.share(read, turn.limit.bandwidth) for turn in turns]))
            decode.append({"context": context} | figures(turns) | {"bytes_read": round(read), "bandwidth_share": share})
        prefill = [self._chunk(config, 0, samples.prefill)]
        prefill += [self._chunk(config, n - CHUNK, samples.last_chunk[n]) for n in sorted(samples.last_chunk)]
        return {
            "name": peer.name, "engine": peer.engine, "storage": peer.storage,
            "version": self._pool.versions[peer.name], "decode": decode, "prefill": prefill,
            "agreement": self.agreements(peer),
        }  # fmt: skip

    @staticmethod
    def _chunk(config: ModelConfig, start: int, turns: list[Turn]) -> dict[str, Any]:
        flops = prompt_flops(config, start, CHUNK)
        share = float(np.median([turn.share(flops, turn.limit.peak) for turn in turns]))
        return {"start": start, "tokens": CHUNK} | figures(turns) | {"flops": round(flops), "peak_share": share}


def _reaches(context: int, peer: Peer) -> bool:
    return peer.longest is None or context <= peer.longest


def figures(turns: Sequence[Turn]) -> dict[str, Any]:
    """Median and spread of the milliseconds of all turns, with the turns."""
    low, median, high = np.percentile([ms for turn in turns for ms in turn.times], [10, 50, 90])
    return {
        "ms": float(median),
        "p10_ms": float(low),
        "p90_ms": float(high),
        "turns": [turn.document() for turn in turns],
    }


def agreement(reference: np.ndarray, found: np.ndarray, tolerance: float) -> dict[str, Any]:
    """Compare logits ``[N, V]`` with the reference's.

    ``relative_difference`` is the median over the N tokens of ``|found - reference| / |reference|`` (Euclidean norms):
    a median, for one expert chosen differently within rounding changes all logits of its token.
    """
    relative = np.linalg.norm(found - reference, axis=1) / np.linalg.norm(reference, axis=1)
    median = float(np.median(relative))
    return {
        "max_abs_diff": float(np.abs(found - reference).max()), "relative_difference": median,
        "argmax_agreement": float((found.argmax(1) == reference.argmax(1)).mean()), "tokens": len(found),
        "tolerance": tolerance, "agrees": median <= tolerance,
    }  # fmt: skip
