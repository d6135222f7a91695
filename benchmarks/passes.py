"""What each optional pass buys: v4-mini compiled with all passes, and with each one switched off, in one run.

Run ``python -m benchmarks.passes``. Every variant takes turns with the model that has all passes, so a slow spell of
the machine hits both; its times are quoted as the base's times the ratio of the two medians. Launches are kernel calls
of one decode step, counted from the module as it is compiled (what ``--dump-ir`` writes).
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np

import v4c
from benchmarks.timing import interleaved, machine
from v4c.frontend.initialise import initialise
from v4c.frontend.presets import preset
from v4c.passes.pipeline import ONNX_PASSES, OPTIONAL
from v4c.passes.summary import read_summary

THREADS = 2
BASE = "all passes"


class Variant:
    """One compiled model with a session, and what its dump says."""

    def __init__(self, place: Path, label: str, disabled: list[str]) -> None:
        click.echo(f"compile {label}", err=True)
        dump, artifact = place / f"ir {label}", place / f"{label}.v4c"
        v4c.compile(place / "model.onnx", artifact, disable_passes=disabled, dump_ir=dump)
        self.label, self.stages = label, read_summary(dump)["stages"]
        planned = next(s for s in self.stages if s["stage"].endswith("plan-memory"))
        self.launches, self.csa_layer = planned["launches"], csa_layer_launches(dump, planned)
        self.library = next(artifact.glob("*.so")).stat().st_size
        self.session = v4c.load(artifact, threads=THREADS).new_session(max_context=2048)

    def row(self, prefill: float, decode: float) -> dict[str, Any]:
        return {
            "variant": self.label, "prefill_512_ms": prefill, "decode_ms": decode, "launches": self.launches,
            "csa_layer": self.csa_layer, "library_bytes": self.library,
        }  # fmt: skip


@click.command(help=__doc__)
@click.option("--preset", "name", default="v4-mini", show_default=True)
@click.option("--rounds", default=9, show_default=True)
@click.option("--only", multiple=True, help="Passes to switch off one at a time; default all.")
@click.option("--json", "as_json", is_flag=True)
def main(name: str, rounds: int, only: tuple[str, ...], as_json: bool) -> None:
    ids = np.random.default_rng(0).integers(0, preset(name).vocab_size, (1, 512))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        initialise(preset(name), place / "checkpoint")
        v4c.export(place / "checkpoint", place / "model.onnx")  # traced once, not for every variant
        base = Variant(place, BASE, [])
        idle = [p for p in OPTIONAL if does_nothing(base.stages, p)]
        wanted = {f"without {p}": [p] for p in only or OPTIONAL if p not in idle}
        wanted |= {"without any ONNX pass": [p.pass_name for p in ONNX_PASSES], "none": list(OPTIONAL)}
        rows, own = [], None
        for label, disabled in wanted.items():
            other = Variant(place, label, disabled)
            found = compare(base.session, other.session, ids, rounds)
            own = own or found
            scaled = [round(o * f[1] / f[0], 3) for o, f in zip([own[0][0], own[1][0]], found, strict=True)]
            rows.append(other.row(*scaled))
            click.echo(f"  {json.dumps(rows[-1])}", err=True)  # nothing is lost if a later variant fails
            other.session.close()
            for file in (place / f"{label}.v4c").iterdir():
                file.unlink()
        assert own is not None
        rows.insert(0, base.row(round(own[0][0], 3), round(own[1][0], 3)))
    if as_json:
        document = {"preset": name, "threads": THREADS, "machine": machine(), "idle": idle, "rows": rows}
        click.echo(json.dumps(document, indent=1))
        return
    click.echo(f"{name}, float32, batch 1, {THREADS} threads; {machine()}")
    click.echo("| | prefill 512 | decode | launches per step | per CSA layer | library |\n|---|---|---|---|---|---|")
    for row in rows:
        click.echo(
            f"| {row['variant']} | {row['prefill_512_ms']:.1f} ms | {row['decode_ms']:.2f} ms | {row['launches']} "
            f"| {row['csa_layer']} | {row['library_bytes'] / 2**20:.2f} MiB |"
        )
    click.echo(f"nothing to do in this graph: {', '.join(idle)}")


def compare(base: Any, other: Any, ids: np.ndarray, rounds: int) -> list[tuple[float, float]]:
    """Median milliseconds of (base, other): prefill of all of `ids`, then decode."""

    def prefill(session: Any) -> None:
        session.reset()
        session.prefill(ids)

    prompts = interleaved({"base": lambda: prefill(base), "other": lambda: prefill(other)}, rounds)
    token = ids[:, 0]
    steps = interleaved({"base": lambda: base.decode(token), "other": lambda: other.decode(token)}, 10 * rounds)
    return [(statistics.median(t["base"]), statistics.median(t["other"])) for t in (prompts, steps)]


def does_nothing(stages: list[dict[str, Any]], name: str) -> bool:
    """Whether an ONNX pass left the graph as it was."""
    for before, after in itertools.pairwise(stages):
        if after["stage"].startswith("onnx") and after["stage"].endswith(f"-{name}"):
            return before | {"stage": ""} == after | {"stage": ""}
    return False


def csa_layer_launches(dump: Path, stage: dict[str, Any]) -> int:
    """Kernel launches of one CSA layer; a step between layers in the main graph counts to the layer it ends."""
    text = (dump / f"{stage['stage']}.py").read_text()
    name = next(n for n in stage["launches_by_function"] if n.endswith("_layers"))
    main_graph = text.split(f"def {name}(", 1)[1].split("@R.function", 1)[0]
    inside = next(v for n, v in stage["launches_by_function"].items() if "_CSA" in n)
    return inside + int("mhc_post_pre_norm" in main_graph or "cls.mhc_post" in main_graph)


if __name__ == "__main__":
    main()
