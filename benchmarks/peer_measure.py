"""The schedule of a run: who is asked for what, in which order, and what comes of it as one document.

Where memory holds all peers, their processes stay alive and take turns: a slow spell of the machine hits all of them.
Where it does not, each peer's whole round follows the other's, processes ending to make room.
"""

from __future__ import annotations

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
    """Something that is asked of peers: what it is, how, and of whom."""

    what: str
    do: Callable[[Peer], None]
    is_for: Callable[[Peer], bool] = lambda peer: True


@dataclass
class Samples:
    """What was measured of one peer, in milliseconds; contexts are keys."""

    prefill: list[float] = field(default_factory=list)
    decode: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    last_chunk: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))


class Run:
    """One run over `peers`.

    Attributes:
        samples: per peer.
        limits: bytes and FLOP per second that the machine reached, once per time they were measured.
        left_out: peers, or their contexts, with the reason.
    """

    def __init__(
        self, pool: Pool, peers: Sequence[Peer], contexts: Sequence[int], steps: int, logits: Path, tell: Tell
    ) -> None:
        self._pool, self._peers, self._contexts, self._steps = pool, list(peers), sorted(contexts), steps
        self._logits, self._tell = logits, tell
        self.samples = {peer.name: Samples() for peer in peers}
        self.limits: list[dict[str, float]] = []
        self.costs: dict[str, Any] = {}
        self.left_out: list[dict[str, str]] = []

    def round(self, label: str) -> None:
        """Everything once."""
        works: list[Work] = [Work("limits", self._measure_limits, self._tells_limits), Work("prefill", self._prefill)]
        works += [Work(f"decode at {n}", partial(self._decode, n), partial(_reaches, n)) for n in self._contexts]
        turns = [(peer, work) for work in works for peer in self._peers]
        if not self._pool.in_turns:
            turns = [(peer, work) for peer in self._peers for work in works]
        for peer, work in turns:
            if peer in self._peers and work.is_for(peer):
                self._tell(f"{label}: {peer.name}: {work.what}")
                self._guarded(peer, work.do)

    def _tells_limits(self, peer: Peer) -> bool:
        """The reference measures the machine; where a round of all takes long, every v4c does."""
        return peer is REFERENCE or (peer.engine == "v4c" and not self._pool.in_turns)

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
        self.limits.append(self._pool.ask(peer, "limits"))
        if peer is REFERENCE and not self.costs:
            self.costs = self._pool.ask(peer, "costs", context=self._contexts[0], tokens=CHUNK)

    def _prefill(self, peer: Peer) -> None:
        self.samples[peer.name].prefill.append(self._pool.ask(peer, "prefill"))

    def _decode(self, context: int, peer: Peer) -> None:
        samples = self.samples[peer.name]
        file = self._logits / f"{peer.name}-{context}.npy"
        first = not samples.decode[context] and context <= LONGEST_FILL
        answer = self._pool.ask(
            peer, "decode", context=context, steps=self._steps, save=str(file) if first else None
        )  # fmt: skip
        samples.decode[context] += answer["ms"]
        if answer["last_chunk_ms"] is not None:
            samples.last_chunk[context].append(answer["last_chunk_ms"])

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
        bandwidth = max(limit["bandwidth"] for limit in self.limits)
        peak = max(limit["peak"] for limit in self.limits)
        return {
            "model": model, "parameters": parameters(config), "active_parameters": active_parameters(config),
            "machine": machine(), "threads": threads, "rounds": rounds, "steps": self._steps,
            "in_turns": self._pool.in_turns, "chunk": CHUNK, "longest_fill": LONGEST_FILL,
            "stream_bandwidth_gbs": bandwidth / 1e9, "matrix_peak_gflops": peak / 1e9,
            "limits": self.limits, "kernel_costs": self.costs,
            "peers": [self._entry(peer, config, bandwidth, peak) for peer in self._peers],
            "left_out": self.left_out,
        }  # fmt: skip

    def _entry(self, peer: Peer, config: ModelConfig, bandwidth: float, peak: float) -> dict[str, Any]:
        samples = self.samples[peer.name]
        decode = []
        for context, times in sorted(samples.decode.items()):
            read = step_bytes(config, peer.matrix_bytes, peer.cache_bytes, context)
            found = figures(times)
            share = read / bandwidth / (found["ms"] / 1e3)
            decode.append({"context": context} | found | {"bytes_read": round(read), "bandwidth_share": share})
        prefill = [self._chunk(config, 0, samples.prefill, peak)]
        prefill += [self._chunk(config, n - CHUNK, times, peak) for n, times in sorted(samples.last_chunk.items())]
        return {
            "name": peer.name, "engine": peer.engine, "storage": peer.storage,
            "version": self._pool.versions[peer.name], "decode": decode, "prefill": prefill,
            "agreement": self.agreements(peer),
        }  # fmt: skip

    @staticmethod
    def _chunk(config: ModelConfig, start: int, times: list[float], peak: float) -> dict[str, Any]:
        flops, found = prompt_flops(config, start, CHUNK), figures(times)
        share = flops / peak / (found["ms"] / 1e3)
        return {"start": start, "tokens": CHUNK} | found | {"flops": round(flops), "peak_share": share}


def _reaches(context: int, peer: Peer) -> bool:
    return peer.longest is None or context <= peer.longest


def figures(times: Sequence[float]) -> dict[str, Any]:
    """Median and spread of milliseconds, with the samples."""
    low, median, high = np.percentile(times, [10, 50, 90])
    return {
        "ms": float(median),
        "p10_ms": float(low),
        "p90_ms": float(high),
        "samples_ms": [round(t, 3) for t in times],
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
