"""``v4c bench``: speed of a compiled model against the machine's limits, as a whole and kernel by kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .console import Progress, bytes_text, count_text, new_table, print_json, print_table
from .options import debug_option, huge_pages_option, json_option, threads_option, weights_memory_option


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--context", "contexts", type=int, multiple=True, default=(1024,), show_default=True, metavar="N",
    help="Decode with N tokens of context; may be repeated.",
)  # fmt: skip
@click.option("--prompt-tokens", type=int, default=512, show_default=True, metavar="N", help="Length of the prompt.")
@click.option(
    "--rounds", type=int, default=25, show_default=True, metavar="N", help="Steps to measure; a fifth as many prompts."
)
@weights_memory_option
@huge_pages_option
@threads_option
@click.option("--profile", is_flag=True, help="Measure every kernel, sorted by what could still be won.")
@click.option(
    "--trace", metavar="FILE", type=click.Path(path_type=Path), help="Write a Chrome trace of the profiled steps."
)
@json_option
@debug_option
def bench(
    artifact: Path,
    contexts: tuple[int, ...],
    prompt_tokens: int,
    rounds: int,
    weights_memory: str | None,
    huge_pages: bool,
    threads: int | None,
    profile: bool,
    trace: Path | None,
    as_json: bool,
) -> None:
    """Measure prefill and decode of a compiled model.

    Times are medians; shares are of what the machine reads from memory, and multiplies and adds, in the same run.
    """
    if trace is not None and not profile:
        raise click.UsageError("Expected --profile with --trace.", click.get_current_context())
    import v4c

    with Progress() as progress:
        document = v4c.bench(
            artifact, contexts=contexts, prompt_tokens=prompt_tokens, threads=threads, rounds=rounds, profile=profile,
            trace=trace, weights_memory=weights_memory, huge_pages=huge_pages, progress=progress,
        )  # fmt: skip
    if as_json:
        print_json(document)
        return
    click.echo(f"{document['machine']}; {document['threads']} threads{'; weights in huge pages' if huge_pages else ''}")
    click.echo(
        f"reads {document['stream_bandwidth_gbs']:.1f} GB/s, multiplies and adds {document['matrix_peak_gflops']:.0f} "
        "GFLOP/s"
    )
    for kind, of in (("decode", "context"), ("prefill", "tokens")):
        _summary(kind, of, document[kind])
    for kind, of in (("decode", "context"), ("prefill", "tokens")) if profile else ():
        for part in document["profile"][kind]:
            _kernels(f"{kind}, {of} {part[of]}", part)


def _summary(kind: str, of: str, measured: list[dict[str, Any]]) -> None:
    columns = (of, "ms", "p10", "p90", "tokens/s", "bytes", "of bandwidth", "FLOPs", "of peak")
    table = new_table(*columns, numbers=columns)
    for figures in measured:
        table.add_row(
            f"{figures[of]}", *(_ms(figures[key]) for key in ("ms", "p10_ms", "p90_ms")),
            f"{figures['tokens_per_second']:.1f}", bytes_text(figures["bytes_read"]),
            f"{figures['bandwidth_share']:.1%}", count_text(figures["flops"]), f"{figures['peak_share']:.1%}",
        )  # fmt: skip
    click.echo(f"\n{kind}")
    print_table(table)
    for figures in measured:
        if "experts" in figures:
            experts = figures["experts"]
            click.echo(
                f"{of} {figures[of]}: experts held {experts['hit_rate']:.1%} of {experts['uses']} uses, "
                f"{bytes_text(experts['bytes_read'])} read per step; weights in memory "
                f"{bytes_text(experts['resident_bytes'])}"
            )


def _kernels(title: str, profile: dict[str, Any]) -> None:
    numbers = ("calls", "ms", "share", "bytes", "of bandwidth", "FLOPs", "of peak", "could be won")
    table = new_table("kernel", "op", *numbers, numbers=numbers)
    for row in profile["rows"]:
        table.add_row(
            row["kernel"], row["op"], f"{row['calls']}", _ms(row["ms"]), f"{row['share']:.1%}",
            bytes_text(row["bytes"]), f"{row['bandwidth_share']:.1%}", count_text(row["flops"]),
            f"{row['peak_share']:.1%}", f"{_ms(row['winnable_ms'])} ms",
        )  # fmt: skip
    click.echo(f"\n{title}: {_ms(profile['step_ms'])} ms, {_ms(profile['profiled_ms'])} ms with the profiler")
    print_table(table)


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.2f}"
