"""The same random weights in v4c, transformers, ONNX Runtime and llama.cpp, measured in one run on this machine.

Run ``python -m benchmarks.peers --work DIR`` from a checkout, with the extra ``bench``. Every peer runs in a process of
its own, with as many threads; medians are printed with their shares of what the machine read and multiplied beside each
turn, and a line per peer that says whether it computes the same logits. docs/performance.md has the method.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.peer_list import DEFAULT, PEERS, REFERENCE, Peer, chosen, free_memory
from benchmarks.peer_measure import Run
from benchmarks.peer_pool import Pool, Process
from benchmarks.peer_report import draw_chart, markdown, print_report
from v4c.errors import Error, InputError
from v4c.frontend.config import ModelConfig
from v4c.frontend.presets import preset

_MEMORY_SHARE = 0.85
"""Of the free memory, what peers may take together: pages of mapped files must stay where they are."""

_FILE = click.Path(path_type=Path, dir_okay=False)


def _numbers(context: click.Context, option: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        numbers = ()
    if not numbers or numbers[0] < 1:
        raise click.BadParameter(f"expected positive integers with commas between, found {text!r}")
    return numbers


@click.command(help=__doc__)
@click.option("--model", type=click.Choice(["v4-mini", "flash-slice", "v4-nano"]), default="v4-mini", show_default=True)
@click.option(
    "--peers", "names", default=",".join(DEFAULT), show_default=True,
    help=f"Names with commas between, out of {', '.join(PEERS)}; v4c-bf16, which all are compared with, is always run.",
)  # fmt: skip
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="How often peers take turns.")
@click.option(
    "--steps", type=click.IntRange(1), default=8, show_default=True, help="Decode steps in a turn, after a warm-up."
)  # fmt: skip
@click.option(
    "--contexts", callback=_numbers, default="1024,16384,65536", show_default=True,
    help="Decode behind so many tokens; llama.cpp up to 16384, eager transformers and ONNX Runtime up to 1024.",
)  # fmt: skip
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True, help="Of every peer.")
@click.option("--huge-pages", is_flag=True, help="Copy v4c's weights into huge pages, as v4c.load(huge_pages=True).")
@click.option(
    "--work", type=click.Path(path_type=Path, file_okay=False),
    help="Keep the checkpoint and what peers make of it here: a second run reuses them. Default: a temporary folder.",
)  # fmt: skip
@click.option("--json", "results", type=_FILE, metavar="FILE.json", help="Write all results, every sample included.")
@click.option("--chart", type=_FILE, metavar="FILE.png", help="Draw them.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print the tables as Markdown.")
@click.option(
    "--from", "earlier", type=click.Path(path_type=Path, exists=True, dir_okay=False), metavar="FILE.json",
    help="Measure nothing: print and draw the results of an earlier run.",
)  # fmt: skip
def main(
    model: str,
    names: str,
    rounds: int,
    steps: int,
    contexts: tuple[int, ...],
    threads: int,
    huge_pages: bool,
    work: Path | None,
    results: Path | None,
    chart: Path | None,
    as_markdown: bool,
    earlier: Path | None,
) -> None:
    try:
        for file in (results, chart):
            if file is not None and not file.absolute().parent.is_dir():
                raise InputError(f"{file}: expected a file name in an existing folder")
        if earlier is not None:
            document = _read(earlier)
        else:
            peers = chosen(part for part in names.split(",") if part)
            with tempfile.TemporaryDirectory() as scratch:
                folder = (work or Path(scratch)).absolute() / model
                folder.mkdir(parents=True, exist_ok=True)
                document = measure(
                    model, peers, folder, contexts, rounds=rounds, steps=steps, threads=threads, huge_pages=huge_pages
                )  # fmt: skip
    except Error as error:
        raise click.ClickException(str(error)) from None
    if results is not None:
        results.write_text(json.dumps(document, indent=1) + "\n")
    if chart is not None:
        draw_chart(document, chart)
    if as_markdown:
        click.echo(markdown(document))
    else:
        print_report(document)


def measure(
    model: str,
    peers: Sequence[Peer],
    folder: Path,
    contexts: Sequence[int],
    *,
    rounds: int,
    steps: int,
    threads: int,
    huge_pages: bool,
) -> dict[str, Any]:
    """Prepare and measure `peers`; results as a document.

    Args:
        model: preset.
        peers: the reference among them.
        folder: for checkpoint, artifacts, logits and logs; what is there is used.
        contexts: tokens before the decode steps.
        rounds: turns of each peer.
        steps: decode steps in a turn and context.
        threads: of each peer.
        huge_pages: whether v4c's peers copy their weights into huge pages.

    Raises:
        Error: the reference cannot be made or fails. Other peers that fail are listed with the reason.
    """
    config = preset(model)
    beyond = [n for n in contexts if n + rounds * (steps + 1) > config.max_position_embeddings]
    if beyond:
        raise InputError(f"--contexts: expected at most {config.max_position_embeddings} tokens, found {beyond[0]}")
    memory = _MEMORY_SHARE * free_memory()
    ready, left_out = _prepare(model, config, peers, folder, memory, threads)
    logits = folder / "logits"
    logits.mkdir(exist_ok=True)
    slack = rounds * (steps + 1)
    with Pool(
        ready, config, folder, memory=memory, threads=threads, slack=slack, huge_pages=huge_pages
    ) as pool:  # fmt: skip
        run = Run(pool, ready, contexts, steps, logits, _tell)
        run.left_out = left_out
        for number in range(1, rounds + 1):
            run.round(f"round {number} of {rounds}")
        return run.document(config, model, threads, rounds)


def _prepare(
    model: str, config: ModelConfig, peers: Sequence[Peer], folder: Path, memory: float, threads: int
) -> tuple[list[Peer], list[dict[str, str]]]:
    """Make what peers load, each in a process of its own; those that are ready, and those that cannot be."""
    ready, left_out = [], []
    _tell(f"checkpoint of {model}")
    _alone("checkpoint", folder, threads, "checkpoint", model=model, folder=str(folder))
    for peer in peers:
        try:
            needs = peer.needs(config)
            if needs > memory:
                raise Error(f"{peer.name}: expected {needs / 1e9:.0f} GB of memory to use, found {memory / 1e9:.0f}")
            _tell(f"prepare {peer.name}")
            _alone(peer.name, folder, threads, "prepare", peer=peer.name, folder=str(folder))
            ready.append(peer)
        except Error as error:
            if peer is REFERENCE:
                raise
            left_out.append({"name": peer.name, "reason": str(error).removeprefix(f"{peer.name}: ")})
            _tell(f"left out {peer.name}: {left_out[-1]['reason']}")
    return ready, left_out


def _alone(name: str, folder: Path, threads: int, do: str, /, **arguments: Any) -> None:
    process = Process(name, folder / f"{name}.log", threads)
    try:
        process.ask(do, **arguments)
    except BaseException:
        process.kill()
        raise
    process.end()


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
        if not isinstance(document, dict) or not document.get("peers"):
            raise ValueError("no peers")
        if not all("turns" in part for peer in document["peers"] for part in (*peer["decode"], *peer["prefill"])):
            raise ValueError("those of an older version, without limits beside each turn: measure again")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: expected results of this benchmark, found {error}") from None
    return document


def _tell(text: str) -> None:
    click.echo(text, err=True)


if __name__ == "__main__":
    main()
