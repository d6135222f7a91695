"""What ``v4c inspect`` tells of an artifact for Ascend: its launch plan in numbers, and costs at the device's peaks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from v4c.errors import ArtifactError

from .cost import Estimate, Rates, estimate, rates, total
from .devices import find_device
from .plan import FORMAT, launches, program_of

DECODE_CONTEXT = 4096
"""Tokens before the decode step whose costs are told."""
PREFILL_CHUNK = 512
"""Tokens of the prompt whose costs are told."""


def read_plan(path: Path) -> dict[str, Any]:
    """The launch plan of an artifact; ArtifactError where it is damaged or of another format."""
    try:
        plan: dict[str, Any] = json.loads(path.read_text())
        found = plan["format"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ArtifactError(f"{path}: expected a launch plan, found none that can be read") from None
    if found != FORMAT:
        raise ArtifactError(f"{path}: launch plan of format {found}, this v4c reads format {FORMAT}: recompile")
    return plan


def describe(plan: Mapping[str, Any], entry_points: Mapping[str, str], peaks: Rates | None = None) -> dict[str, Any]:
    """JSON-able: ``device``, ``compiler``, ``programs`` and ``operations`` (numbers), ``host`` (fallbacks with reasons,
    and operators of the host graph), ``rates`` with their sources, and ``decode`` and ``prefill``: see `costs`.

    Args:
        plan: as `read_plan` gives it.
        entry_points: of the manifest.
        peaks: rates in place of the published ones.
    """
    peaks = peaks or rates(find_device(plan["device"]))
    operations = plan["operations"]
    fallbacks = {name: o["reason"] for name, o in operations.items() if o["runs_on"] == "host"}
    operators = sorted({step["host"] for steps in plan["functions"].values() for step in steps if "host" in step})
    step = entry_points.get("decode_one", entry_points["decode"])
    return {
        "device": plan["device"],
        "compiler": plan["compiler"],
        "operations": len(operations),
        "programs": len(plan["programs"]),
        "host": {"fallbacks": fallbacks, "operators": operators},
        "rates": {
            "bandwidth": asdict(peaks.bandwidth),
            **{f"cube {dtype}": asdict(figure) for dtype, figure in peaks.cube.items()},
            "vector": asdict(peaks.vector),
        },
        "decode": costs(plan, step, 1, DECODE_CONTEXT, peaks),
        "prefill": costs(plan, entry_points["prefill"], PREFILL_CHUNK, PREFILL_CHUNK, peaks),
    }


def costs(plan: Mapping[str, Any], function: str, chunk: int, context: int, peaks: Rates) -> dict[str, Any]:
    """One call of an entry point for one sequence, at the peaks; nothing of it was measured.

    Returns:
        ``tokens``, ``context``, and ``total`` and by op in ``ops``: ``launches``, ``bytes``, ``cube`` (multiply-adds),
        ``vector`` (element operations), ``seconds``, ``bound``.
    """
    device = find_device(plan["device"]).limits
    dims = _Dims(batch=1, chunk=chunk, context=context)
    found: dict[str, list[Estimate]] = {}
    counts: Counter[str] = Counter()
    programs: dict[str, Any] = {}
    for launch in launches(plan, function, dims):
        if launch.program not in programs:
            programs[launch.program] = program_of(plan, launch.program, launch.op)
        one = estimate(programs[launch.program], launch.scalars, device, peaks, context)
        found.setdefault(launch.op, []).append(one)
        counts[launch.op] += 1
    ops = {op: {"launches": counts[op], **_figures(total(every))} for op, every in found.items()}
    whole = total(e for every in found.values() for e in every)
    by_time = dict(sorted(ops.items(), key=lambda item: -float(item[1]["seconds"])))
    return {
        "tokens": chunk, "context": context, "total": {"launches": counts.total(), **_figures(whole)}, "ops": by_time,
    }  # fmt: skip


def _figures(one: Estimate) -> dict[str, Any]:
    return {
        "bytes": one.bytes, "cube": one.cube, "vector": one.vector, "seconds": one.seconds, "bound": one.bound,
    }  # fmt: skip


class _Dims(dict[str, int]):
    """Dimensions of the host graph: ``rows4`` and the like are rows of a cache, one per so many tokens."""

    def __init__(self, batch: int, chunk: int, context: int) -> None:
        super().__init__(batch=batch, chunk=chunk)
        self.context = context

    def __missing__(self, name: str) -> int:
        ratio = name.removeprefix("rows")
        if not ratio.isdigit():
            raise ArtifactError(f"launch plan: expected dimensions batch, chunk and rows of caches, found {name!r}")
        return max(1, self.context // int(ratio))
