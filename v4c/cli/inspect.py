"""``v4c inspect``: what a checkpoint, an ONNX or MLIR file, an artifact or a dump holds, as tables or JSON."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .console import bytes_text, count_text, message, new_table, print_json, print_table
from .options import debug_option, json_option

if TYPE_CHECKING:
    from rich.table import Table

_CONTEXT_NAMES = {"4096": "4k", "131072": "128k", "1048576": "1M"}
_LAYER = re.compile(r"\b\d+\b")


@click.command()
@click.argument("path", type=click.Path(path_type=Path), required=False)
@click.option("--preset", metavar="NAME", help="A known size, without any files; see v4c presets.")
@json_option
@debug_option
def inspect(path: Path | None, preset: str | None, as_json: bool) -> None:
    """Show what a checkpoint, ONNX or MLIR file or artifact holds, or what the passes of a --dump-ir folder did.

    Bytes, operators, and what a token costs at contexts of 4k, 128k and 1M; of a dump, kernel launches and bytes moved
    after each pass. Weights are not read.
    """
    if (path is None) == (preset is None):
        raise click.UsageError("Expected one of PATH and --preset.", click.get_current_context())
    from v4c.inspection import inspect as describe
    from v4c.inspection import inspect_preset

    description = describe(path) if path is not None else inspect_preset(str(preset))
    if as_json:
        print_json(description)
        return
    click.echo(f"{description['kind']} {description['path']}")
    if "config" in description:
        _pairs("model", _lines(description["config"]))
    _SECTIONS[description["kind"]](description)
    if "costs" in description:
        _costs(description["costs"])
    if description["problem"] is not None:
        message(f"problem: {description['problem']}")


def _checkpoint(description: dict[str, Any]) -> None:
    _bytes("files", description["files"])
    _bytes(f"{description['tensors']} tensors", description["bytes_by_part"])
    _bytes("by dtype", description["bytes_by_dtype"])
    _pairs("besides", {"tokenizer": _text(description["tokenizer"]), "unused": _text(description["unused_tensors"])})


def _preset(description: dict[str, Any]) -> None:
    _bytes(f"published checkpoint, {description['tensors']} tensors", description["bytes_by_part"])
    columns = ("weights", "artifact", "memory to pack")
    table = new_table("stored as", *columns, numbers=columns)
    for dtype, size in description["weight_bytes"].items():
        compiled = dtype in description["artifact_bytes"]
        sizes = (description["artifact_bytes"][dtype], description["peak_memory_bytes"]) if compiled else ()
        table.add_row(dtype, bytes_text(size), *map(bytes_text, sizes), *[""] * (2 - len(sizes)))
    _show("weights without MTP layers", table)


def _onnx(description: dict[str, Any]) -> None:
    weights = description["weights"]
    keys = ("producer", "ir_version", "opsets")
    _pairs("file", {key: _text(description[key]) for key in keys} | {"weights stored": _text(weights["stored"])})
    for key, title in (("custom_ops", "custom ops"), ("standard_ops", "standard ops")):
        table = new_table("op", "nodes", "with calls written out", numbers=("nodes", "with calls written out"))
        for name, count in description[key].items():
            table.add_row(name, f"{count['nodes']}", f"{count['calls']}")
        _show(title, table)
    table = new_table("name", "calls", numbers=("calls",))
    for name, calls in description["functions"].items():
        table.add_row(name, f"{calls}")
    _show("functions", table)
    _tensors("inputs", description["inputs"])
    _bytes(f"{weights['tensors']} weights", weights["bytes_by_dtype"])


def _mlir(description: dict[str, Any]) -> None:
    weights = description["weights"]
    _pairs("file", {"weights stored": _text(weights["stored"]), "weights in": _text(list(weights["files"]))})
    for name, entry in description["entry_points"].items():
        _tensors(f"inputs of @{name}", entry["inputs"])
        _tensors(f"outputs of @{name}", entry["outputs"])
    table = new_table("dialect", "op", "nodes", "with calls written out", numbers=("nodes", "with calls written out"))
    for dialect, ops in description["ops"].items():
        for name, count in ops.items():
            table.add_row(dialect, name.removeprefix(f"{dialect}."), f"{count['nodes']}", f"{count['calls']}")
    _show("ops", table)
    table = new_table("name", "calls", numbers=("calls",))
    for name, calls in description["functions"].items():
        table.add_row(name, f"{calls}")
    _show("functions", table)
    _bytes(f"{weights['tensors']} weights", weights["bytes_by_dtype"])


def _artifact(description: dict[str, Any]) -> None:
    keys = (
        "format_version",
        "v4c_version",
        "tvm_version",
        "target",
        "dtypes",
        "build",
        "has_weights",
        "tokenizer",
        "mtp",
    )
    notes = {key: note for key, note in description["build"].items() if key != "kernels"}  # one entry per kernel
    _pairs("artifact", {key: _text((description | {"build": notes})[key]) for key in keys})
    _pairs("entry points", description["entry_points"])
    _bytes("files", _by_kind(description["files"]))
    _tensors("caches", description["caches"])
    _bytes(f"{description['tensors']} weights", description["bytes_by_dtype"])
    _bytes("of these in host memory", description["host_tables"])
    if "plan" in description:
        _plan(description["plan"])


def _by_kind(files: dict[str, int]) -> dict[str, int]:
    """Sizes of files, those of the many tile programs summed."""
    kinds = {".linalg": "tile programs (*.linalg)", ".mlir": "HIVM text (*.mlir)"}
    sizes: Counter[str] = Counter()
    for name, size in files.items():
        sizes[kinds.get(Path(name).suffix, name)] += size
    return dict(sizes)


def _plan(plan: dict[str, Any]) -> None:
    """The launch plan of a device, and its costs by op."""
    host = plan["host"]
    _pairs("launch plan", {key: _text(plan[key]) for key in ("device", "compiler", "operations", "programs")})
    _pairs("on the host", {"operators": _text(host["operators"]), **_lines(host["fallbacks"])})
    for key, what in (("decode", "decode step"), ("prefill", "prompt")):
        costs = plan[key]
        columns = ("launches", "bytes", "multiply-adds", "vector ops", "time at peak")
        table = new_table("op", *columns, "bound by", numbers=columns)
        for name, row in (*costs["ops"].items(), ("total", costs["total"])):
            amounts = (bytes_text(row["bytes"]), count_text(row["cube"]), count_text(row["vector"]))
            table.add_row(name, f"{row['launches']}", *amounts, f"{row['seconds'] * 1e6:.1f} us", row["bound"])
        tokens = f"{costs['tokens']} token{'s' if costs['tokens'] > 1 else ''}"
        title = f"{what} of {tokens} at a context of {costs['context']}"
        _show(f"{title}: estimated at the peaks below, not measured", table)
    table = new_table("peak", "per second", "source", numbers=("per second",))
    for name, figure in plan["rates"].items():
        table.add_row(name, count_text(figure["value"]), figure["source"])
    _show("peaks", table)


def _dump(description: dict[str, Any]) -> None:
    columns = ("nodes", "launches", "bytes", "FLOPs")
    table = new_table("after", *columns, numbers=columns)
    for stage in description["stages"]:
        figures = (f"{stage['nodes']}", f"{stage['launches']}", bytes_text(stage["bytes"]), count_text(stage["flops"]))
        table.add_row(stage["stage"], *figures)
    _show(f"one decode step of one row at a context of {description['context']}", table)
    first, last = description["stages"][0], description["stages"][-1]
    table = new_table("function", "launches", numbers=("launches",))
    for name, launches in last["launches_by_function"].items():
        table.add_row(name, f"{launches}")
    _show(f"launches by function; of the whole step {last['launches']}, before the passes {first['launches']}", table)


def _costs(costs: dict[str, Any]) -> None:
    _pairs("size", {key: count_text(costs[key]) for key in ("parameters", "active_parameters")})
    columns = ("FLOPs/token", *(f"cache {kv}" for kv in costs["cache_bytes"]))
    table = new_table("context", *columns, numbers=columns)
    for context, flops in costs["flops_per_token"].items():
        caches = (bytes_text(sizes[context]) for sizes in costs["cache_bytes"].values())
        table.add_row(_CONTEXT_NAMES.get(context, context), count_text(flops), *caches)
    _show("cost by context", table)
    shares = costs["against_v32"]
    figures = {"cache": f"{shares['cache']:.1%}", "FLOPs/token": f"{shares['flops']:.1%} (in FP8 equivalents)"}
    _pairs("against DeepSeek-V3.2 at 1M, with the published formats", figures)


def _tensors(title: str, tensors: list[dict[str, Any]]) -> None:
    """Tensors that differ in their layer only share a line."""
    table = new_table("tensors", "name", "dtype", "shape", numbers=("tensors",))
    alike: Counter[tuple[str, str, str]] = Counter()
    for tensor in tensors:
        dims = (f"tokens/{dim['rows']}" if isinstance(dim, dict) else f"{dim}" for dim in tensor["shape"])
        alike[_LAYER.sub("*", tensor["name"]), tensor["dtype"], " x ".join(dims)] += 1
    for described, count in alike.items():
        table.add_row(f"{count}", *described)
    _show(title, table)


def _bytes(title: str, sizes: dict[str, int]) -> None:
    table = new_table("name", "bytes", numbers=("bytes",))
    for name, size in sizes.items():
        table.add_row(name, bytes_text(size))
    _show(f"{title}: {bytes_text(sum(sizes.values()))}", table)


def _pairs(title: str, values: dict[str, str]) -> None:
    table = new_table("key", "value")
    table.show_header = False
    for key, value in values.items():
        table.add_row(key.replace("_", " "), value)
    _show(title, table)


def _show(title: str, table: Table) -> None:
    if table.row_count:
        click.echo(f"\n{title}")
        print_table(table)


def _lines(values: dict[str, Any]) -> dict[str, str]:
    return {key: _text(value) for key, value in values.items()}


def _text(value: Any) -> str:
    """A JSON value as a person writes it."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else f"{value}"


_SECTIONS = {
    "preset": _preset,
    "checkpoint": _checkpoint,
    "onnx": _onnx,
    "mlir": _mlir,
    "artifact": _artifact,
    "dump": _dump,
}
