"""Does quality survive compiling and quantising: the trained checkpoint, by everything that can run it.

Run ``python -m benchmarks.quality`` from a checkout. It compiles ``examples/train_nano/checkpoint`` in every format,
evaluates each like ``v4c eval`` does, prints the table of docs/quality.md, and exits with 1 where a bound is missed.
The Ascend simulation is slow, so it reads the first tokens only; torch's figure for the same tokens stands beside it.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

import v4c
from benchmarks.timing import machine
from v4c.errors import Error

CHECKPOINT = Path(__file__).parents[1] / "examples" / "train_nano" / "checkpoint"


@dataclass(frozen=True)
class Way:
    """One way to run the checkpoint.

    Attributes:
        name: in the table.
        make: how: ``"torch"``, ``"hidden"`` (torch without compressed rows), ``"onnx"`` or ``"compile"``.
        options: of `v4c.compile`.
        bound: largest relative difference of bits per byte from torch's; None: no bound.
        part: whether it reads the first tokens only.
    """

    name: str
    make: str
    options: dict[str, str] = field(default_factory=dict)
    bound: float | None = None
    part: bool = False


WAYS = (
    Way("torch, float32", "torch"),
    Way("torch, float32, compressed rows hidden", "hidden"),
    Way("ONNX Runtime, float32", "onnx", bound=1e-4),
    Way("CPU, float32", "compile", {"dtype": "f32"}, 1e-4),
    Way("CPU, bfloat16", "compile", {"dtype": "bf16"}, 0.005),
    Way("CPU, int8", "compile", {"dtype": "bf16", "quant": "int8"}, 0.01),
    Way("CPU, int4", "compile", {"dtype": "bf16", "quant": "int4"}, 0.05),
    Way("CPU, float32, caches in bfloat16", "compile", {"dtype": "f32", "kv": "bf16"}, 0.005),
    Way("CPU, int8, caches in FP8", "compile", {"dtype": "bf16", "quant": "int8", "kv": "fp8"}, 0.01),
    Way("torch, float32, first tokens", "torch", part=True),
    Way("Ascend910B1, simulated, float16, first tokens", "compile", {"target": "ascend"}, 0.01, part=True),
)


@click.command(help=__doc__)
@click.option("-m", "--model", default=CHECKPOINT, type=click.Path(path_type=Path), help="Another checkpoint.")
@click.option("--work", type=click.Path(path_type=Path), help="Keep what is compiled, and use what is there.")
@click.option("--questions", default=32, show_default=True, help="Of recall, for each distance.")
@click.option("--part", default=600, show_default=True, help="Tokens of the ways that read the first ones only.")
@click.option("--only", multiple=True, metavar="TEXT", help="Ways whose name contains this; torch always runs.")
@click.option("--json", "as_json", is_flag=True)
def main(model: Path, work: Path | None, questions: int, part: int, only: tuple[str, ...], as_json: bool) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for way in WAYS:
            if only and not any(text in way.name for text in only) and not way.name.startswith("torch, float32"):
                continue
            click.echo(f"{way.name} ...", err=True)
            reason = _unavailable(way)
            if reason is not None:
                click.echo(f"left out: {reason}", err=True)
                continue
            rows.append(_measure(way, model, folder, questions, part))
    for row in rows:
        reference = next(r for r in rows if r["make"] == "torch" and r["part"] == row["part"])
        row["relative"] = row["bits_per_byte"] / reference["bits_per_byte"] - 1
        row["ok"] = row["bound"] is None or abs(row["relative"]) <= row["bound"]
    if as_json:
        click.echo(json.dumps({"machine": machine(), "rows": rows}, indent=1))
    else:
        _print(rows)
    sys.exit(0 if all(row["ok"] for row in rows) else 1)


def _unavailable(way: Way) -> str | None:
    """Why a way cannot be gone on this machine; None if it can."""
    if way.options.get("target") == "ascend" and importlib.util.find_spec("ascendnpuir") is None:
        return "expected the package ascendnpu-ir (extra ascend), found none"
    return None


def _measure(way: Way, model: Path, folder: Path, questions: int, part: int) -> dict[str, Any]:
    subject, hide = model, way.make == "hidden"
    if way.make == "onnx":
        subject = folder / "model.onnx"
        if not subject.exists():
            v4c.export(model, subject, all_logits=True)
    elif way.make == "compile":
        subject = folder / ("-".join(way.options.values()) + ".v4c")
        if not subject.exists():
            v4c.compile(model, subject, **way.options)  # type: ignore[arg-type]
    asked: dict[str, Any] = {"max_tokens": part, "distances": ()} if way.part else {"questions": questions}
    try:
        found = v4c.evaluate(subject, tokenizer=model / "tokenizer.json", hide_rows=hide, **asked)
    except Error as failure:
        raise click.ClickException(f"{way.name}: {failure}") from failure
    return {
        "way": way.name, "make": way.make, "part": way.part, "bound": way.bound,
        "bits_per_byte": found["text"]["bits_per_byte"], "tokens": found["text"]["tokens"],
        "recall": {str(row["distance"]): row["accuracy"] for row in found["recall"]},
    }  # fmt: skip


def _print(rows: list[dict[str, Any]]) -> None:
    distances = list(rows[0]["recall"])
    click.echo(f"| | bits per byte | to torch | bound | {' | '.join(f'recall at {d}' for d in distances)} |")
    click.echo("|---" * (4 + len(distances)) + "|")
    for row in rows:
        recall = [f"{row['recall'][d]:.0%}" if row["recall"] else "" for d in distances]
        bound = "" if row["bound"] is None else f"{row['bound']:.2%}" + ("" if row["ok"] else " MISSED")
        relative = "" if row["make"] == "torch" else f"{row['relative']:+.4%}"
        click.echo(f"| {row['way']} | {row['bits_per_byte']:.5f} | {relative} | {bound} | {' | '.join(recall)} |")


if __name__ == "__main__":
    main()
