"""Tables and a chart of the results of a run: the same rows for a terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.peer_list import SAME_BITS
from v4c.cli.console import new_table, print_table
from v4c.runtime.whole_file import replacing

_COLOURS = {"v4c": "#1f6fb2", "llama": "#d97706", "transformers": "#8b5cf6", "onnxruntime": "#6b7280"}
_LINES = {"bf16": "-", "int8": "--", "q8_0": "--", "v4c-bf16-act": "-."}
"""By storage, or by name where two of an engine store the same; others are dotted."""
_NOT_MEASURED = "-"
_BESIDE = 2.0
"""Seconds before a turn within which limits count as measured beside it."""


def heading(document: dict[str, Any]) -> list[str]:
    """What was measured, on what, and how: sentences."""
    beside = "read and multiplied beside each turn" + _stale(document)
    pages = "; v4c's weights copied into huge pages" if document["huge_pages"] else ""
    turns = "all processes alive, in turns" if document["in_turns"] else "one peer after another, whole rounds in turns"
    return [
        f"{document['model']}, {document['parameters'] / 1e9:.2f} B parameters; {document['machine']}; "
        f"{document['threads']} threads for every peer{pages}.",
        f"Medians of {document['rounds']} rounds ({turns}), {document['steps']} decode steps each; in brackets the "
        "10th and 90th percentile.",
        f"While it ran, bandwidth varied between {document['lowest_stream_bandwidth_gbs']:.1f} and "
        f"{document['stream_bandwidth_gbs']:.1f} GB/s, and the float32 peak between "
        f"{document['lowest_matrix_peak_gflops']:.0f} and {document['matrix_peak_gflops']:.0f} GFLOP/s "
        f"({len(document['limits'])} counts).",
        f"Shares are of what was {beside}, medians over the turns; ratios between peers are of medians over rounds in "
        "turns.",
    ]  # fmt: skip


def _stale(document: dict[str, Any]) -> str:
    """Where limits could not be measured right before a turn: how long before."""
    parts = [part for peer in document["peers"] for part in (*peer["decode"], *peer["prefill"])]
    oldest = max(turn["seconds_before"] for part in parts for turn in part["turns"])
    return "" if oldest < _BESIDE else f" (of peers without v4c beside them: up to {oldest:.0f} s before)"


def decode_table(document: dict[str, Any]) -> list[list[str]]:
    """Decode: a row per peer under a header; milliseconds at every context, and the share of bandwidth."""
    contexts = sorted({entry["context"] for peer in document["peers"] for entry in peer["decode"]})
    header = ["decode, ms per token", *(f"context {n}" for n in contexts), *(f"of bandwidth at {n}" for n in contexts)]
    rows = [header]
    for peer in document["peers"]:
        at = {entry["context"]: entry for entry in peer["decode"]}
        times = [_time(at.get(n)) for n in contexts]
        shares = [f"{at[n]['bandwidth_share']:.0%}" if n in at else _NOT_MEASURED for n in contexts]
        rows.append([peer["name"], *times, *shares])
    return rows


def prefill_table(document: dict[str, Any]) -> list[list[str]]:
    """Prefill: a row per peer under a header; the first tokens of a prompt, and as many later ones."""
    starts = sorted({entry["start"] for peer in document["peers"] for entry in peer["prefill"]} - {0})
    chunk = document["chunk"]
    header = [f"prefill of {chunk}, ms", f"first {chunk}", "of float32 peak"]
    for start in starts:
        header += [f"last {chunk} of {start + chunk}", "against the first"]
    rows = [header]
    for peer in document["peers"]:
        at = {entry["start"]: entry for entry in peer["prefill"]}
        row = [peer["name"], _time(at.get(0)), f"{at[0]['peak_share']:.0%}"]
        for start in starts:
            row += [_time(at.get(start)), f"{at[start]['ms'] / at[0]['ms']:.2f}x" if start in at else _NOT_MEASURED]
        rows.append(row)
    return rows


def pairs_table(document: dict[str, Any]) -> list[list[str]]:
    """v4c against peers that read as many bits: how many times faster it is."""
    named = {peer["name"]: peer for peer in document["peers"]}
    contexts = sorted({entry["context"] for peer in document["peers"] for entry in peer["decode"]})
    rows = [["same bits", *(f"decode at {n}" for n in contexts), f"prefill of {document['chunk']}"]]
    for ours, theirs in SAME_BITS:
        if ours in named and theirs in named:
            decode = [{e["context"]: e["ms"] for e in named[name]["decode"]} for name in (ours, theirs)]
            row = [f"{ours} against {theirs}"]
            row += [f"{decode[1][n] / decode[0][n]:.2f}x" if n in decode[1] else _NOT_MEASURED for n in contexts]
            rows.append([*row, f"{named[theirs]['prefill'][0]['ms'] / named[ours]['prefill'][0]['ms']:.2f}x"])
    return rows


def agreement_lines(document: dict[str, Any]) -> Iterator[str]:
    """For each peer, whether it computes what v4c computes."""
    for peer in document["peers"]:
        for found in peer["agreement"]:
            if peer["name"] == "v4c-bf16":
                continue
            verdict = "agrees" if found["agrees"] else "DOES NOT AGREE"
            yield (
                f"{peer['name']} {verdict} with v4c-bf16 behind {found['context']} tokens: logits differ by "
                f"{found['relative_difference']:.2%} (median of {found['tokens']} tokens; allowed "
                f"{found['tolerance']:.0%}), at most {found['max_abs_diff']:.2g}; argmax the same for "
                f"{found['argmax_agreement']:.0%}"
            )


def _left_out(document: dict[str, Any]) -> Iterator[str]:
    for entry in document["left_out"]:
        yield f"Left out: {entry['name']}: {entry['reason']}"


def _time(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return _NOT_MEASURED
    median, low, high = (_number(entry[key], like=entry["ms"]) for key in ("ms", "p10_ms", "p90_ms"))
    return f"{median} ({low}-{high})"


def _number(ms: float, like: float | None = None) -> str:
    """Milliseconds with as many digits as `like` needs."""
    return f"{ms:.{2 if (ms if like is None else like) < 100 else 0}f}"


def _tables(document: dict[str, Any]) -> list[list[list[str]]]:
    tables = [decode_table(document), prefill_table(document), pairs_table(document)]
    return [table for table in tables if len(table) > 1]


def print_report(document: dict[str, Any]) -> None:
    """On stdout, for people."""
    for line in heading(document):
        click.echo(line)
    for header, *rows in _tables(document):
        click.echo()
        table = new_table(*header, numbers=header[1:])
        for row in rows:
            table.add_row(*row)
        print_table(table)
    click.echo()
    for line in (*agreement_lines(document), *_left_out(document)):
        click.echo(line)


def markdown(document: dict[str, Any]) -> str:
    """The same, for a page of docs/."""
    parts = [" ".join(heading(document))]
    for header, *rows in _tables(document):
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    notes = [f"- {line}" for line in (*agreement_lines(document), *_left_out(document))]
    return "\n\n".join([*parts, "\n".join(notes)])


def draw_chart(document: dict[str, Any], path: Path) -> None:
    """Three panels: decode and prefill as bars with the share of the machine's limit, decode over the context as lines.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    peers = document["peers"]
    figure = Figure(figsize=(15, 1.8 + 0.42 * len(peers)), layout="constrained")
    FigureCanvasAgg(figure)
    bars, prompts, lines = figure.subplots(1, 3)
    first = min(entry["context"] for peer in peers for entry in peer["decode"])
    steps = [next(e for e in peer["decode"] if e["context"] == first) for peer in peers]
    _bars(bars, peers, steps, "bandwidth_share", f"decode behind {first} tokens, ms (share of bandwidth beside)")
    prefills = [peer["prefill"][0] for peer in peers]
    _bars(prompts, peers, prefills, "peak_share", f"prefill of {document['chunk']}, ms (share of float32 peak beside)")
    for peer in peers:
        if len(peer["decode"]) > 1:
            at = [(entry["context"], entry["ms"]) for entry in peer["decode"]]
            lines.plot(*zip(*at, strict=True), marker="o", label=peer["name"], color=_COLOURS[peer["engine"]],
                       linestyle=_LINES.get(peer["name"]) or _LINES.get(peer["storage"], ":"))  # fmt: skip
    lines.set(xscale="log", xlabel="tokens of context", ylim=(0, None))
    contexts = sorted({entry["context"] for peer in peers for entry in peer["decode"]})
    lines.set_xticks(contexts, [str(n) for n in contexts], minor=False)
    lines.minorticks_off()
    lines.set_title("decode over the context, ms", fontsize=10)
    if lines.get_legend_handles_labels()[1]:
        lines.legend(fontsize=8)
    figure.suptitle(f"{document['model']}; {document['machine']}; {document['threads']} threads", fontsize=11)
    with replacing(path) as building:
        figure.savefig(building, format="png", dpi=110)


def _bars(
    axes: Any, peers: Sequence[dict[str, Any]], entries: Sequence[dict[str, Any]], share: str, title: str
) -> None:
    names = [peer["name"] for peer in peers]
    drawn = axes.barh(names, [e["ms"] for e in entries], color=[_COLOURS[peer["engine"]] for peer in peers])
    axes.bar_label(drawn, [f"{_number(e['ms'])} ({e[share]:.0%})" for e in entries], padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.4)
    axes.locator_params(axis="x", nbins=5)
    axes.set_title(title, fontsize=10)
